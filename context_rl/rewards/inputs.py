"""What is known of one trace when it is rewarded, and the one error that rewards raise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

from context_rl.rewards.safeguards import Leak, find_leak


class RewardError(ValueError):
    """A reward that does not exist, does not take a parameter, does not fit the data, or is no number."""


@dataclass(frozen=True)
class Option:
    """One ending of a multiple-choice question, as the base model scored it after the trace.

    Attributes:
        logprob: sum over its tokens, nats.
        characters: of its text; "per character" divides by them, as lm-evaluation-harness's acc_norm does.
    """

    logprob: float
    characters: int


@dataclass(frozen=True)
class RewardInputs:
    """One (question, trace) pair and what the base model said to it.

    Attributes:
        token_logprobs: l_t, nats, one a token of the answer (and of the line end that closes it).
        baseline_logprobs: l0_t, the same tokens without a trace.
        correct: is the base model's own answer, given the trace, right by the task's grader, or by the judge? (Multiple
            choice: is the right option the likeliest per character?) None where the judge was not asked.
        answered_number: the number in the base model's greedy answer, None if it holds none.
        gold_number: the number in the gold answer, None if it is not one.
        masked_logprobs: l_t once more, with every mention of the answer cut out of the trace; None where that was not
            scored.
        options: of a multiple-choice question, in the data's order; `label` is the place of the right one.
        finished: q ended the trace by itself, before the token limit.
        judged: how well the base model's own answer agrees with the right one, by the judge, in [0, 1]; None where it
            was not asked.

    Raises:
        RewardError: a log-prob that is none (missing, NaN, infinite, above 0), no answer token at all, a right option
            that does not exist, a number of an answer that is not finite, or a judge's outside [0, 1].
    """

    token_logprobs: tuple[float, ...]
    baseline_logprobs: tuple[float, ...]
    correct: bool | None
    answered_number: float | None = None
    gold_number: float | None = None
    masked_logprobs: tuple[float, ...] | None = None
    options: tuple[Option, ...] = ()
    label: int | None = None
    question: str = ""
    answer: str = ""
    trace: str = ""
    trace_tokens: int = 0
    finished: bool = True
    judged: float | None = None

    def __post_init__(self) -> None:
        check_logprobs("the answer", self.token_logprobs)
        check_logprobs("the answer without a trace", self.baseline_logprobs)
        if self.masked_logprobs is not None:
            check_logprobs("the answer after the masked trace", self.masked_logprobs)
        if self.options:
            check_logprobs("the options", [option.logprob for option in self.options])
            if self.label is None or not 0 <= self.label < len(self.options):
                raise RewardError(f"{len(self.options)} options, and the right one is number {self.label}")
        for number in (self.answered_number, self.gold_number):
            if number is not None and not math.isfinite(number):
                raise RewardError(f"{number!r} is no answer's number; one that cannot be read must be left out")
        if self.judged is not None and not 0 <= self.judged <= 1:
            raise RewardError(f"{self.judged!r} is no judge's score, which lies in [0, 1]")

    @cached_property
    def logprob(self) -> float:
        """L = sum_t l_t, nats."""
        return math.fsum(self.token_logprobs)

    @cached_property
    def baseline_logprob(self) -> float:
        """L0 = sum_t l0_t, nats."""
        return math.fsum(self.baseline_logprobs)

    @cached_property
    def leak(self) -> Leak:
        """Whether and where the trace states the answer."""
        return find_leak(self.trace, self.answer)


def check_logprobs(what: str, values: Sequence[float]) -> None:
    """Raises RewardError unless the values are log-probs: at least one, finite, at most 0."""
    if not values:
        raise RewardError(f"{what}: no log-probs, and no reward can be made of none")
    for value in values:
        if not (isinstance(value, Real) and math.isfinite(value) and value <= 0.0):
            raise RewardError(f"{what}: {value!r} is no log-prob; a score that failed must be left out, not passed on")
