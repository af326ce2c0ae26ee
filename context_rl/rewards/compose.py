"""From a recipe's `reward:` to a function of a batch: formulas, and what combines them.

    reward: probability                                            a formula of `formulas.FORMULAS`
    reward: {soft_numeric: {tolerance: 0.2}}                       ... with parameters
    reward: my_package.my_module.my_reward                         a function of your own: RewardInputs -> float
    reward: {threshold: {of: gain, tau: {quantile: 0.7}}}          1 where `of` reaches tau, which may move
    reward: {sigmoid_threshold: {of: gain, tau: 0.1, width: 0.05}}
    reward: {tiers: {of: perplexity_improvement, at: [0.0005, 0.01, 0.02], pay: [0.5, 0.9, 1.0]}}
    reward: {clip: {of: gain, low: 0, high: 1}}
    reward: {hybrid: {probability: 0.3, gain: 0.7, clip: [0, 1]}}  a weighted sum
    reward: {hybrid: {probability: 1, early_leak: -0.5}}           ... with a penalty
    reward: {gated: {of: probability, gate: [well_formed, binary]}}
    reward: {fallback: {first: binary, of: probability}}           `of` only where nobody in the group gets `first`
    reward: {masked: {of: probability}}                            with the answer's mentions cut out of the trace
    reward: {spread_filter: {of: mean_probability, beta: 0.5}}     groups with little spread train nothing

Wherever a reward is named (`of`, `gate`, `first`, the terms of a hybrid), another of these may stand.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from context_rl.rewards.advantages import std
from context_rl.rewards.binding import bind, check_call, finite, own_function, positive
from context_rl.rewards.formulas import FORMULAS, mean
from context_rl.rewards.inputs import RewardError, RewardInputs
from context_rl.rewards.schedules import Schedule, SpreadFilter, check_number

Spec = str | Mapping[str, Any]
INF = math.inf


@dataclass(frozen=True)
class Batch:
    """Scored traces that are rewarded together.

    Attributes:
        inputs: one a trace.
        groups: of the same length; traces of one question in one generation batch share a value.
        progress: share of the training that is done, in [0, 1].
    """

    inputs: Sequence[RewardInputs]
    groups: Sequence[Hashable]
    progress: float = 0.0


@dataclass(frozen=True)
class Node:
    """One reward of the tree: its values for a batch, and the interval in which they lie.

    Attributes:
        alone: a trace's value depends on that trace only, not on its group, the step or what came before.
        parts: the weighted terms of a hybrid.
    """

    values: Callable[[Batch], list[float]]
    low: float
    high: float
    alone: bool = True
    parts: Mapping[str, "Node"] = field(default_factory=dict)


class Reward:
    """The reward of a run, built from what its recipe says.

    Attributes:
        spec: as written in the recipe.
        name: short, for names of folders: "threshold-probability-quantile".
        low, high: bounds of the values.
        alone: see `Node.alone`.
        formulas: names of the formulas in it, in the order of the recipe.
        reads: of `RewardInputs`, what a judge may have to be asked for: "correct", "judged". A function of the user's
            own may look at `correct`.
        thresholds: where the moving thresholds stood at the last call, by name.

    Raises:
        RewardError: an unknown name or parameter, or a combination that would pay for failing.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self.name = str(spec)
        self.formulas: list[str] = []
        self.thresholds: dict[str, float] = {}
        self._stateful: list[Schedule | SpreadFilter] = []
        self._node = self._build(spec)
        if isinstance(spec, Mapping):
            kinds = [part.kind for part in self._stateful if isinstance(part, Schedule)]
            self.name = "-".join(dict.fromkeys([str(next(iter(spec))), *self.formulas, *kinds]))
        self.low, self.high, self.alone = self._node.low, self._node.high, self._node.alone
        self.parts = tuple(self._node.parts)
        self.reads = {FORMULAS[name].reads if name in FORMULAS else "correct" for name in self.formulas} - {None}

    def __call__(
        self, rows: Sequence[RewardInputs | None], groups: Sequence[Hashable], progress: float = 0.0
    ) -> list[float | None]:
        """One finite float a row; None for a row that is None (it could not be scored) and counts nowhere.

        Raises:
            RewardError: the reward does not fit the data, or a function of the user's own returned no finite number.
        """
        return self._spread(self._node, rows, groups, progress)

    def of(self, x: RewardInputs) -> float:
        """The value of one trace by itself; for rewards that are `alone`, and to try one out."""
        [value] = self([x], [0])
        assert value is not None
        return value

    def weighted_parts(self, rows: Sequence[RewardInputs | None], groups: Sequence[Hashable]) -> dict[str, list]:
        """What each term of a hybrid contributes to each row; empty for other rewards. Terms have to be `alone`."""
        parts = {name: node for name, node in self._node.parts.items() if node.alone}
        return {name: self._spread(node, rows, groups, 0.0) for name, node in parts.items()}

    @property
    def state(self) -> list[list[float]]:
        """What a resumed run needs: windows of running quantiles, running means."""
        return [part.state for part in self._stateful]

    @state.setter
    def state(self, states: Sequence[Sequence[float]]) -> None:
        if len(states) != len(self._stateful):
            raise RewardError(
                f"a state of {len(states)} parts is no state of reward {self.name!r}, which has {len(self._stateful)}"
            )
        for part, state in zip(self._stateful, states, strict=True):
            part.state = state

    def _spread(self, node: Node, rows: Sequence, groups: Sequence[Hashable], progress: float) -> list[float | None]:
        known = [(x, group) for x, group in zip(rows, groups, strict=True) if x is not None]
        found = node.values(Batch([x for x, _ in known], [g for _, g in known], progress)) if known else []
        for value in found:
            if not math.isfinite(value):
                raise RewardError(
                    f"reward {self.name!r} came out as {value!r}; a trace's reward must be a finite number"
                )
        values = iter(found)
        return [None if x is None else next(values) for x in rows]

    # --- building ---

    def _build(self, spec: Spec, parameters: Mapping[str, Any] | None = None) -> Node:
        """The node of `spec`; `parameters` are those of a name that stands alone, as in a hybrid."""
        if isinstance(spec, Mapping):
            if len(spec) != 1:
                raise RewardError(f"a reward is one name, or one name with its parameters, not {dict(spec)!r}")
            [(name, given)] = spec.items()
            if given is not None and not isinstance(given, Mapping):
                raise RewardError(f"reward {name!r}: its parameters must be a mapping, not {given!r}")
            return self._build(str(name), dict(given or {}))
        if not isinstance(spec, str):
            raise RewardError(f"a reward is a name or a mapping, not {spec!r}")
        parameters = dict(parameters or {})
        for key in parameters:
            if not isinstance(key, str):
                raise RewardError(f"reward {spec!r}: {key!r} is no name of a parameter")
        if spec == "hybrid":
            return self._hybrid(parameters)
        if spec in COMBINATORS:
            build = getattr(self, f"_{spec}")
            check_call(spec, build, parameters)
            return build(**parameters)
        self.formulas.append(spec)
        if spec in FORMULAS:
            formula = FORMULAS[spec]
            bound = bind(spec, formula.function, parameters)
            return Node(lambda batch: [bound(x) for x in batch.inputs], formula.low, formula.high)
        if "." in spec:
            bound = bind(spec, own_function(spec), parameters)
            return Node(lambda batch: [finite(spec, bound(x)) for x in batch.inputs], -INF, INF)
        names = ", ".join([*FORMULAS, *COMBINATORS])
        raise RewardError(f"no reward is called {spec!r}; there are: {names}, and your own as package.module.function")

    def _clip(self, of: Spec, low: float = -INF, high: float = INF) -> Node:
        inner = self._build(of)
        low = low if low == -INF else check_number("clip: low", low, -INF, INF)
        high = high if high == INF else check_number("clip: high", high, -INF, INF)
        if low >= high:
            raise RewardError(f"clip: low {low:g} must be below high {high:g}")
        return clipped(inner, low, high)

    def _threshold(self, of: Spec = "perplexity_improvement", tau: Any = 0.5) -> Node:
        """1 where `of` reaches tau, else 0: one step of VR-CLI's tiers (Gurung and Lapata 2025)."""
        return self._against(of, tau, lambda value, at: float(value >= at))

    def _sigmoid_threshold(self, of: Spec = "perplexity_improvement", tau: Any = 0.5, width: float = 0.1) -> Node:
        """sigmoid((of - tau) / width), in [0, 1]: a threshold with a slope."""
        positive("sigmoid_threshold: width", width)
        return self._against(of, tau, lambda value, at: sigmoid((value - at) / width))

    def _against(self, of: Spec, tau: Any, compare: Callable[[float, float], float]) -> Node:
        inner, schedule = self._build(of), Schedule(tau, "tau")
        moving = sum(isinstance(part, Schedule) for part in self._stateful)
        name = f"tau{moving + 1}" if moving else "tau"
        if schedule.moves:
            self._stateful.append(schedule)

        def values(batch: Batch) -> list[float]:
            found = inner.values(batch)
            at = schedule.at(found, batch.progress)
            if schedule.moves:
                self.thresholds[name] = at
            return [compare(value, at) for value in found]

        return Node(values, 0, 1, alone=inner.alone and not schedule.moves)

    def _tiers(
        self,
        of: Spec = "perplexity_improvement",
        at: Sequence[float] = (0.0005, 0.01, 0.02),
        pay: Sequence[float] = (0.5, 0.9, 1.0),
    ) -> Node:
        """VR-CLI's own: 0, then `pay[i]` from `at[i]` on.

        Its steps were set for chapters of a novel. A short answer's perplexity moves by tens of per cent, so they pay
        every useful trace the same.
        """
        inner = self._build(of)
        for name, given in (("at", at), ("pay", pay)):
            if not isinstance(given, list | tuple):
                raise RewardError(f"tiers: {name} is {given!r}; it must be a list of numbers")
        steps = [check_number("tiers: at", step, -INF, INF) for step in at]
        worth = [check_number("tiers: pay", value, -INF, INF) for value in pay]
        if len(steps) != len(worth) or not steps or steps != sorted(steps) or [0.0, *worth] != sorted([0.0, *worth]):
            raise RewardError(f"tiers: at {list(at)} and pay {list(pay)} must rise, and be of one length")

        def paid(value: float) -> float:
            return max((w for step, w in zip(steps, worth, strict=True) if value >= step), default=0.0)

        return Node(lambda b: [paid(v) for v in inner.values(b)], 0, worth[-1], inner.alone)

    def _hybrid(self, terms: Mapping[str, Any]) -> Node:
        """sum of weight * term, clipped if asked for. A term is `name: weight` or `name: {weight: ..., parameters}`."""
        terms = dict(terms) or dict(HYBRID_DEFAULT)
        clip = terms.pop("clip", None)
        parts: dict[str, Node] = {}
        for name, given in terms.items():
            parameters = dict(given) if isinstance(given, Mapping) else {"weight": given}
            if "weight" not in parameters:
                raise RewardError(f"hybrid: {name} has no weight")
            weight = check_number(f"hybrid: {name}'s weight", parameters.pop("weight"), -1e9, 1e9)
            parts[name] = weighted(self._build(name, parameters), weight)
        if not parts:
            raise RewardError("hybrid: no term; give at least one, such as {probability: 0.5, binary: 0.5}")

        def values(batch: Batch) -> list[float]:
            columns = [node.values(batch) for node in parts.values()]
            return [math.fsum(row) for row in zip(*columns, strict=True)]

        node = Node(
            values,
            sum(node.low for node in parts.values()),
            sum(node.high for node in parts.values()),
            all(node.alone for node in parts.values()),
            parts,
        )
        if clip is None:
            return node
        if not isinstance(clip, list | tuple) or len(clip) != 2:
            raise RewardError(f"hybrid: clip is {clip!r}; it must be [low, high]")
        low, high = (check_number("hybrid: clip", bound, -INF, INF) for bound in clip)
        if low >= high:
            raise RewardError(f"hybrid: clip is {clip!r}; low must be below high")
        return replace(clipped(node, low, high), parts=parts)

    def _gated(self, of: Spec, gate: Spec | Sequence[Spec] = "well_formed", floor: float = 0.0) -> Node:
        """g * of + (1 - g) * floor, g the product of the gates: `of` behind an open gate, `floor` behind a closed one.

        Raises:
            RewardError: `of` can fall below `floor`, so that a closed gate would pay (a log-prob times 0 is 0, the best
                there is); or a gate's values leave [0, 1].
        """
        inner, floor = self._build(of), check_number("gated: floor", floor, -INF, INF)
        if inner.low < floor:
            raise RewardError(
                f"gated: {describe(of)} can fall to {inner.low:g}, below the {floor:g} of a closed gate, "
                "so failing would be paid; clip it first, gate another reward, or lower `floor`"
            )
        gates = [self._build(g) for g in (gate if isinstance(gate, list | tuple) else [gate])]
        if not all(g.low >= 0 and g.high <= 1 for g in gates):
            raise RewardError(f"gated: a gate must lie in [0, 1], and {gate!r} does not")

        def values(batch: Batch) -> list[float]:
            columns = [g.values(batch) for g in gates]
            opened = [math.prod(row) for row in zip(*columns, strict=True)] or [1.0] * len(batch.inputs)
            return [g * v + (1 - g) * floor for g, v in zip(opened, inner.values(batch), strict=True)]

        return Node(values, floor, inner.high, inner.alone and all(g.alone for g in gates))

    def _fallback(self, of: Spec = "probability", first: Spec = "binary") -> Node:
        """`first` in a group where any trace has it above its lowest value, `of` where none has.

        JEPO (Tang et al. 2025): the likelihood only where the whole group is wrong and `first` has no gradient.
        """
        one, other = self._build(first), self._build(of)
        if one.low == -INF:
            raise RewardError(
                f"fallback: {describe(first)} has no lowest value, so that no group would ever be without it; clip it"
            )

        def values(batch: Batch) -> list[float]:
            firsts, others = one.values(batch), other.values(batch)
            some = {group for group, value in zip(batch.groups, firsts, strict=True) if value > one.low}
            return [f if g in some else o for g, f, o in zip(batch.groups, firsts, others, strict=True)]

        return Node(values, min(one.low, other.low), max(one.high, other.high), alone=False)

    def _masked(self, of: Spec = "probability") -> Node:
        """`of` with the log-probs that the answer has when its mentions are cut out of the trace."""
        before = len(self.formulas)
        inner = self._build(of)
        for name in self.formulas[before:]:
            if name in FORMULAS and FORMULAS[name].family not in ("absolute", "relative"):
                raise RewardError(
                    f"masked: {name!r} is not made of the answer's log-probs, so masking would not change it"
                )

        def values(batch: Batch) -> list[float]:
            if any(x.masked_logprobs is None for x in batch.inputs):
                raise RewardError("masked: the masked traces were not scored; leave --no_masked_score out")
            inputs = [replace(x, token_logprobs=x.masked_logprobs) for x in batch.inputs]
            return inner.values(replace(batch, inputs=inputs))

        return Node(values, inner.low, inner.high, inner.alone)

    def _spread_filter(self, of: Spec = "mean_probability", beta: float = 0.5, decay: float = 0.9) -> Node:
        """`of`, and its group's mean (no gradient) where the group's std is below beta * the running mean of the std.

        RLPR (Yu et al. 2025).
        """
        inner = self._build(of)
        beta, decay = (
            check_number("spread_filter: beta", beta, 0, INF),
            check_number("spread_filter: decay", decay, 0, 1),
        )
        kept = SpreadFilter(beta, decay)
        self._stateful.append(kept)

        def values(batch: Batch) -> list[float]:
            found = inner.values(batch)
            groups: dict[Hashable, list[float]] = {}
            for group, value in zip(batch.groups, found, strict=True):
                groups.setdefault(group, []).append(value)
            keep = dict(zip(groups, kept.keep([std(group) for group in groups.values()]), strict=True))
            return [v if keep[g] else mean(groups[g]) for g, v in zip(batch.groups, found, strict=True)]

        return Node(values, inner.low, inner.high, alone=False)


COMBINATORS = (
    "threshold",
    "sigmoid_threshold",
    "tiers",
    "clip",
    "hybrid",
    "gated",
    "fallback",
    "masked",
    "spread_filter",
)
HYBRID_DEFAULT = {"probability": 0.5, "binary": 0.5}


def weighted(node: Node, weight: float) -> Node:
    """`weight` times a node."""
    bounds = sorted((weight * node.low, weight * node.high)) if weight else [0.0, 0.0]
    return Node(lambda batch: [weight * v for v in node.values(batch)], bounds[0], bounds[1], node.alone)


def clipped(node: Node, low: float, high: float) -> Node:
    """A node cut to [low, high], without parts."""

    def cut(value: float) -> float:
        return min(max(value, low), high)

    return Node(lambda batch: [cut(v) for v in node.values(batch)], cut(node.low), cut(node.high), node.alone)


def sigmoid(z: float) -> float:
    """1 / (1 + exp(-z)), without overflow."""
    return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, z))))


def describe(spec: Spec) -> str:
    """A reward in an error message."""
    return repr(spec if isinstance(spec, str) else dict(spec))
