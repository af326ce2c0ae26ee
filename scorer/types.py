"""The scorer's vocabulary: what is asked, what comes back, and who can answer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """One question to the frozen model: how likely are these answer tokens after these prefix tokens?"""

    prefix_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    group: str = field(default="", compare=False)
    """Items of one group (the traces of a question) share the beginning of their prefixes, so they go to one replica,
    whose cache has it. Says nothing about the score: equal items of two groups are one item."""


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
    fault: str = "other"
    """One of `FAULTS`."""


FAULTS = (
    "timeout",  # no answer in time
    "connection",  # refused, reset, or closed within the answer
    "overloaded",  # HTTP 429
    "server_error",  # HTTP 5xx, or the engine died
    "refused",  # HTTP 400 or another 4xx: this request will never be answered
    "garbled",  # an answer that is no JSON, or not of the agreed form
    "missing",  # an answer without this item
    "rows",  # another number of log-probs than tokens asked for
    "ids",  # log-probs of other tokens or of another prompt than sent
    "not_a_number",  # NaN or no number at all
    "minus_infinity",  # -inf, or the -9999 that stands for it
    "impossible",  # above 0, or contradicted by its rank or its neighbours
    "too_long",  # more tokens than the model takes
    "not_sent",  # given up because the requests before it failed
    "other",
)
"""What can go wrong with one item. Counted by name in `Usage`."""


LATENCIES_KEPT = 10_000
"""Requests whose duration `Usage` remembers, so that a long evaluation does not fill the memory with them."""


@dataclass
class Usage:
    """What scoring took. Shares and quantiles are computed by `metrics`; `add` joins the usage of several calls.

    Attributes:
        items: asked for, repeated ones included; `distinct` of them were sent.
        prompt_tokens: of the requests made for them; `cached_tokens` of these were read from the prefix cache.
        requests: sent to a server or an engine; `retries` of them repeated an earlier one, and `uncached` repeated one
            whose scores a cache hit had cost.
        seconds: in `score`, summed over calls; `latencies` are the seconds of each request.
        faults: seen, by name, also where another attempt succeeded; `unscored` items that stayed without a score.
    """

    items: int = 0
    distinct: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    requests: int = 0
    retries: int = 0
    uncached: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Usage") -> None:
        """Adds another's counts to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        del self.latencies[:-LATENCIES_KEPT]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a log; what was not counted is left out."""
        out: dict[str, float] = {"items": self.items, "seconds": self.seconds, "requests": self.requests}
        out |= {"retries": self.retries, "uncached_retries": self.uncached, "prompt_tokens": self.prompt_tokens}
        if self.items:
            out["duplicates"] = 1 - self.distinct / self.items
            out["unscored"] = self.unscored.total() / self.items
        if self.seconds:
            out["items_per_second"] = self.items / self.seconds
        if self.prompt_tokens:
            out["cached_share"] = self.cached_tokens / self.prompt_tokens
        if self.latencies:
            ordered = sorted(self.latencies)
            out |= {f"latency_p{p}": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (50, 95)}
        out |= {f"faults/{name}": count for name, count in self.faults.items()}
        return out


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

    def take_usage(self) -> Usage:
        """What was counted since the last call of this method."""
        ...

    def close(self) -> None:
        """Stops what this scorer started. Safe to call twice."""
        ...
