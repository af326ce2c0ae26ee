"""Which rewards can GRPO not tell apart? By their formulas, before anything is sampled; and on sampled traces.

TRL's advantage of a trace with reward r is (r - mean_g) / (s + 1e-4), where s is the standard deviation of its group
("group") or of the batch ("batch"), or r - mean_g ("none"). What all traces of a question add drops out of r - mean_g;
what multiplies them all drops out of z = (r - mean_g) / s. Hence five kinds of verdict, the closest first:

    identical   the same advantages to rounding: 1e-9 of the largest, and what rounding rewards of this size in double
                precision does to them. (TRL holds rewards in single precision: 6e-8 of their size.)
    epsilon     the same z, and A = z s / (s + e) with TRL's e = 1e-4: |A1 - A2| = |z| e |1/(s1 + e) - 1/(s2 + e)|, at
                most |z| e / min(s1, s2). On data the root mean square of A1 - A2 must stay below a tenth of the larger
                one's besides; where spreads are so small that it does not, the verdict is a later one
    factor      one positive factor for all advantages of a batch: a learning rate, which Adam all but removes
    order       the same ranking in every group, but other distances or other weights of the questions
    different   not even that
"""

import inspect
import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from context_rl.rewards.advantages import grpo_advantages, std
from context_rl.rewards.compose import COMBINATORS, HYBRID_DEFAULT, Reward, Spec
from context_rl.rewards.formulas import FORMULAS
from context_rl.rewards.inputs import RewardError, RewardInputs

KINDS = ("identical", "epsilon", "factor", "order", "different")
SCALES = ("group", "batch", "none")
EPSILON = 1e-4
"""What TRL adds to every standard deviation."""
LITTLE = 0.1
NO_SPREAD = 1e-6
"""A standard deviation beside which TRL's 1e-4 leaves a hundredth of a normal advantage."""
NEARLY_ALL = 0.99


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


# --- by argument: a reward as a sum of (what the question fixes) * (what differs between its traces) ---

Form = Mapping[tuple[str, Hashable], float]
"""(factor of the question, above 0; quantity of the trace) -> coefficient. All of them are names, not expressions; the
quantity "1" is a shift. A reward that is not taken apart is a quantity of its own."""

FORMS: dict[str, Form] = {
    "logprob_sum": {("1", "L"): 1.0},
    "logprob_mean": {("1/T", "L"): 1.0},
    "gain": {("1/T", "L"): 1.0, ("-m0", "1"): 1.0},
    "probability": {("1", "exp L"): 1.0},
    "probability_gain": {("1", "exp L"): 1.0, ("exp L0", "1"): -1.0},
    "geometric_probability": {("1", "exp m"): 1.0},
    "negative_perplexity": {("1", "-PPL"): 1.0},
    "perplexity_improvement": {("1/PPL0", "-PPL"): 1.0, ("1", "1"): 1.0},
}
RISE_WITH_L = ("L", "exp L", "exp m", "-PPL")
CUT = "; but perplexities above 1e6, or above 101 times that without a trace, are cut, and there they differ"


def by_argument(one: Spec, other: Spec, scale: str) -> Verdict | None:
    """What the formulas alone say of all data; None if that is nothing.

    Raises:
        RewardError: one of them is no reward.
        ValueError: TRL has no such scaling.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; it can be {', '.join(SCALES)}")
    for spec in (one, other):
        Reward(spec)  # refuses what is no reward, in words
    first, second = form(one), form(other)
    found = _argument(first, second, scale)
    cut = any(quantity in ("-PPL", ("masked", "-PPL")) for _, quantity in first.keys() ^ second.keys())
    return found and Verdict(found[0], found[1] + (CUT if cut else ""))


def _argument(one: Form, other: Form, scale: str) -> tuple[str, str] | None:
    """(kind, reason) from two sums."""
    mine, its = ({key: c for key, c in part.items() if key[1] != "1"} for part in (one, other))
    if times := multiple(mine, its):
        same = math.isclose(times, 1.0, rel_tol=1e-9)
        shared = "what all traces of a question share"
        what = f"the second is {times:.3g} times the first, up to {shared}"
        if same:
            what = f"they differ by {shared} at most"
        shifts = [{key: c for key, c in part.items() if key[1] == "1"} for part in (one, other)]
        spread_alike = not mine or not any(shifts) or math.isclose(multiple(*shifts) or 0.0, times, rel_tol=1e-9)
        if scale == "batch" and not spread_alike:
            return "factor", f"{what}; the std over the batch sees that, and makes one factor a batch of it"
        if same:
            return "identical", f"{what}, and the group's mean takes it away"
        if scale == "none":
            return "factor", f"{what}: another learning rate"
        return "epsilon", f"{what}; dividing by the std takes the factor away, but for TRL's 1e-4"
    quantities = {quantity for part in (mine, its) for _, quantity in part}
    signs = {math.copysign(1.0, coefficient) for part in (mine, its) for coefficient in part.values()}
    if not mine or not its or len(signs) > 1:
        return None
    if len(quantities) == 1 and scale == "group":
        return "epsilon", "each question has its factor between them; the group's std takes it away, but for TRL's 1e-4"
    if len(quantities) == 1:
        return "order", "each question has its factor between them, so that they weigh the questions differently"
    if len({_rises_with(quantity) for quantity in quantities}) == 1:
        return (
            "order",
            "for a given question one rises with the other: they rank a group alike and space it differently",
        )
    return None


def form(spec: Spec) -> Form:
    """A valid reward as a sum. Clips beyond its bounds are no clips; hybrids of sums are sums."""
    name, given = named(spec)
    if name in FORMS:
        return FORMS[name]
    if name == "logprob_mean_min":
        return added([(1.0, FORMS["logprob_mean"]), (given["weight"], {("1", "min l"): 1.0})])
    if name == "masked":
        return {(f, q if q == "1" else ("masked", q)): c for (f, q), c in form(given["of"]).items()}
    if name == "clip" and not _bites(given["of"], given["low"], given["high"]):
        return form(given["of"])
    if name == "hybrid":
        bare = {term: weight for term, weight in given.items() if term != "clip"}
        if given.get("clip") is None or not _bites({"hybrid": bare}, *given["clip"]):
            return added([(weight, form(term)) for term, weight in terms(bare)])
    return {("1", json.dumps([name, given], sort_keys=True, default=repr)): 1.0}


def added(parts: Sequence[tuple[float, Form]]) -> Form:
    """A weighted sum of sums. What cancels, to rounding, is left out."""
    found: dict[tuple[str, Hashable], list[float]] = {}
    for weight, part in parts:
        for key, coefficient in part.items():
            found.setdefault(key, []).append(weight * coefficient)
    return {k: math.fsum(cs) for k, cs in found.items() if abs(math.fsum(cs)) > 1e-12 * math.fsum(map(abs, cs))}


def multiple(one: Form, other: Form) -> float | None:
    """The k > 0 for which other = k * one, None if there is none. Two empty sums are 1 times each other."""
    ratios = [other.get(key, 0.0) / coefficient for key, coefficient in one.items()] or [1.0]
    alike = one.keys() == other.keys() and all(math.isclose(ratio, ratios[0], rel_tol=1e-9) for ratio in ratios)
    return ratios[0] if alike and ratios[0] > 0 else None


def _rises_with(quantity: Hashable) -> Hashable:
    """What a quantity is a strictly rising function of, the question given."""
    if isinstance(quantity, tuple) and quantity[0] == "masked":
        return "masked", _rises_with(quantity[1])
    return "L" if quantity in RISE_WITH_L else quantity


def _bites(spec: Spec, low: float, high: float) -> bool:
    """Whether a clip can change this reward, by its bounds."""
    reward = Reward(spec)
    return reward.low < low or high < reward.high


# --- specs ---


def named(spec: Spec) -> tuple[str, dict[str, Any]]:
    """A valid spec's name and all its parameters, the defaults filled in."""
    name, given = (spec, None) if isinstance(spec, str) else next(iter(spec.items()))
    if name == "hybrid":
        return name, dict(given or HYBRID_DEFAULT)
    known: Mapping[str, inspect.Parameter] = {}
    if name in COMBINATORS or name in FORMULAS:
        function = getattr(Reward, f"_{name}") if name in COMBINATORS else FORMULAS[name].function
        known = inspect.signature(function).parameters
    return name, {p.name: p.default for p in known.values() if p.default is not p.empty} | dict(given or {})


def terms(hybrid: Mapping[str, Any]) -> list[tuple[Spec, float]]:
    """The terms of a hybrid, without its clip: spec and weight."""
    full = {n: dict(g) if isinstance(g, Mapping) else {"weight": g} for n, g in hybrid.items() if n != "clip"}
    return [({n: {k: v for k, v in g.items() if k != "weight"}}, g["weight"]) for n, g in full.items()]


def nested(spec: Spec) -> Iterator[Spec]:
    """A reward and those that it is made of, but for masked ones: they see other log-probs."""
    yield spec
    name, given = named(spec)
    parts = [term for term, _ in terms(given)] if name == "hybrid" else []
    if name in COMBINATORS and name not in ("hybrid", "masked"):
        for of in (given[key] for key in ("of", "first", "gate") if key in given):
            parts += of if isinstance(of, list | tuple) else [of]
    for part in parts:
        yield from nested(part)


# --- on data ---


@dataclass(frozen=True)
class Seen:
    """One reward of the data, and what GRPO makes of it; arrays [groups, traces of a group].

    Attributes:
        rewards: NaN where unscored.
        advantages: 0 where unscored.
        z: the advantages without TRL's 1e-4; 0 without spread.
        slack, slack_z: what the last bits of the rewards can do to `advantages` and `z`.
        alone: the rewards hang neither on the group nor on the step.
    """

    rewards: np.ndarray
    advantages: np.ndarray
    z: np.ndarray
    slack: np.ndarray
    slack_z: np.ndarray
    alone: bool


def seen(spec: Spec, rows: Sequence[RewardInputs | None], group_size: int, scale: str) -> Seen:
    """A reward, built anew, of groups of `group_size` one after the other, as at the first step."""
    reward = Reward(spec)
    flat = reward(rows, [place // group_size for place in range(len(rows))])
    rewards, advantages = (
        np.array(values, float).reshape(-1, group_size) for values in (flat, grpo_advantages(flat, group_size, scale))
    )
    spreads = {"group": [std(list(group)) for group in rewards], "batch": std(list(rewards.flat)), "none": 1.0}[scale]
    s = np.broadcast_to(np.reshape(spreads, (-1, 1)), (len(rewards), 1))
    with_epsilon = s + (0.0 if scale == "none" else EPSILON)
    bits = 64 * np.finfo(float).eps * np.nan_to_num(abs(rewards)).max(1, keepdims=True)
    inverse = np.divide(1.0, s, out=np.zeros(s.shape), where=s > 0)
    z = advantages * with_epsilon * inverse
    return Seen(rewards, advantages, z, bits / with_epsilon, bits * inverse, reward.alone)


def on_data(one: Spec, other: Spec, rows: Sequence[RewardInputs | None], group_size: int, scale: str) -> Verdict:
    """What the advantages of these rows say: one batch, groups one after the other, None where unscored.

    Raises:
        RewardError: one of them is no reward, or does not fit the data.
    """
    return _compared(*(seen(spec, rows, group_size, scale) for spec in (one, other)), scale)


def _compared(one: Seen, other: Seen, scale: str) -> Verdict:
    a, b, slack = one.advantages, other.advantages, one.slack + other.slack
    gap, size = abs(a - b), float(max(abs(a).max(), abs(b).max()))
    slack = slack + 1e-9 * size
    same_z = scale != "none" and bool((abs(one.z - other.z) <= 1e-9 * size + one.slack_z + other.slack_z).all())
    factor, correlation = best_factor(a, b)
    if (gap <= slack).all():
        kind, what = "identical", "the same advantages" if size else "no trace has an advantage under either"
    elif same_z and rms(gap) <= LITTLE * max(rms(a), rms(b)):
        kind, what = "epsilon", "the same advantages but for TRL's 1e-4"
    elif factor > 0 and (abs(b - factor * a) <= slack * max(1.0, factor)).all():
        kind, what = "factor", "the same advantages up to one factor"
    elif _ranked_alike(one, other):
        kind, what = "order", "other advantages, the same ranking in every group"
    else:
        kind, what = "different", "other advantages"
    if same_z and kind in ("factor", "order"):
        what += ", for spreads are so small that TRL's 1e-4 counts"
    clash = (((a > slack) & (b < -slack)) | ((a < -slack) & (b > slack))).any(1).mean()
    start = "" if one.alone and other.alone else "; as at the first step"
    figures = f"correlation {correlation:.4f}, best common factor {factor:.4g}, signs differ in {clash:.0%} of groups"
    return Verdict(kind, f"{what} ({a.size} traces: {figures}{start})", float(gap.max()))


def best_factor(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The f for which f * a is closest to b, and the correlation of the two; 0 where one of them is all 0."""
    square = float((a * a).sum())
    product, norms = float((a * b).sum()), float(np.linalg.norm(a) * np.linalg.norm(b))
    return (product / square, product / norms) if norms else (0.0, 0.0)


def rms(values: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(values**2)))


def _ranked_alike(one: Seen, other: Seen) -> bool:
    """Traces that one reward tells apart, by over a millionth of the group, neither tie nor swap in the other."""
    rises = np.prod([np.sign(arm.rewards[:, :, None] - arm.rewards[:, None, :]) for arm in (one, other)], axis=0)
    for arm in (one, other):
        apart = abs(arm.advantages[:, :, None] - arm.advantages[:, None, :])
        least = np.maximum(1e-6 * apart.max((1, 2), keepdims=True), 1e-9 * apart.max())
        if ((apart > least + arm.slack[:, :, None]) & (rises <= 0)).any():
            return False
    return True


def compare_arms(
    arms: Mapping[str, Spec],
    scales: Sequence[str],
    rows: Sequence[RewardInputs | None] | None = None,
    group_size: int | None = None,
) -> list[tuple[str, str, str, Verdict]]:
    """(arm, arm, scale, verdict) of every pair that is not "different".

    With data, `largest` is theirs, and they decide where the formulas prove nothing. Where they say less than was
    proven (a cut, vanishing spreads, a wrong proof) their verdict stands, even "different", and its reason says so. An
    arm that does not fit the data is compared by argument only.
    """
    found = []
    for scale in scales:
        on_rows: dict[str, Seen] = {}
        for name, spec in arms.items() if rows and group_size else ():
            with suppress(RewardError):
                on_rows[name] = seen(spec, rows, group_size, scale)
        for one, other in combinations(arms, 2):
            argument = by_argument(arms[one], arms[other], scale)
            data = _compared(on_rows[one], on_rows[other], scale) if {one, other} <= on_rows.keys() else None
            verdict = _agreed(argument, data)
            if verdict:
                found.append((one, other, scale, verdict))
    return found


def _agreed(argument: Verdict | None, data: Verdict | None) -> Verdict | None:
    """The one verdict of both; None where neither finds anything in common."""
    if argument is None or data is None:
        return argument or (data if data and data.kind != "different" else None)
    if KINDS.index(data.kind) <= KINDS.index(argument.kind):
        return replace(argument, largest=data.largest)
    proven = f"the formulas say {argument.kind} ({argument.reason})"
    return replace(data, reason=f"data and formulas contradict each other: {data.reason}; {proven}")


def explain(verdicts: Sequence[tuple[str, str, str, Verdict]]) -> str:
    """A Markdown table of what `compare_arms` returned: arms with one verdict for one reason share a row.

    Two arms that stand together in several rows of a scale are as close as the first of them says.
    """
    rows: dict[tuple[int, int, str], list[tuple[set[str], list[float]]]] = {}
    scales = list(dict.fromkeys(scale for _, _, scale, _ in verdicts))
    for one, other, scale, verdict in verdicts:
        key = scales.index(scale), KINDS.index(verdict.kind), verdict.reason
        together, apart = ({one, other}, [verdict.largest or 0.0]), []
        for members in rows.get(key, []):
            if members[0] & together[0]:
                together = (members[0] | together[0], members[1] + together[1])
            else:
                apart.append(members)
        rows[key] = [*apart, together]
    with_data = any(verdict.largest is not None for *_, verdict in verdicts)
    lines = ["| scale | rewards | to GRPO | largest difference | why |", "|---|---|---|---|---|"]
    for (scale, kind, reason), classes in sorted(rows.items()):
        for names, largest in classes:
            figure = f"{max(largest):.2g}" if with_data else ""
            lines.append(f"| {scales[scale]} | {', '.join(sorted(names))} | {KINDS[kind]} | {figure} | {reason} |")
    return "\n".join(lines) + "\n"


# --- one reward by itself ---


def vanishing_parts(
    reward: Reward, rows: Sequence[RewardInputs | None], group_size: int, scale: str = "group", below: float = 0.02
) -> list[str]:
    """Warnings: thresholds that all reach or none, groups without spread, terms of a hybrid that change nothing.

    Args:
        reward: a run's; it is built anew here, so that its memory stays as it is.
        rows: groups of `group_size` one after the other, None where unscored.
        below: a term changes nothing if without it the advantages are, up to one factor, the same to this share of
            their root mean square.
    """
    groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
    rows = [x for group in groups if any(group) for x in group]
    if not rows:
        return []
    whole = seen(reward.spec, rows, group_size, scale)
    warnings = [_lame_threshold(spec, rows, group_size) for spec in nested(reward.spec)]
    share = np.mean([std(list(group)) <= NO_SPREAD for group in whole.rewards])
    if share > 0.5:
        warnings.append(
            f"{reward.name} has no spread in {share:.0%} of the groups (a std up to {NO_SPREAD:g}): little to learn"
        )
    name, given = named(reward.spec)
    if name == "hybrid" and whole.advantages.any():
        warnings += [_lame_term(term, given, whole, rows, scale, below) for term in given if term != "clip"]
    return [warning for warning in warnings if warning]


def _lame_threshold(spec: Spec, rows: Sequence[RewardInputs | None], group_size: int) -> str | None:
    """The warning for a threshold that nearly all traces reach, or none, or for tiers of which one step is in use."""
    name, given = named(spec)
    if name not in ("threshold", "sigmoid_threshold", "tiers"):
        return None
    paid = seen(spec, rows, group_size, "none").rewards / (Reward(spec).high or 1.0)
    paid = paid[~np.isnan(paid)]
    what, full, nothing = f"{name} of {named(given['of'])[0]}", np.mean(paid > 0.99), np.mean(paid < 0.01)
    if full >= NEARLY_ALL or nothing >= NEARLY_ALL:
        return f"{what} pays {'everyone' if full > nothing else 'nobody'}: {max(full, nothing):.0%} of the traces"
    if name == "tiers" and len(given["at"]) > 1 and full + nothing >= NEARLY_ALL:
        return f"{what} pays all or nothing: the steps between lie too close together for these traces"
    return None


def _lame_term(
    term: str, hybrid: Mapping[str, Any], whole: Seen, rows: Sequence[RewardInputs | None], scale: str, below: float
) -> str | None:
    """The warning for a term without which the hybrid's advantages are the same up to one factor."""
    rest = {name: weight for name, weight in hybrid.items() if name != term}
    if not rest.keys() - {"clip"}:
        return None
    size = whole.rewards.shape[1]
    without = seen({"hybrid": rest}, rows, size, scale).advantages
    factor, _ = best_factor(without, whole.advantages)
    if factor <= 0 or rms(whole.advantages - factor * without) >= below * rms(whole.advantages):
        return None
    bare = {name: weight for name, weight in hybrid.items() if name != "clip"}
    own, total = (rms(seen({"hybrid": h}, rows, size, "none").advantages) for h in ({term: hybrid[term]}, bare))
    if own < below * total:
        return f"{term} hardly counts: its spread within the groups is {own / total:.1g} of the whole hybrid's"
    return f"{term} moves in step with the other terms: to GRPO it doubles (or halves) what they say and adds nothing"
