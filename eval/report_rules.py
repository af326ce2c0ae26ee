"""The report's judgements, each a stated rule on numbers: collapses, reward against accuracy, and the recommendation.

Pure functions of numbers; `RULES` says in words what they do, with the same constants.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import holm, student_p

LOW_ENTROPY = 0.05
"""Nats a token, mean of the last steps; with short traces as well, the context model has gone silent."""
SHORT_TRACE = 3.0
"""Tokens, mean of the last steps."""
LAST_STEPS = 5
MARGIN = 0.02
"""Mean accuracy that may be given up for a simpler, cheaper or faster arm which is not told from the best."""
SEEDS_NEEDED = 3
ALPHA = 0.05
FEWEST_STEPS = 8
"""Logged steps below which no slope is judged."""

RULES = {
    "collapse": (
        f"A run counts as collapsed if at its end (mean of the last {LAST_STEPS} logged steps) the entropy is below "
        f"{LOW_ENTROPY} nats a token and its traces are shorter than {SHORT_TRACE:g} tokens; or if its held-out "
        "accuracy at T = 1 is below that of no trace, or of the untrained model's traces, and the 95 % interval of the "
        "paired difference leaves 0 out."
    ),
    "reward_accuracy": (
        "A run is flagged if, over the last third of its logged steps or over all of them, the reward rises while the "
        "accuracy of the sampled traces falls: least-squares slopes, the reward's above 0 and the accuracy's below 0, "
        f"each with a one-sided p below {ALPHA} (t test, steps taken as independent, at least {FEWEST_STEPS} steps)."
    ),
    "recommendation": (
        f"Arms with fewer than {SEEDS_NEEDED} finished seeds are not considered; arms that collapsed in any seed are "
        "dropped. Of the rest the best has the highest mean held-out accuracy at T = 1; arms that the paired "
        "comparison (Holm's p below 0.05 over all pairs, and an interval without 0) does not tell from it are its "
        f"equals. Among equals within {100 * MARGIN:g} points of the best mean (a wide interval is no reason to give "
        "up more) the one that takes the fewest steps to the target accuracy is preferred if it is faster "
        "than each other over seeds (paired t test, Holm's p below 0.05); else the one with the simplest reward "
        "(fewest names and numbers in its specification), then the highest mean. Seconds decide nothing: where several "
        "runs share a machine they tell of the neighbours."
    ),
}


# --- one run ---


def collapse_reasons(
    entropy: float | None,
    tokens: float | None,
    against_none: tuple[float, float] | None,
    against_untrained: tuple[float, float] | None,
) -> list[str]:
    """Why a run counts as collapsed; empty if it does not, or if nothing is known.

    Args:
        entropy, tokens: means of the last steps.
        against_none, against_untrained: 95 % interval of the trained traces' accuracy minus the other's.
    """
    reasons = []
    if entropy is not None and tokens is not None and entropy < LOW_ENTROPY and tokens < SHORT_TRACE:
        reasons.append(f"silent: entropy {entropy:.3f} with traces of {tokens:.1f} tokens")
    for ci, label in ((against_none, "no trace"), (against_untrained, "the untrained model")):
        if ci is not None and ci[1] < 0:
            reasons.append(f"below {label} by {-100 * ci[1]:.1f} to {-100 * ci[0]:.1f} points")
    return reasons


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float] | None:
    """(Least-squares slope a step, its one-sided p in the direction of its sign); None for too few steps."""
    known = ~(np.isnan(steps) | np.isnan(values))
    x, y = steps[known], values[known]
    if len(x) < FEWEST_STEPS or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    b = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - b * centred
    error = math.sqrt(float(rest @ rest) / (len(x) - 2) / float(centred @ centred))
    if error <= 1e-12 * abs(b) or b == 0:
        return b, 0.0 if b else 1.0
    return b, student_p(b / error, len(x) - 2) / 2


def reward_up_accuracy_down(steps: np.ndarray, reward: np.ndarray, accuracy: np.ndarray) -> str | None:
    """ "last third", "whole run", "no", or None where there are too few steps; see `RULES`."""
    third = len(steps) - len(steps) // 3
    judged = None
    for name, part in (("last third", slice(third, None)), ("whole run", slice(None))):
        up, down = slope(steps[part], reward[part]), slope(steps[part], accuracy[part])
        if up is None or down is None:
            continue
        judged = "no"
        if up[0] > 0 > down[0] and max(up[1], down[1]) < ALPHA:
            return name
    return judged


# --- the recommendation ---


def p_text(p: float) -> str:
    """A p-value as far as a t test's assumptions carry."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True)
class ArmFacts:
    """What the recommendation rests on.

    Attributes:
        seeds: finished runs; unfinished: those that stopped early or failed.
        accuracy: mean held-out accuracy at T = 1, None where it is not known; ci: its interval.
        collapsed: one line a collapsed run.
        steps: seed -> steps to the target accuracy, None where it was not reached.
        parts: names and numbers in the reward's specification.
    """

    name: str
    seeds: int
    accuracy: float | None
    ci: tuple[float, float] | None = None
    collapsed: tuple[str, ...] = ()
    steps: Mapping[object, float | None] | None = None
    parts: int = 1
    unfinished: int = 0


@dataclass(frozen=True)
class Pair:
    """Accuracy at T = 1 of arm a minus arm b; `shown` says that they are told apart."""

    a: str
    b: str
    difference: float
    ci: tuple[float, float]
    p_holm: float
    smallest: float | None
    shown: bool


@dataclass(frozen=True)
class Recommendation:
    """`choice` is the arm to take, None where there is no recommendation; `equals` are those not told from the best."""

    choice: str | None
    equals: tuple[str, ...]
    lines: tuple[str, ...]


def recommend(arms: Sequence[ArmFacts], pairs: Sequence[Pair]) -> Recommendation:
    """Rules, in order: see `RULES["recommendation"]`."""
    lines: list[str] = []
    enough = [arm for arm in arms if arm.seeds >= SEEDS_NEEDED and arm.accuracy is not None]
    few = [f"{arm.name} ({arm.seeds})" for arm in arms if arm.seeds < SEEDS_NEEDED]
    unknown = [arm.name for arm in arms if arm.seeds >= SEEDS_NEEDED and arm.accuracy is None]
    if len(enough) < 2:
        why = f"No recommendation: one needs at least {SEEDS_NEEDED} seeds an arm, and two such arms. "
        counts = sorted({arm.seeds for arm in arms})
        have = " or ".join(map(str, counts)) or "no"
        lines.append(
            why
            + f"Here {len(arms)} arm{'s' * (len(arms) != 1)} with {have} finished "
            f"seed{'s' * (counts != [1])} {'each' if len(counts) == 1 < len(arms) else ''}".rstrip()
            + "."
        )
        return Recommendation(None, (), tuple(lines))
    if few:
        lines.append(f"Not considered, with fewer than {SEEDS_NEEDED} finished seeds: {', '.join(few)}.")
    if unknown:
        lines.append(f"Not considered, without a held-out accuracy: {', '.join(unknown)}.")
    lines += [f"Dropped, as it collapsed: {arm.name} ({'; '.join(arm.collapsed)})." for arm in enough if arm.collapsed]
    alive = [arm for arm in enough if not arm.collapsed]
    if not alive:
        return Recommendation(None, (), ("No recommendation: every arm collapsed in some seed.", *lines))
    best = max(alive, key=lambda arm: arm.accuracy)
    found = {arm.name: pair_of(pairs, best.name, arm.name) for arm in alive if arm is not best}
    compared = {name: pair for name, pair in found.items() if pair is not None}
    missing = [name for name, pair in found.items() if pair is None]
    if missing:
        lines.append(
            f"Not compared with {best.name}, for want of held-out rows of the same seeds: {', '.join(missing)}."
        )
    if found and not compared:
        return Recommendation(None, (), ("No recommendation: the arms could not be compared item by item.", *lines))
    equals = [best, *(arm for arm in alive if arm.name in compared and not compared[arm.name].shown)]
    worse = [arm for arm in alive if arm.name in compared and compared[arm.name].shown]
    choice, why = choose([arm for arm in equals if best.accuracy - arm.accuracy <= MARGIN], best)
    head = [f"Take {choice.name}: {why}", f"Highest accuracy at T = 1: {best.name}, {share(best)}."]
    for arm in equals[1:]:
        head.append(f"Not separable from it with {seeds_text(arm, best)}: {arm.name}, {gap(compared[arm.name])}.")
    if worse:
        head.append("Shown to be worse: " + "; ".join(f"{arm.name}, {gap(compared[arm.name])}" for arm in worse) + ".")
    lines += [
        f"{arm.name}: {arm.unfinished} of {arm.unfinished + arm.seeds} runs did not finish, which may hide collapses."
        for arm in alive
        if arm.unfinished
    ]
    return Recommendation(choice.name, tuple(arm.name for arm in equals), (*head, *lines))


def choose(equals: Sequence[ArmFacts], best: ArmFacts) -> tuple[ArmFacts, str]:
    """(The arm to take among equals, why)."""
    if len(equals) == 1:
        return best, f"every other arm is shown to be worse, or lies more than {100 * MARGIN:g} points below."
    speeds = [(arm, mean_steps(arm)) for arm in equals]
    known = [(arm, steps) for arm, steps in speeds if steps is not None]
    if known:
        fastest, steps = min(known, key=lambda pair: pair[1])
        tests = [faster(fastest, arm) for arm in equals if arm is not fastest]
        if all(test is not None and test[0] < 0 for test in tests):
            p = max(holm([test[1] for test in tests]))
            if p < ALPHA:
                others = ", ".join(f"{arm.name} {mean_steps(arm):.0f}" for arm in equals if arm is not fastest)
                return fastest, (
                    f"its accuracy is not told from the best, and it is the fastest: {steps:.0f} steps to the target "
                    f"against {others} (Holm's p at most {p_text(p)})."
                )

    def order(arm: ArmFacts) -> tuple[float, ...]:
        return arm.parts, -arm.accuracy

    simplest = min(equals, key=order)
    alone = sum(arm.parts == simplest.parts for arm in equals) == 1
    return simplest, (
        f"{'the simplest reward' if alone else 'the best of the simplest rewards'} among {len(equals)} arms "
        f"within {100 * MARGIN:g} points of the best that neither accuracy nor speed tells apart with these seeds, "
        "which is no proof that they are equal."
    )


def mean_steps(arm: ArmFacts) -> float | None:
    """Mean steps to the target; None where a seed did not reach it."""
    steps = list((arm.steps or {}).values())
    return None if not steps or any(value is None for value in steps) else sum(steps) / len(steps)


def faster(arm: ArmFacts, other: ArmFacts) -> tuple[float, float] | None:
    """(Mean difference in steps to the target, two-sided p) over seeds that both have; None without two such seeds.

    Steps are whole, so the variance of a difference is at least that of two roundings, 1/6: three equal differences
    are no proof.
    """
    mine, theirs = arm.steps or {}, other.steps or {}
    common = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    if len(common) < 2 or any(value is None for pair in common for value in pair):
        return None
    d = np.array([a - b for a, b in common], dtype=float)
    error = math.sqrt(max(float(d.var(ddof=1)), 1 / 6) / len(d))
    return float(d.mean()), student_p(float(d.mean()) / error, len(d) - 1)


def pair_of(pairs: Sequence[Pair], a: str, b: str) -> Pair | None:
    """The pair seen from a, whichever way round it is stored."""
    for pair in pairs:
        if (pair.a, pair.b) == (a, b):
            return pair
        if (pair.a, pair.b) == (b, a):
            ci = (-pair.ci[1], -pair.ci[0])
            return Pair(a, b, -pair.difference, ci, pair.p_holm, pair.smallest, pair.shown)
    return None


# --- words ---


def share(arm: ArmFacts) -> str:
    text = f"{100 * arm.accuracy:.1f} %"
    return text if arm.ci is None else text + f" [{100 * arm.ci[0]:.1f}, {100 * arm.ci[1]:.1f}]"


def gap(pair: Pair) -> str:
    """How far below the best, with what would have been seen."""
    low, high = (-100 * value for value in reversed(pair.ci))
    text = f"{-100 * pair.difference:+.1f} points [{low:+.1f}, {high:+.1f}], Holm's p {p_text(pair.p_holm)}"
    if pair.shown or pair.smallest is None:
        return text
    return text + f"; {100 * pair.smallest:.1f} points would have been seen"


def seeds_text(arm: ArmFacts, other: ArmFacts) -> str:
    return f"{min(arm.seeds, other.seeds)} seeds"
