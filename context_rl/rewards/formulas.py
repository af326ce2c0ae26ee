"""The reward formulas: pure functions of what the frozen base model said about one trace.

Notation: l_t = log p_base(y_t | question, trace, y_<t) in nats, one value an answer token, T tokens; l0_t the same
without the trace; L = sum_t l_t, m = L / T, PPL = exp(-m); L0, m0, PPL0 likewise. Every absolute and relative formula
grows as the right answer becomes likelier: log p itself is the reward. -log p, as papers that speak of a
"negative log-likelihood reward" write it, is the cost.

A formula takes `RewardInputs` and its own parameters by name, and returns a finite float or raises `RewardError`. To
add one, write it here and put it into `FORMULAS`, or keep it in a module of your own and name it by its dotted path.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from context_rl.rewards import safeguards
from context_rl.rewards.inputs import RewardError, RewardInputs

FAR = math.log(1e6)
"""Exponents are cut here: a perplexity of a million is as hopeless as any larger one, and stays a finite number."""


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# --- absolute ---


def logprob_sum(x: RewardInputs) -> float:
    """L = sum_t l_t: nats, in (-inf, 0]. LaTRO (Chen et al. 2024)."""
    return x.logprob


def logprob_mean(x: RewardInputs) -> float:
    """m = L / T: nats a token, in (-inf, 0]. Log of the geometric mean probability; does not favour short answers."""
    return x.logprob / len(x.token_logprobs)


def probability(x: RewardInputs) -> float:
    """exp(L), in [0, 1]: the chance that the base model gives exactly this answer. VeriFree (Zhou et al. 2025)."""
    return math.exp(x.logprob)


def geometric_probability(x: RewardInputs) -> float:
    """exp(m) = 1 / PPL, in [0, 1]: the geometric mean of the token probabilities; long answers do not vanish."""
    return math.exp(logprob_mean(x))


def mean_probability(x: RewardInputs) -> float:
    """(1/T) sum_t exp(l_t), in [0, 1]: their arithmetic mean; one bad token cannot ruin it. RLPR (Yu et al. 2025)."""
    return mean([math.exp(value) for value in x.token_logprobs])


def negative_perplexity(x: RewardInputs) -> float:
    """-PPL = -exp(-m), in [-1e6, -1]; cut at -1e6 (see `FAR`). One hopeless trace outweighs all others.

    Under group scaling only those of its group; under `batch` and `none` all of the batch (docs/ablations.md).
    """
    return max(-1e6, -math.exp(min(-logprob_mean(x), FAR)))


def logprob_mean_min(x: RewardInputs, weight: float = 0.01) -> float:
    """m + weight * min_t l_t: nats a token, in (-inf, 0]. The worst token counts too. RLT (Cetin et al. 2025)."""
    if weight < 0:
        raise RewardError(f"weight is {weight!r}; below 0 it would pay for an unlikely token")
    return logprob_mean(x) + weight * min(x.token_logprobs)


# --- relative to no trace ---


def gain(x: RewardInputs) -> float:
    """m - m0: nats a token, any real number: how much the trace helps.

    Within a group it is `logprob_mean` less a constant, which GRPO subtracts: to it the two are one reward (under
    batch scaling up to one factor a batch; see `context_rl.rewards.equivalence`). They differ inside thresholds and
    clips.
    """
    return logprob_mean(x) - x.baseline_logprob / len(x.baseline_logprobs)


def probability_gain(x: RewardInputs) -> float:
    """exp(L) - exp(L0), in [-1, 1]. To GRPO the same as `probability` (see `gain`)."""
    return math.exp(x.logprob) - math.exp(x.baseline_logprob)


def perplexity_improvement(x: RewardInputs) -> float:
    """(PPL0 - PPL) / PPL0 = 1 - exp(-gain), in [-100, 1]: the share by which the trace lowers the perplexity.

    VR-CLI (Gurung and Lapata 2025), there in per cent. Cut at -100, where nothing helpful is left to tell apart.
    For group scaling: under `batch` and `none` the losses of a few traces outweigh all gains (docs/ablations.md).
    """
    return max(-100.0, 1.0 - math.exp(min(-gain(x), math.log(101.0))))


# --- contrastive: multiple choice ---


def option_probability(x: RewardInputs, per: str = "answer") -> float:
    """softmax over the options' L at the right one, in [0, 1]. `per="character"` divides each L by its characters.

    The decision rules are those of lm-evaluation-harness's acc and acc_norm, the softmax of InfoNCE.
    """
    scores = option_scores(x, per)
    top = max(scores)
    return math.exp(scores[x.label] - top) / math.fsum(math.exp(score - top) for score in scores)


def option_margin(x: RewardInputs, per: str = "answer") -> float:
    """L of the right option less the largest L of a wrong one: nats (or nats a character), any real number.

    Above 0 exactly where the right option is the likeliest.
    """
    scores = option_scores(x, per)
    return scores[x.label] - max(score for place, score in enumerate(scores) if place != x.label)


def option_scores(x: RewardInputs, per: str) -> list[float]:
    """Each option's L, per answer or per character."""
    if len(x.options) < 2:
        raise RewardError("contrastive rewards need multiple-choice questions (a task with `choices`)")
    if per not in ("answer", "character"):
        raise RewardError(f"per is {per!r}; it can be answer or character")
    return [o.logprob / (max(1, o.characters) if per == "character" else 1) for o in x.options]


# --- of the base model's own answer ---


def binary(x: RewardInputs) -> float:
    """1 if the base model's own answer is right, else 0: the baseline that likelihood rewards are compared with."""
    if x.correct is None:
        raise RewardError("binary needs to know which answers are right, and the judge was not asked")
    return float(x.correct)


def judge_soft(x: RewardInputs) -> float:
    """How well the base model's own answer agrees with the right one, by a judge's number: in [0, 1]."""
    if x.judged is None:
        raise RewardError("judge_soft needs a judge's number for every answer, and none was asked")
    return x.judged


def soft_numeric(x: RewardInputs, tolerance: float = 0.1) -> float:
    """exp(-|a - g| / (tolerance * max(1, |g|))) for the answered number a and the gold number g, in [0, 1].

    A greedy answer without a number is worth 0: the model did answer, only not with a number. A gold answer without
    one is an error: this reward does not fit the data set.
    """
    if tolerance <= 0:
        raise RewardError(f"tolerance is {tolerance!r}; it must be above 0")
    if x.gold_number is None:
        raise RewardError("soft_numeric needs gold answers that are numbers")
    if x.answered_number is None:
        return 0.0
    distance = abs(x.answered_number - x.gold_number) / (tolerance * max(1.0, abs(x.gold_number)))
    return math.exp(-min(distance, 700.0))


# --- safeguards: of the trace's text, to gate or to subtract; see `context_rl.rewards.safeguards` ---


def well_formed(x: RewardInputs) -> float:
    """1 if the trace is not empty, was ended by q itself and keeps to its part of the template, else 0."""
    return float(safeguards.well_formed(x.trace, x.finished))


def length_band(x: RewardInputs, low: float = 4, high: float = 1024, soft: float = 0) -> float:
    """1 for traces of `low` to `high` tokens, falling to 0 over `soft` tokens outside, in [0, 1]."""
    return safeguards.length_band(x.trace_tokens, low, high, soft)


def repetition(x: RewardInputs) -> float:
    """Share of the trace's word 4-grams that stood there before, in [0, 1]."""
    return safeguards.repetition(x.trace)


def copied(x: RewardInputs) -> float:
    """Share of the trace's word 4-grams that stand in the question, in [0, 1]."""
    return safeguards.copied(x.trace, x.question)


def leak(x: RewardInputs) -> float:
    """1 if the trace states the answer (after normalisation), else 0. A derived answer is a leak too: look at where."""
    return float(x.leak.normalised or x.leak.exact)


def early_leak(x: RewardInputs, share: float = 0.25) -> float:
    """1 if the trace states the answer within its first `share`, else 0: guessing first, reasoning later."""
    if not 0 <= share <= 1:
        raise RewardError(f"share is {share!r}; it must lie in [0, 1]")
    return float(x.leak.position is not None and x.leak.position < share)


@dataclass(frozen=True)
class Formula:
    """A formula, the interval of its values, and what it reads that a judge may have to be asked for."""

    function: Callable[..., float]
    low: float
    high: float
    family: str
    reads: str | None = None


INF = math.inf
FORMULAS: dict[str, Formula] = {
    "logprob_sum": Formula(logprob_sum, -INF, 0, "absolute"),
    "logprob_mean": Formula(logprob_mean, -INF, 0, "absolute"),
    "probability": Formula(probability, 0, 1, "absolute"),
    "geometric_probability": Formula(geometric_probability, 0, 1, "absolute"),
    "mean_probability": Formula(mean_probability, 0, 1, "absolute"),
    "negative_perplexity": Formula(negative_perplexity, -1e6, -1, "absolute"),
    "logprob_mean_min": Formula(logprob_mean_min, -INF, 0, "absolute"),
    "gain": Formula(gain, -INF, INF, "relative"),
    "probability_gain": Formula(probability_gain, -1, 1, "relative"),
    "perplexity_improvement": Formula(perplexity_improvement, -100, 1, "relative"),
    "option_probability": Formula(option_probability, 0, 1, "contrastive"),
    "option_margin": Formula(option_margin, -INF, INF, "contrastive"),
    "binary": Formula(binary, 0, 1, "baseline", "correct"),
    "judge_soft": Formula(judge_soft, 0, 1, "baseline", "judged"),
    "soft_numeric": Formula(soft_numeric, 0, 1, "baseline"),
    "well_formed": Formula(well_formed, 0, 1, "safeguard"),
    "length_band": Formula(length_band, 0, 1, "safeguard"),
    "repetition": Formula(repetition, 0, 1, "safeguard"),
    "copied": Formula(copied, 0, 1, "safeguard"),
    "leak": Formula(leak, 0, 1, "safeguard"),
    "early_leak": Formula(early_leak, 0, 1, "safeguard"),
}
