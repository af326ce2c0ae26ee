"""The report's numbers: of runs grouped into arms, everything that its tables, pictures and rules are made of.

Arms are compared within a block: the same task and the same held-out questions. None stands for what is not known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from eval.metrics import mean_of, seeds_mean, student_quantile
from eval.report_arms import Arm, parts_of
from eval.report_examples import Examples, examples
from eval.report_pairs import Compared, compare_arms, matrix, pairs_of, with_rows
from eval.report_rules import (
    LAST_STEPS,
    ArmFacts,
    Recommendation,
    collapse_reasons,
    recommend,
    reward_up_accuracy_down,
    slope,
)
from eval.report_runs import FINISHED, Run

TO_TARGET = 0.9
"""The default target lies this far on the way from untrained to the best arm's end."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval; `how` says what the interval is over, and is empty where there is none."""

    value: float
    ci: tuple[float, float] | None
    how: str


BOTH, SEEDS_ONLY, ONE_SEED = "seeds and questions", "seeds", "one seed: questions"


@dataclass
class RunFacts:
    """What the rules say of a run, and what they rest on."""

    run: Run
    arm: str
    accuracy: float | None
    greedy: float | None
    reached: tuple[float, float | None] | None
    collapsed: list[str]
    reward_slope: float | None
    accuracy_slope: float | None
    parted: str | None


@dataclass
class ArmNumbers:
    """An arm's row in every table."""

    arm: Arm
    accuracy: Estimate | None
    greedy: Estimate | None
    logprob: Estimate | None
    gain: Estimate | None
    none: float | None
    no_spread_first: float | None
    no_spread: float | None
    ends: dict[str, tuple[float | None, float | None]]
    seconds: float | None
    scoring_share: float | None
    runs: list[RunFacts] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.arm.name


@dataclass
class Block:
    """Arms on the same task and held-out questions, the most accurate first."""

    task: str
    arms: list[ArmNumbers]
    target: float | None
    untrained: float | None
    comparisons: dict[str, list[Compared]]
    recommendation: Recommendation
    examples: Examples


def blocks_of(arms: Sequence[Arm], target: float | None = None) -> list[Block]:
    """One block for each task and set of held-out questions."""
    groups: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        groups.setdefault((str(arm.config.get("task")), str(arm.config.get("held-out questions"))), []).append(arm)
    return [block_of(task, members, target) for (task, _), members in groups.items()]


def block_of(task: str, arms: Sequence[Arm], target: float | None) -> Block:
    start, aim = target_accuracy(arms) if target is None else (None, target)
    numbers = [arm_numbers(arm, aim) for arm in arms]
    numbers.sort(key=lambda n: (n.accuracy is None, -(n.accuracy.value if n.accuracy else 0), n.name))
    comparisons = {decoding: compare_arms([n.arm for n in numbers], decoding) for decoding in ("sampled", "greedy")}
    return Block(
        task,
        numbers,
        aim,
        start,
        comparisons,
        recommend([facts_of(n) for n in numbers], pairs_of(comparisons["sampled"])),
        examples([n.arm for n in numbers]),
    )


# --- curves ---


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the known ones of the last `window` values, fewer at the beginning; NaN where none is known."""
    known = ~np.isnan(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(1, len(values) + 1)
    before = np.maximum(0, at - window)
    n = counts[at] - counts[before]
    return np.where(n > 0, (totals[at] - totals[before]) / np.maximum(1, n), np.nan)


def smooth(run: Run, name: str) -> np.ndarray:
    """A curve of `METRICS` as a running mean over `run.window` logged steps."""
    return running_mean(run.curves[name], run.window)


def ends_of(run: Run, name: str) -> tuple[float | None, float | None]:
    """Means of a curve over the first and the last logged steps."""
    values = run.curves.get(name, np.array([]))
    return mean_of(values[:LAST_STEPS]), mean_of(values[-LAST_STEPS:])


def target_accuracy(arms: Sequence[Arm]) -> tuple[float | None, float | None]:
    """(Untrained accuracy, target): of sampled training traces, so that both are points of the same curves.

    Untrained is the mean over runs of the first logged step; the end is the highest arm's mean of its last smoothed
    values. No target where nothing was logged or no arm rose.
    """
    starts = [run.curves["accuracy"][0] for arm in arms for run in arm.runs if len(run.steps)]
    finals = [mean_of([smooth(run, "accuracy")[-1] for run in arm.finished if len(run.steps)]) for arm in arms]
    start, best = mean_of(starts), max((value for value in finals if value is not None), default=None)
    if start is None or best is None or best <= start:
        return start, None
    return start, start + TO_TARGET * (best - start)


def reached(run: Run, target: float | None) -> tuple[float, float | None] | None:
    """(Step, training seconds) at which the smoothed accuracy, over a full window, first is at the target.

    Seconds are None where a step before has none.
    """
    if target is None or not len(run.steps):
        return None
    values, window = smooth(run, "accuracy"), run.window
    at = [i for i in range(window - 1, len(values)) if values[i] >= target - 1e-12]
    if not at:
        return None
    seconds = float(run.curves["seconds"][: at[0] + 1].sum())
    return float(run.steps[at[0]]), None if math.isnan(seconds) else seconds


# --- runs and arms ---


def run_facts(run: Run, arm: str, target: float | None) -> RunFacts:
    """See `RULES`; differences are those of result.json."""
    differences = run.result.get("differences") or {}
    none, untrained = ((differences.get(f"trained_minus_{other}") or {}).get("ci") for other in ("none", "untrained"))
    third = slice(len(run.steps) - len(run.steps) // 3, None)
    slopes = [
        slope(run.steps[third], run.curves[name][third]) if run.curves else None for name in ("reward", "accuracy")
    ]
    parted = reward_up_accuracy_down(run.steps, run.curves["reward"], run.curves["accuracy"]) if run.curves else None
    return RunFacts(
        run,
        arm,
        run.summary("trained", "sampled").get("accuracy"),
        run.summary("trained", "greedy").get("accuracy"),
        reached(run, target),
        collapse_reasons(ends_of(run, "entropy")[1], ends_of(run, "tokens")[1], none, untrained),
        slopes[0] and slopes[0][0],
        slopes[1] and slopes[1][0],
        parted,
    )


def arm_numbers(arm: Arm, target: float | None) -> ArmNumbers:
    """All of an arm; means are over its finished runs."""
    finished = arm.finished
    both_ends = {
        name: tuple(mean_of(values) for values in zip(*(ends_of(run, name) for run in finished), strict=True))
        or (None, None)
        for name in ("entropy", "tokens", "leak", "reward")
    }
    return ArmNumbers(
        arm,
        final(arm, "correct", "sampled"),
        final(arm, "correct", "greedy"),
        final(arm, "logprob", "sampled"),
        gain(arm),
        mean_of([run.summary("none", "greedy").get("accuracy") for run in arm.runs]),
        mean_of([run.result.get("no_spread_share_first_20") for run in finished]),
        mean_of([run.result.get("no_spread_share") for run in finished]),
        both_ends,
        mean_of([run.result.get("seconds") for run in finished]),
        mean_of([run.result.get("scoring_share") for run in finished]),
        [run_facts(run, arm.name, target) for run in arm.runs],
    )


def final(arm: Arm, key: str, decoding: str) -> Estimate | None:
    """The arm's held-out accuracy or mean log p after training, from the items where all its runs have them."""
    finished = arm.finished
    if len(finished) >= 2 and len(with_rows(finished, ("trained", decoding))) == len(finished):
        _, values = matrix(finished, key, decoding)
        estimate = over_seeds(values)
        if estimate is not None:
            return clipped(estimate) if key == "correct" else estimate
    name = {"correct": "accuracy", "logprob": "mean_logprob"}[key]
    summaries = [run.summary("trained", decoding) for run in finished]
    return over_runs([s.get(name) for s in summaries], [s.get(f"{name}_ci") for s in summaries], key == "correct")


def gain(arm: Arm) -> Estimate | None:
    """Accuracy at T = 1 with trained traces minus without a trace, paired by item."""
    finished, wanted = arm.finished, (("trained", "sampled"), ("none", "sampled"))
    if len(finished) >= 2 and len(with_rows(finished, *wanted)) == len(finished):
        differences = []
        for run in finished:
            items, pair = both(run.rows[wanted[0]], run.rows[wanted[1]])
            differences.append(dict(zip(items, pair[0] - pair[1], strict=True)))
        items = list(dict.fromkeys(item for d in differences for item in d))
        estimate = over_seeds(np.array([[d.get(item, math.nan) for item in items] for d in differences]))
        if estimate is not None:
            return estimate
    found = [(run.result.get("differences") or {}).get("trained_minus_none") or {} for run in finished]
    return over_runs([d.get("difference") for d in found], [d.get("ci") for d in found], False)


def both(left: Any, right: Any) -> tuple[list[str], np.ndarray]:
    """(Items, their right or wrong in the one table and in the other)."""
    other = dict(zip(right.ids, right.correct, strict=True))
    items = [item for item in left.ids if item in other]
    mine = dict(zip(left.ids, left.correct, strict=True))
    return items, np.array([[mine[item] for item in items], [other[item] for item in items]])


def over_seeds(values: np.ndarray) -> Estimate | None:
    """`seeds_mean` with its interval; None where it cannot be had, or where nothing varies, which proves nothing."""
    if np.isnan(values).all(1).any() or values.shape[1] < 2:
        return None
    found = seeds_mean(values)
    return Estimate(found.mean, found.ci, BOTH) if found.error > 0 else None


def over_runs(values: Sequence[float | None], cis: Sequence[Any], proportion: bool) -> Estimate | None:
    """From result.json alone: a t interval over seeds, or the one run's own interval over questions."""
    known = [(value, ci) for value, ci in zip(values, cis, strict=True) if value is not None]
    if not known:
        return None
    if len(known) == 1:
        return Estimate(known[0][0], tuple(known[0][1]) if known[0][1] else None, ONE_SEED if known[0][1] else "")
    data = np.array([value for value, _ in known])
    if np.ptp(data) == 0:  # runs that agree to the last item prove no more than one of them
        return Estimate(known[0][0], tuple(known[0][1]) if known[0][1] else None, ONE_SEED if known[0][1] else "")
    half = student_quantile(0.975, len(data) - 1) * float(data.std(ddof=1)) / math.sqrt(len(data))
    estimate = Estimate(float(data.mean()), (float(data.mean()) - half, float(data.mean()) + half), SEEDS_ONLY)
    return clipped(estimate) if proportion else estimate


def clipped(estimate: Estimate) -> Estimate:
    """A share's interval does not leave 0 to 1."""
    return estimate._replace(ci=(max(0.0, estimate.ci[0]), min(1.0, estimate.ci[1])))


# --- the recommendation ---


def facts_of(numbers: ArmNumbers) -> ArmFacts:
    """What the recommendation is told of an arm."""
    collapsed = [f"seed {f.run.seed_text} {', '.join(f.collapsed)}" for f in numbers.runs if f.collapsed]
    finished = [f for f in numbers.runs if f.run.status == FINISHED]
    return ArmFacts(
        numbers.name,
        len(finished),
        numbers.accuracy and numbers.accuracy.value,
        numbers.accuracy and numbers.accuracy.ci,
        tuple(collapsed),
        {f.run.seed: f.reached and f.reached[0] for f in finished},
        parts_of(numbers.arm.config.get("reward")),
        len(numbers.runs) - len(finished),
    )
