"""What can be said of two rewards: the kinds of verdict, the closest first."""

from dataclasses import dataclass

KINDS = ("identical", "epsilon", "factor", "order", "different")


@dataclass(frozen=True)
class Verdict:
    """How far GRPO tells two rewards apart.

    Attributes:
        kind: one of `KINDS`.
        reason: one sentence for a user.
        largest: the largest difference of two advantages on the data, None without data.
    """

    kind: str
    reason: str
    largest: float | None = None
