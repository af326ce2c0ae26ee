"""What GRPO makes of rewards: TRL's advantages, computed here from all processes' rows."""

import math
from collections.abc import Sequence

import numpy as np

SCALES = ("group", "batch", "none")
"""TRL's `scale_rewards`: what divides a reward's distance from its group's mean."""
ZERO_STD = 1e-8
"""TRL 1.16 takes a std in float32 for zero where torch.isclose(std, 0), whose tolerance this is."""


def grpo_advantages(rewards: Sequence[float | None], group_size: int, scale: str = "group") -> list[float]:
    """Advantages as TRL 1.16's GRPOTrainer computes them from one reward function (sum_then_normalize).

    Args:
        rewards: one a row, groups of `group_size` one after the other; None or NaN marks an unscored row.
        scale: "group": (r - mean) / (std + 1e-4) in the group; "batch": with the batch's std; "none": r - mean.

    Returns:
        One advantage a row; 0.0 for unscored rows, which count in no mean and no standard deviation.

    Raises:
        ValueError: rows that are no whole groups, or a scaling that TRL does not have.
    """
    values = [math.nan if r is None else float(r) for r in rewards]
    if len(values) % group_size:
        raise ValueError(f"{len(values)} rewards are no whole number of groups of {group_size}")
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; it can be {', '.join(SCALES)}")
    batch_std = std(values)
    advantages = []
    for start in range(0, len(values), group_size):
        group = values[start : start + group_size]
        scored = [v for v in group if not math.isnan(v)]
        centre = math.fsum(scored) / len(scored) if scored else math.nan
        divisor = {"group": std(group) + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
        advantages += [0.0 if math.isnan(v) else (v - centre) / divisor for v in group]
    return advantages


def std(values: Sequence[float]) -> float:
    """Sample standard deviation of the values that are not NaN; 0.0 for fewer than two."""
    known = [v for v in values if not math.isnan(v)]
    if len(known) < 2:
        return 0.0
    centre = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in known) / (len(known) - 1))


# --- groups without a gradient ---


def spread_squares(values: np.ndarray) -> np.ndarray:
    """Sum of squares around the group's mean, [A]; exactly 0 for equal values, whose mean rounding may miss."""
    squares = ((values - values.mean(-1, keepdims=True)) ** 2).sum(-1)
    return np.where(values.min(-1) == values.max(-1), 0.0, squares)


def has_no_spread(values: np.ndarray) -> np.ndarray:
    """Whether GRPO has no gradient from the group, [A] (bool): TRL's test (see `ZERO_STD`) of its float32 rewards.

    The std itself is taken in double precision. TRL's own, in float32, misses some groups of equal rewards: eight times
    0.3 has a std of 3e-8 there.
    """
    seen = values.astype(np.float32).astype(np.float64)
    return np.sqrt(spread_squares(seen) / (values.shape[-1] - 1)) <= ZERO_STD


def no_spread_share(rewards: Sequence[float | None], group_size: int) -> float:
    """Share of groups from which GRPO has no gradient, whatever the scaling: fewer than two scored rows, or no spread.

    TRL's `frac_reward_zero_std` is this under group scaling and none; under batch scaling it asks for the batch's std,
    and is 0 also where many groups are of equal rewards.
    """
    groups = np.array(rewards, dtype=float).reshape(-1, group_size)  # None becomes NaN
    scored = [group[~np.isnan(group)] for group in groups]
    return sum(len(values) < 2 or bool(has_no_spread(values)) for values in scored) / len(groups)
