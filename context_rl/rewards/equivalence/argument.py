"""By argument: a reward as a sum of (what the question fixes) * (what differs between its traces)."""

import json
import math
from collections.abc import Hashable, Mapping, Sequence

from context_rl.rewards.advantages import SCALES
from context_rl.rewards.compose import Reward, Spec
from context_rl.rewards.equivalence.specs import named, terms
from context_rl.rewards.equivalence.verdicts import Verdict

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
