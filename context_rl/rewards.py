"""The reward formulas: pure functions of what the frozen base model said about one trace.

Notation: l_t = log p_base(y_t | question, trace, y_<t) in nats, one value an answer token, T tokens; l0_t the same
without the trace. Every formula grows as the right answer becomes likelier, so log p itself is the reward: -log p, as
papers that speak of a "negative log-likelihood reward" write it, is the cost.

A formula takes `RewardInputs` and its own parameters by name, and returns a finite float or raises. To add one, write
it here and put it into `REWARDS`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class RewardInputs:
    """What is known of one (question, trace) pair when it is rewarded."""

    token_logprobs: tuple[float, ...]
    """l_t: nats, one a token of the answer (and of the line end that closes it)."""
    baseline_logprobs: tuple[float, ...]
    """l0_t: the same tokens without a trace."""
    correct: bool
    """Whether the base model's own greedy answer, given the trace, is right by the task's grader."""
    answered_number: float | None
    """The number in that greedy answer, None if it holds none."""
    gold_number: float | None
    """The number in the gold answer, None if it is not one."""


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# --- absolute ---


def logprob_sum(x: RewardInputs) -> float:
    """sum_t l_t, in (-inf, 0]. LaTRO (Chen et al. 2024)."""
    return math.fsum(x.token_logprobs)


def logprob_mean(x: RewardInputs) -> float:
    """(1/T) sum_t l_t, in (-inf, 0]: log of the geometric mean probability; does not favour short answers."""
    return mean(x.token_logprobs)


def probability(x: RewardInputs) -> float:
    """exp(sum_t l_t), in [0, 1]: the chance that the base model gives exactly this answer.

    VeriFree (Zhou et al. 2025).
    """
    return math.exp(math.fsum(x.token_logprobs))


# --- relative to no trace ---


def gain(x: RewardInputs) -> float:
    """mean_t l_t - mean_t l0_t, nats a token: how much the trace helps.

    Under GRPO's group scaling this is `logprob_mean`: the baseline is the same for all traces of a question and drops
    out of the advantage. It differs under `scale_rewards: batch` and inside `threshold` or `hybrid`.
    """
    return mean(x.token_logprobs) - mean(x.baseline_logprobs)


def probability_gain(x: RewardInputs) -> float:
    """exp(sum_t l_t) - exp(sum_t l0_t), in [-1, 1]. Under group scaling the same as `probability` (see `gain`)."""
    return math.exp(math.fsum(x.token_logprobs)) - math.exp(math.fsum(x.baseline_logprobs))


def perplexity_improvement(x: RewardInputs) -> float:
    """Relative fall of the answer's perplexity, (PPL0 - PPL) / PPL0 = 1 - exp(-gain), in (-inf, 1).

    VR-CLI (Gurung and Lapata 2025) in per cent; here as a share. Clipped at -100, where nothing helpful is left to
    tell apart, so that it stays finite.
    """
    return 1.0 - math.exp(min(-gain(x), math.log(101.0)))


# --- thresholded ---


def threshold(x: RewardInputs, tau: float = 0.5) -> float:
    """1 if the relative fall of perplexity reaches `tau`, else 0. One step of VR-CLI's tiers.

    VR-CLI's own steps (0.0005, 0.01, 0.02) were set for chapters of a novel. A short answer's perplexity moves by tens
    of per cent, so they would pay every useful trace the same.
    """
    return float(perplexity_improvement(x) >= tau)


def sigmoid_threshold(x: RewardInputs, tau: float = 0.5, width: float = 0.1) -> float:
    """sigmoid((I - tau) / width) of the same improvement I, in [0, 1]: a threshold with a slope."""
    z = max(-700.0, min(700.0, (perplexity_improvement(x) - tau) / width))
    return 1.0 / (1.0 + math.exp(-z))


# --- graded ---


def binary(x: RewardInputs) -> float:
    """1 if the base model's greedy answer is right, else 0: the baseline that likelihood rewards are compared with."""
    return float(x.correct)


def soft_numeric(x: RewardInputs, tolerance: float = 0.1) -> float:
    """exp(-|a - g| / (tolerance * max(1, |g|))) for the answered number a and the gold number g, in [0, 1].

    A greedy answer without a number is worth 0: the model did answer, only not with a number. A gold answer without
    one is an error: this reward does not fit the data set.
    """
    if x.gold_number is None:
        raise RewardError("soft_numeric needs gold answers that are numbers")
    if x.answered_number is None:
        return 0.0
    distance = abs(x.answered_number - x.gold_number) / (tolerance * max(1.0, abs(x.gold_number)))
    return math.exp(-min(distance, 700.0))


# --- hybrid ---


def hybrid(x: RewardInputs, **weights: float) -> float:
    """Weighted sum of other formulas with their default parameters, e.g. {probability: 0.5, binary: 0.5}."""
    return math.fsum(weight * REWARDS[name](x) for name, weight in (weights or HYBRID_DEFAULT).items())


HYBRID_DEFAULT = {"probability": 0.5, "binary": 0.5}

REWARDS: dict[str, Callable[..., float]] = {
    "logprob_sum": logprob_sum,
    "logprob_mean": logprob_mean,
    "probability": probability,
    "gain": gain,
    "probability_gain": probability_gain,
    "perplexity_improvement": perplexity_improvement,
    "threshold": threshold,
    "sigmoid_threshold": sigmoid_threshold,
    "binary": binary,
    "soft_numeric": soft_numeric,
    "hybrid": hybrid,
}


class RewardError(ValueError):
    """A reward that does not exist, does not take a parameter, or does not fit the data."""


def make_reward(name: str, params: dict[str, Any] | None = None) -> Callable[[RewardInputs], float]:
    """The formula `name` with its parameters bound.

    Raises:
        RewardError: no such formula, no such parameter, or a parameter that is no number; the message lists those
            that exist.
    """
    params = params or {}
    if name not in REWARDS:
        raise RewardError(f"no reward is called {name!r}; there are: {', '.join(REWARDS)}")
    if name == "hybrid":
        known = [other for other in REWARDS if other != "hybrid"]
    else:
        known = list(inspect.signature(REWARDS[name]).parameters)[1:]
    for key, value in params.items():
        if key not in known:
            raise RewardError(f"reward {name!r} takes no {key!r}; it takes: {', '.join(known) or 'no parameters'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardError(f"reward {name!r}: {key} must be a finite number, not {value!r}")
        if key in ("width", "tolerance") and value <= 0:
            raise RewardError(f"reward {name!r}: {key} must be above 0, not {value!r}")
    return partial(REWARDS[name], **params)


def all_rewards(x: RewardInputs) -> dict[str, float | None]:
    """Every formula with its default parameters; None where one does not fit (a numeric reward of a textual answer)."""
    values: dict[str, float | None] = {}
    for name, formula in REWARDS.items():
        try:
            values[name] = formula(x)
        except RewardError:
            values[name] = None
    return values


# --- what GRPO makes of them ---


def grpo_advantages(rewards: Sequence[float | None], group_size: int, scale: str = "group") -> list[float]:
    """Advantages as TRL 1.16's GRPOTrainer computes them from one reward function (sum_then_normalize).

    Args:
        rewards: one a row, groups of `group_size` one after the other; None or NaN marks an unscored row.
        scale: "group": (r - mean) / (std + 1e-4) in the group; "batch": with the batch's std; "none": r - mean.

    Returns:
        One advantage a row; 0.0 for unscored rows, which count in no mean and no standard deviation.
    """
    values = [math.nan if r is None else float(r) for r in rewards]
    if len(values) % group_size:
        raise ValueError(f"{len(values)} rewards are no whole number of groups of {group_size}")
    batch_std = std(values)
    advantages = []
    for start in range(0, len(values), group_size):
        group = values[start : start + group_size]
        scored = [v for v in group if not math.isnan(v)]
        centre = mean(scored) if scored else math.nan
        divisor = {"group": std(group) + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
        advantages += [0.0 if math.isnan(v) else (v - centre) / divisor for v in group]
    return advantages


def std(values: Sequence[float]) -> float:
    """Sample standard deviation of the values that are not NaN; 0.0 for fewer than two."""
    known = [v for v in values if not math.isnan(v)]
    if len(known) < 2:
        return 0.0
    centre = mean(known)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in known) / (len(known) - 1))
