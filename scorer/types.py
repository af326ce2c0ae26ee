"""The scorer's vocabulary: what is asked, what comes back, and who can answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """One question to the frozen model: how likely are these answer tokens after these prefix tokens?"""

    prefix_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class Greedy:
    """Ask for the model's own answer too: greedy decoding from the prefix until `stop`, EOS or `max_new_tokens`."""

    max_new_tokens: int
    stop: str = "\n"


@dataclass(frozen=True)
class Score:
    """log p(answer token t | prefix, earlier answer tokens), natural logarithm, one finite value <= 0 a token."""

    token_logprobs: tuple[float, ...]
    greedy_text: str | None = None
    """The model's own answer before `Greedy.stop`, special tokens removed; None where it was not asked for."""


@dataclass(frozen=True)
class Unscored:
    """An item without a score. It is counted and trains nothing; no number stands in for it anywhere."""

    reason: str


class ScorerError(RuntimeError):
    """The scorer cannot work at all (no such model, nobody answers): the run must stop and say so."""


class Scorer(Protocol):
    """A frozen language model that scores. Back-ends: `scorer.local`, `scorer.vllm`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Most tokens of prefix + answer (and of prefix + greedy answer) that the model takes."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a stored score depends on: back-end, model, dtype, versions. Equal fingerprints, equal scores."""
        ...

    def score(self, items: Sequence[Item], greedy: Greedy | None = None) -> list[Score | Unscored]:
        """One result an item, in the order of `items`; equal items are computed once.

        Raises:
            ValueError: an item is empty or longer than `max_length` (named by its index); nothing is truncated.
            ScorerError: the back-end is gone.
        """
        ...

    def close(self) -> None:
        """Stops what this scorer started. Safe to call twice."""
        ...
