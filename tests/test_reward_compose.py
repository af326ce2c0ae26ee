"""What combines rewards: values computed by hand, bounds, and the combinations and recipes that have to be refused.

A failure means that a recipe trains on another number than it says, or on one that pays for failing.
"""

import contextlib
import dataclasses
import math
import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rewards import HELPED, LN2, inputs

from context_rl.rewards import ARMS, COMBINATORS, FORMULAS, Reward, RewardError, RewardInputs

NAN, INF = math.nan, math.inf

# --- functions of a user's own, named by dotted path --------------------------------------------------------------


def number(x: RewardInputs, scale: float = 1.0) -> float:
    """The answered number: any value that a test wants."""
    return scale * x.answered_number


def need_scale(x: RewardInputs, scale: float) -> float:
    return scale


def takes_any(x: RewardInputs, **parameters: float) -> float:
    return float(sum(parameters.values()))


def takes_nothing() -> float:
    return 0.0


def gives_back(x: RewardInputs, found: object = None) -> object:
    return found


NO_FUNCTION = 3.0
NUMBER = f"{__name__}.number"


def rows_of(*numbers: float) -> list[RewardInputs]:
    return [RewardInputs((-1.0,), (-1.0,), correct=False, answered_number=n) for n in numbers]


def changed(**changes: object) -> RewardInputs:
    return dataclasses.replace(HELPED, **changes)


WRONG = changed(correct=False)
HALF = changed(token_logprobs=(-LN2, 0.0))
SAME = changed(token_logprobs=HELPED.baseline_logprobs)
EARLY = changed(trace="12, is it not?")
UNFINISHED = changed(finished=False)
LONG = changed(trace_tokens=12)

# --- every combinator by hand -------------------------------------------------------------------------------------

SOFT_BAND = {"length_band": {"low": 1, "high": 10, "soft": 8}}
UNIT = {"clip": {"of": NUMBER, "low": 0, "high": 1}}
BY_HAND: dict[str, list[tuple[object, list[RewardInputs], list[int], list[float]]]] = {
    # name: [(its parameters, rows, their groups, values)]. Where no groups are given all rows are of one.
    "threshold": [
        ({"of": NUMBER, "tau": 0.3}, rows_of(0.2999, 0.3, 0.31), [], [0, 1, 1]),
        ({"of": NUMBER, "tau": -2}, rows_of(-2.5, -2, 0), [], [0, 1, 1]),
        # The default: perplexity falls by half or more. HELPED has 3/4; two tokens of 1/4 after 1/8 and 1/16 have
        # 1 - 2^-1.5, two of 1/8 1 - 2^-0.5.
        (
            None,
            [HELPED, changed(token_logprobs=(-2 * LN2,) * 2), changed(token_logprobs=(-3 * LN2,) * 2)],
            [],
            [1, 1, 0],
        ),
        ({"tau": 0.0}, [SAME], [], [1]),
        ({"tau": 1e-9}, [SAME], [], [0]),
    ],
    "sigmoid_threshold": [
        (
            {"of": NUMBER, "tau": 2, "width": 0.5},
            rows_of(2, 3, 1, 1e9, -1e9),
            [],
            [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 1, 0],
        ),
        # (3/4 - 1/2) / 0.1
        (None, [HELPED, SAME], [], [1 / (1 + math.exp(-2.5)), 1 / (1 + math.exp(5))]),
        ({"tau": 0.55, "width": 0.2}, [HELPED], [], [1 / (1 + math.exp(-1))]),
    ],
    "tiers": [
        # VR-CLI: 0.05, 1 and 2 per cent.
        (
            {"of": NUMBER},
            rows_of(-1, 0, 0.000499, 0.0005, 0.00999, 0.01, 0.01999, 0.02, 0.9),
            [],
            [0, 0, 0, 0.5, 0.5, 0.9, 0.9, 1, 1],
        ),
        (None, [HELPED, SAME], [], [1, 0]),
        ({"of": NUMBER, "at": [-1, 1], "pay": [2, 3]}, rows_of(-1.5, -1, 0, 1), [], [0, 2, 2, 3]),
    ],
    "clip": [
        ({"of": NUMBER, "low": 0, "high": 1}, rows_of(-2, 0.25, 7), [], [0, 0.25, 1]),
        ({"of": NUMBER, "low": -1}, rows_of(-2, 0.25, 7), [], [-1, 0.25, 7]),
        ({"of": NUMBER, "high": 0.5}, rows_of(-2, 0.25, 7), [], [-2, 0.25, 0.5]),
        ({"of": {NUMBER: {"scale": 10}}, "low": -5, "high": 5}, rows_of(-2, 0.25, 7), [], [-5, 2.5, 5]),
    ],
    "hybrid": [
        (None, [HELPED, WRONG], [], [0.5 / 8 + 0.5, 0.5 / 8]),
        ({"probability": 0.3, "perplexity_improvement": 0.7}, [HELPED, SAME], [], [0.3 / 8 + 0.7 * 0.75, 0.3 / 128]),
        ({"logprob_mean": 2.0, "gain": -1.0, "binary": 0.25}, [HELPED], [], [-3 * LN2 - 2 * LN2 + 0.25]),
        # A penalty for guessing first, and the clip from below and from above.
        ({"probability": 1, "early_leak": -0.5, "clip": [0, 1]}, [HELPED, EARLY], [], [1 / 8, 0]),
        ({"probability": 1, "early_leak": -0.5, "clip": [-1, 1]}, [EARLY], [], [1 / 8 - 0.5]),
        ({"binary": 3, "probability": 1, "clip": [0, 2]}, [HELPED, WRONG], [], [2, 1 / 8]),
        # Terms with parameters, combinators among them.
        ({"soft_numeric": {"weight": 2, "tolerance": 0.05}, "binary": 1}, [HELPED], [], [2 * math.exp(-2) + 1]),
        ({"threshold": {"weight": 0.5, "of": "probability", "tau": 0.2}, "binary": 0}, [HELPED, HALF], [], [0, 0.5]),
        ({"probability": 0, "binary": 1}, [WRONG], [], [0]),
    ],
    "gated": [
        ({"of": "probability"}, [HELPED, UNFINISHED], [], [1 / 8, 0]),
        ({"of": "probability", "gate": "binary"}, [HELPED, WRONG], [], [1 / 8, 0]),
        (
            {"of": "probability", "gate": ["well_formed", "binary"]},
            [HELPED, WRONG, UNFINISHED, changed(correct=False, finished=False)],
            [],
            [1 / 8, 0, 0, 0],
        ),
        # 12 tokens are 2 outside of a band that falls over 8: three quarters open.
        ({"of": "probability", "gate": SOFT_BAND}, [LONG], [], [0.75 / 8]),
        ({"of": "probability", "gate": [SOFT_BAND, SOFT_BAND, "binary"]}, [LONG], [], [0.5625 / 8]),
        # The floor is what a closed gate pays, wherever it lies below the reward.
        (
            {"of": {"clip": {"of": "logprob_sum", "low": -10}}, "gate": SOFT_BAND, "floor": -10},
            [HELPED, LONG, changed(trace_tokens=99), changed(token_logprobs=(-50.0, -50.0))],
            [],
            [-3 * LN2, 0.75 * -3 * LN2 + 0.25 * -10, -10, -10],
        ),
        ({"of": "probability", "gate": "binary", "floor": -1}, [HELPED, WRONG], [], [1 / 8, -1]),
    ],
    "fallback": [
        # Nobody is right in group 1, somebody in group 2: there the likelihood counts for nothing.
        (
            None,
            [WRONG, HELPED, changed(correct=False, token_logprobs=(-LN2, 0.0)), WRONG],
            [1, 2, 1, 2],
            [1 / 8, 1, 0.5, 0],
        ),
        (None, [HELPED, HELPED], [1, 1], [1, 1]),
        ({"of": "logprob_sum", "first": "binary"}, [WRONG, WRONG], [1, 1], [-3 * LN2, -3 * LN2]),
        # Above its lowest value is enough: 0.2 of [0, 1]. With a lowest value of its own, too.
        ({"of": "logprob_sum", "first": UNIT}, rows_of(0.2, -1, 0, -1), [1, 1, 2, 2], [0.2, 0, -1, -1]),
        (
            {"of": "binary", "first": {"clip": {"of": NUMBER, "low": -1, "high": 1}}},
            rows_of(-1, -7, -0.5, -7),
            [1, 1, 2, 2],
            [0, 0, -0.5, -1],
        ),
    ],
    "masked": [
        (None, [HELPED], [], [1 / 64]),
        # Masked 2^-3 a token, without a trace 2^-3.5.
        ({"of": "gain"}, [HELPED], [], [0.5 * LN2]),
        ({"of": "perplexity_improvement"}, [HELPED], [], [1 - 2**-0.5]),
        ({"of": {"hybrid": {"probability": 1, "probability_gain": -1}}}, [HELPED], [], [1 / 128]),
    ],
    "spread_filter": [
        # Standard deviations sqrt(1/2) and sqrt(1/200): their mean times 1/2 is 0.194, above the second.
        ({"of": NUMBER}, rows_of(0, 0.4, 1, 0.5), [1, 2, 1, 2], [0, 0.45, 1, 0.45]),
        ({"of": NUMBER, "beta": 0}, rows_of(0, 0.4, 1, 0.5), [1, 2, 1, 2], [0, 0.4, 1, 0.5]),
        # 0.18 times the mean is 0.07, just below the second's 0.0707.
        ({"of": NUMBER, "beta": 0.18}, rows_of(0, 0.4, 1, 0.5), [1, 2, 1, 2], [0, 0.4, 1, 0.5]),
        # As much spread as the mean is enough.
        ({"of": NUMBER, "beta": 1}, rows_of(0, 2, 3, 5), [1, 1, 2, 2], [0, 2, 3, 5]),
        # The default: mean of p_t, 3/8 and 3/4 beside two equal ones.
        (None, [HELPED, HALF, HALF, HALF], [1, 1, 2, 2], [3 / 8, 3 / 4, 3 / 4, 3 / 4]),
        # One in ten groups varies: even the varying ones stay, the rest are their own means.
        ({"of": NUMBER}, rows_of(1, 1, 0, 1), [1, 1, 2, 2], [1, 1, 0, 1]),
    ],
}


@pytest.mark.parametrize(
    ("name", "parameters", "rows", "groups", "expected"),
    [(name, *case) for name, cases in BY_HAND.items() for case in cases],
)
def test_each_combinator_has_its_hand_computed_values(name, parameters, rows, groups, expected):
    """Failure: a `>` for `>=`, a sum for a product, a clip or a floor at the wrong end, or a default that moved."""
    spec = name if parameters is None else {name: parameters}
    assert Reward(spec)(rows, groups or [0] * len(rows)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_every_combinator_there_is_has_hand_computed_values_by_default_and_with_each_parameter():
    """Failure: a new combinator, or a new parameter, came without a value in the table above."""
    assert set(BY_HAND) == set(COMBINATORS)
    elsewhere = {"spread_filter": {"decay"}}  # tests/test_reward_schedules.py: it takes a second batch
    for name, cases in BY_HAND.items():
        used = {key for parameters, *_ in cases if parameters for key in parameters}
        if name == "hybrid":
            assert "clip" in used
        else:
            known = set(
                Reward.__dict__[f"_{name}"].__code__.co_varnames[: Reward.__dict__[f"_{name}"].__code__.co_argcount]
            )
            assert known - {"self"} == used | elsewhere.get(name, set()), name
        if name not in ("clip", "gated"):  # these need an `of`
            assert any(parameters is None for parameters, *_ in cases), name


def test_rewards_nest_by_hand():
    """Failure: a combinator inside another is built with the wrong parameters or read from the wrong rows."""
    inside = {"gated": {"of": {"hybrid": {"probability": 1, "probability_gain": 1}}, "gate": UNIT, "floor": -1}}
    spec = {"clip": {"of": {"masked": {"of": inside["gated"]["of"]}}, "low": 0}}
    assert Reward(spec).of(HELPED) == pytest.approx(1 / 64 + 1 / 64 - 1 / 128, rel=1e-12)
    # Half open (the number is 0.5): 1/2 (1/8 + 1/8 - 1/128) - 1/2.
    half_open = changed(answered_number=0.5)
    assert Reward(inside).of(half_open) == pytest.approx(0.5 * (1 / 4 - 1 / 128) - 0.5, rel=1e-12)
    tiers = {"tiers": {"of": {"fallback": {"first": "binary", "of": "probability"}}, "at": [0.1, 1], "pay": [0.2, 0.7]}}
    assert Reward(tiers)([WRONG, HELPED, WRONG], [1, 2, 2]) == [0.2, 0.7, 0.0]


# --- bounds, missing rows, order ----------------------------------------------------------------------------------

weight = st.sampled_from([0, 0.5, 1, -1, 2.5])
tau = st.sampled_from([-1.0, 0, 0.3]) | st.sampled_from(
    [{"quantile": 0.7}, {"quantile": 0, "window": 1000}, {"linear": [-1, 1]}, {"cosine": [0, 0.5], "until": 0.5}]
)


def combined(of: st.SearchStrategy) -> st.SearchStrategy:
    """All ways to combine these rewards once more, sensible or not."""
    clip = st.sampled_from([(0, 1), (-1, 0.1), (-3, 7)])
    single = {
        "threshold": {"of": of, "tau": tau},
        "sigmoid_threshold": {"of": of, "tau": tau, "width": st.sampled_from([1e-300, 0.1, 10])},
        "tiers": {"of": of},
        "gated": {"of": of, "gate": of | st.lists(of, max_size=2), "floor": st.sampled_from([0.0, -1, -100, -1e6])},
        "fallback": {"of": of, "first": of},
        "masked": {"of": of},
        "spread_filter": {"of": of, "beta": st.sampled_from([0, 0.5, 2])},
    }
    return st.one_of(
        *(st.fixed_dictionaries({name: st.fixed_dictionaries(given)}) for name, given in single.items()),
        st.tuples(of, clip).map(lambda drawn: {"clip": {"of": drawn[0], "low": drawn[1][0], "high": drawn[1][1]}}),
        st.dictionaries(st.sampled_from(list(FORMULAS)), weight, min_size=1, max_size=3).map(lambda w: {"hybrid": w}),
        st.tuples(st.sampled_from(list(FORMULAS)), weight, clip).map(
            lambda d: {"hybrid": {d[0]: d[1], "clip": list(d[2])}}
        ),
    )


def buildable(spec: object) -> bool:
    try:
        Reward(spec)
    except RewardError:
        return False
    return True


specs = st.recursive(st.sampled_from(list(FORMULAS)), combined, max_leaves=5).filter(buildable)
batches = st.lists(st.tuples(inputs(), st.integers(0, 2)), min_size=1, max_size=5)


@settings(max_examples=300)
@given(specs, batches, st.floats(0, 1))
def test_every_reward_that_can_be_built_is_finite_and_within_its_bounds(spec, batch, progress):
    """Failure: an infinity zeroes its group's advantages; bounds that are too tight let an unsafe gate through."""
    reward = Reward(spec)
    rows, groups = zip(*batch, strict=True)
    for found in reward(rows, groups, progress):
        rounding = 1e-9 * max(1.0, abs(found))
        assert math.isfinite(found)
        assert reward.low - rounding <= found <= reward.high + rounding


@settings(max_examples=200)
@given(specs, batches, st.lists(st.booleans(), min_size=5, max_size=5))
def test_an_unscored_row_gets_none_and_changes_no_other(spec, batch, missing):
    """Failure: a failed score becomes a reward, shifts the others by a row, or counts in a quantile or a spread."""
    holes = [None if gone else pair for pair, gone in zip(batch, missing, strict=False)]
    whole = [pair for pair in holes if pair is not None]
    values = Reward(spec)([pair and pair[0] for pair in holes], [group for _, group in batch])
    assert [v is None for v in values] == [pair is None for pair in holes]
    assert [v for v in values if v is not None] == Reward(spec)([x for x, _ in whole], [g for _, g in whole])


@settings(max_examples=200)
@given(specs, batches, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_no_value(spec, batch, rng: random.Random):
    """Failure: a value is taken from another row, or depends on which process held the row."""
    places = list(range(len(batch)))
    rng.shuffle(places)
    values = Reward(spec)([x for x, _ in batch], [g for _, g in batch])
    shuffled = Reward(spec)([batch[i][0] for i in places], [batch[i][1] for i in places])
    assert shuffled == [values[i] for i in places]


def test_a_group_is_what_shares_a_value_wherever_its_rows_stand():
    """Failure: groups are taken to lie one after the other, which they do not across processes."""
    assert Reward("fallback")([WRONG, WRONG, HELPED], ["a", "b", "a"]) == pytest.approx([0, 1 / 8, 1], rel=1e-12)


def test_rows_and_groups_of_different_lengths_are_refused():
    """Failure: the rows that are left over get no reward, or another group's."""
    with pytest.raises(ValueError, match="zip"):
        Reward("probability")([HELPED, HELPED], [0])


def test_the_parts_of_a_hybrid_add_up_to_it():
    """Failure: the columns reward_parts/* do not explain the reward."""
    reward = Reward({"hybrid": {"probability": 0.3, "binary": 2, "early_leak": -0.5}})
    parts = reward.weighted_parts([HELPED, None, EARLY], [0, 0, 0])
    assert reward.parts == ("probability", "binary", "early_leak")
    assert parts["probability"] == pytest.approx([0.3 / 8, None, 0.3 / 8])
    assert (parts["binary"], parts["early_leak"]) == ([2, None, 2], [0, None, -0.5])
    assert Reward("probability").weighted_parts([HELPED], [0]) == {}
    # A moving threshold would count the batch twice.
    moving = Reward({"hybrid": {"threshold": {"weight": 1, "tau": {"quantile": 0.5}}, "binary": 1}})
    assert list(moving.weighted_parts([HELPED], [0])) == ["binary"]
    assert moving.state == [[]]


# --- alone ---------------------------------------------------------------------------------------------------------


def values_in_company(spec: object) -> set[float]:
    """What one trace is worth by itself, at the training's end, in better company, and after other batches."""
    x = changed(correct=False, token_logprobs=(math.log(0.4), 0.0), masked_logprobs=(math.log(0.4), 0.0))
    good, poor = changed(token_logprobs=(0.0, 0.0)), changed(correct=False, token_logprobs=(-9.0, -9.0))
    found = [Reward(spec).of(x), Reward(spec)([x], [0], 1.0)[0]]
    for company in ([good], [x, good, poor, good], [good] * 5):
        for group in (0, 1):
            found.append(Reward(spec)([x, *company], [0] + [group] * len(company), 0.5)[0])
    # A group with little spread beside one with much.
    close = changed(correct=False, token_logprobs=(math.log(0.41), 0.0))
    found.append(Reward(spec)([x, close, good, poor], [0, 0, 1, 1])[0])
    reward = Reward(spec)
    reward([good] * 9, [0] * 9, 0.1)
    found.append(reward.of(x))
    return set(found)


MOVING = {"threshold": {"of": "probability", "tau": {"linear": [0.1, 0.9]}}}
COMPANIONABLE = [
    {"threshold": {"of": "fallback", "tau": 0.3}},
    {"sigmoid_threshold": {"of": "fallback"}},
    {"tiers": {"of": "fallback"}},
    {"clip": {"of": "fallback", "low": 0}},
    {"hybrid": {"binary": 1, "fallback": 1}},
    {"hybrid": {"fallback": 1, "binary": 1, "clip": [0, 1]}},
    {"gated": {"of": "fallback"}},
    {"gated": {"of": "probability", "gate": ["well_formed", MOVING]}},
    {"masked": {"of": MOVING}},
]
"""Rewards whose parts look at the batch, or at the training's progress."""


@pytest.mark.parametrize("spec", [*ARMS.values(), *COMPANIONABLE], ids=str)
def test_alone_says_whether_a_trace_is_worth_the_same_in_any_company(spec):
    """Failure: a value that depends on the batch is logged, or compared offline, as if it were the trace's own."""
    assert Reward(spec).alone == (len(values_in_company(spec)) == 1)
    assert not (Reward(spec).alone and spec in COMPANIONABLE)


@settings(max_examples=200)
@given(specs, batches, st.floats(0, 1))
def test_a_reward_that_is_alone_gives_each_row_its_own_value(spec, batch, progress):
    """Failure: a combination of rewards is said to be alone, though one of its parts is not."""
    reward = Reward(spec)
    if reward.alone:
        rows, groups = zip(*batch, strict=True)
        first, second = reward(rows, groups, progress), reward(rows[::-1], groups, 1 - progress)[::-1]
        assert first == second == [Reward(spec).of(x) for x in rows]


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_builds_and_says_what_is_in_it(name):
    """Failure: an ablation over the catalogue dies at this arm, or its folder has no name."""
    reward = Reward(ARMS[name])
    assert reward.spec == ARMS[name]
    assert reward.name.split("-")[0] in {*FORMULAS, *COMBINATORS}
    assert set(reward.formulas) <= set(FORMULAS)
    assert reward.formulas


def test_a_reward_lists_its_formulas_and_bounds():
    """Failure: docs, checks and warnings speak of another reward than the one that trains."""
    reward = Reward({"gated": {"of": {"hybrid": {"probability": 1, "early_leak": -0.5, "clip": [0, 2]}}}})
    assert (reward.name, reward.formulas) == (
        "gated-probability-early_leak-well_formed",
        ["probability", "early_leak", "well_formed"],
    )
    moving = Reward({"threshold": {"of": "probability", "tau": {"quantile": 0.7}}})
    assert (moving.name, Reward("threshold").name) == ("threshold-probability-quantile", "threshold")
    assert (reward.low, reward.high) == (0, 1)
    bounds = {
        "gain": (-INF, INF),
        "logprob_mean": (-INF, 0),
        "tiers": (0, 1),
        "hybrid": (0, 1),
    }
    assert {name: (Reward(name).low, Reward(name).high) for name in bounds} == bounds
    weighted = Reward({"hybrid": {"probability": -2, "binary": 1, "logprob_sum": 0}})
    assert (weighted.low, weighted.high) == (-2, 1)
    clipped = Reward({"clip": {"of": "logprob_sum", "low": -5}})
    assert (clipped.low, clipped.high) == (-5, 0)


# --- a function of one's own --------------------------------------------------------------------------------------


def test_a_function_of_ones_own_is_a_reward_with_its_parameters():
    """Failure: the dotted path of the README does not work, or its parameters are dropped."""
    assert Reward(NUMBER).of(HELPED) == 90
    assert Reward({NUMBER: {"scale": 0.5}}).of(HELPED) == 45
    assert Reward({f"{__name__}.takes_any": {"a": 1, "b": 2}}).of(HELPED) == 3
    assert Reward({"hybrid": {NUMBER: {"weight": 2, "scale": 0.1}}}).of(HELPED) == pytest.approx(18)
    assert (Reward(NUMBER).low, Reward(NUMBER).high) == (-INF, INF)


@pytest.mark.parametrize(
    "returned", [NAN, INF, -INF, None, "0.5", b"1", "high", [1.0], 10**400, 1j], ids=lambda value: repr(value)[:10]
)
@pytest.mark.parametrize(
    "wrap", [lambda spec: spec, lambda spec: {"hybrid": {**spec, "binary": 1}}], ids=["bare", "hybrid"]
)
def test_what_is_no_finite_number_out_of_a_function_of_ones_own_is_an_error_that_names_it(returned, wrap):
    """Failure: a bug in a user's function becomes a reward, or an error that does not say where it is."""
    name = f"{__name__}.gives_back"
    given_ = {"found": returned} | ({"weight": 1} if wrap({}) else {})
    with pytest.raises(RewardError, match=rf"reward '{name}' returned .*; it must return a finite number"):
        Reward(wrap({name: given_})).of(HELPED)


@pytest.mark.parametrize("returned", [True, 3, 0.25])
def test_what_is_a_number_out_of_a_function_of_ones_own_is_a_float(returned):
    """Failure: a function that returns `x.correct` or a count is refused, or a bool goes into the run's tables."""
    found = Reward({f"{__name__}.gives_back": {"found": returned}}).of(HELPED)
    assert (type(found), found) == (float, float(returned))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_package.reward", "cannot be imported (No module named 'no_such_package')"),
        (f"{__name__}.no_such_name", "cannot be imported (module"),
        (".reward", "cannot be imported"),
        ("..reward", "cannot be imported"),
        ("math.", "cannot be imported"),
        ("0.5", "cannot be imported"),
        (f"{__name__}.NO_FUNCTION", "is no function but 3.0"),
        (f"{__name__}.need_scale", "missing a required argument: 'scale'; it takes: scale"),
        (f"{__name__}.takes_nothing", "too many positional arguments"),
        ({NUMBER: {"sclae": 1}}, "takes no 'sclae'; it takes: scale"),
        ({NUMBER: {"x": 1}}, "takes no 'x'; it takes: scale"),
        ({f"{__name__}.takes_any": {1: 2}}, "1 is no name of a parameter"),
        ("builtins.max", "does not say what it takes"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_the_run(spec, message):
    """Failure: a run dies at its first step, after the models have been loaded."""
    with pytest.raises(RewardError) as caught:
        Reward(spec)
    assert message in str(caught.value)
    assert repr(spec if isinstance(spec, str) else next(iter(spec))) in str(caught.value)


# --- what would pay for failing -----------------------------------------------------------------------------------


def test_a_gated_log_prob_is_refused_and_the_message_says_why_and_what_to_do():
    """Failure: a closed gate turns a log-prob into 0, the best there is."""
    with pytest.raises(RewardError) as caught:
        Reward({"gated": {"of": "logprob_mean", "gate": "binary"}})
    assert str(caught.value) == (
        "gated: 'logprob_mean' can fall to -inf, below the 0 of a closed gate, so failing would be paid; clip it "
        "first, gate another reward, or lower `floor`"
    )


@pytest.mark.parametrize(
    ("of", "floor"),
    [
        ("logprob_sum", -1e6),
        ("gain", 0),
        ("negative_perplexity", 0),
        ("probability_gain", 0),
        ("perplexity_improvement", -99),
        ("probability", 0.1),
        (NUMBER, 0),
        ({"hybrid": {"probability": 1, "early_leak": -0.5}}, 0),
        ({"spread_filter": {"of": "gain"}}, 0),
        ({"masked": {"of": "logprob_sum"}}, 0),
        ({"fallback": {"of": "logprob_sum"}}, 0),
        ({"clip": {"of": "logprob_sum", "high": -1}}, 0),
    ],
)
def test_a_gate_before_a_reward_that_can_fall_below_the_floor_is_refused(of, floor):
    """Failure: whoever breaks the format gets more than whoever keeps to it."""
    with pytest.raises(RewardError, match="so failing would be paid"):
        Reward({"gated": {"of": of, "gate": "binary", "floor": floor}})
    with pytest.raises(RewardError, match="so failing would be paid"):
        Reward({"hybrid": {"gated": {"weight": 1, "of": of, "gate": "binary", "floor": floor}}})


@given(specs, st.sampled_from(["binary", "well_formed", "probability", SOFT_BAND, ["leak", SOFT_BAND]]), inputs())
def test_no_gate_pays_more_than_an_open_one(of, gate, x):
    """Failure: a trace earns by failing, or less than the floor by nearly failing."""
    bounded = {"clip": {"of": of, "low": -3, "high": 7}}
    found = Reward({"gated": {"of": bounded, "gate": gate, "floor": -3}}).of(x)
    assert -3 - 1e-9 <= found <= Reward(bounded).of(x) + 1e-9


@pytest.mark.parametrize(
    "gate",
    [
        "gain",
        "logprob_mean",
        "probability_gain",
        NUMBER,
        {"hybrid": {"binary": 2}},
        {"hybrid": {"binary": -1}},
        ["well_formed", "negative_perplexity"],
        {"tiers": {"pay": [1, 2, 3]}},
    ],
)
def test_a_gate_outside_of_0_to_1_is_refused(gate):
    """Failure: a negative gate turns the reward around, a large one multiplies it."""
    with pytest.raises(RewardError, match=r"a gate must lie in \[0, 1\], and .* does not"):
        Reward({"gated": {"of": "probability", "gate": gate}})


def test_a_fallback_from_a_reward_without_a_lowest_value_is_refused():
    """Failure: everybody is above minus infinity, so the second reward would never be used."""
    with pytest.raises(RewardError, match="fallback: 'gain' has no lowest value"):
        Reward({"fallback": {"first": "gain"}})


@pytest.mark.parametrize("name", [n for n, f in FORMULAS.items() if f.family not in ("absolute", "relative")])
@pytest.mark.parametrize("wrap", [lambda name: name, lambda name: {"hybrid": {"probability": 1, name: 1}}])
def test_masking_what_the_mask_does_not_touch_is_refused(name, wrap):
    """Failure: a recipe says "masked" and trains on the reward as it was."""
    with pytest.raises(RewardError, match=f"masked: '{name}' is not made of the answer's log-probs"):
        Reward({"masked": {"of": wrap(name)}})


def test_masking_without_a_masked_score_is_an_error_and_never_the_score_without_the_mask():
    """Failure: --no_masked_score silently trains on the leaking reward."""
    with pytest.raises(RewardError, match="leave --no_masked_score out"):
        Reward("masked")([HELPED, changed(masked_logprobs=None)], [0, 0])


# --- what a recipe can get wrong ----------------------------------------------------------------------------------

ALL_NAMES = ", ".join([*FORMULAS, *COMBINATORS])


@pytest.mark.parametrize(
    "spec", ["probabilty", {"probabilty": {}}, {"hybrid": {"probabilty": 1}}, {"gated": {"of": "probabilty"}}]
)
def test_an_unknown_reward_names_all_there_are(spec):
    """Failure: a typing error costs a search through the source."""
    with pytest.raises(RewardError) as caught:
        Reward(spec)
    assert str(caught.value) == (
        f"no reward is called 'probabilty'; there are: {ALL_NAMES}, and your own as package.module.function"
    )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        # no reward at all
        ("null", "a reward is a name or a mapping, not None"),
        ("3", "a reward is a name or a mapping, not 3"),
        ("true", "a reward is a name or a mapping, not True"),
        ("[binary]", "a reward is a name or a mapping, not ['binary']"),
        ("{}", "a reward is one name, or one name with its parameters, not {}"),
        (
            "{binary: , gain: }",
            "a reward is one name, or one name with its parameters, not {'binary': None, 'gain': None}",
        ),
        ("{1: {}}", "no reward is called '1'"),
        ("''", "no reward is called ''"),
        # parameters
        ("{hybrid: 3}", "reward 'hybrid': its parameters must be a mapping, not 3"),
        ("{threshold: [1]}", "reward 'threshold': its parameters must be a mapping, not [1]"),
        ("{threshold: {tua: 1}}", "reward 'threshold' takes no 'tua'; it takes: of, tau"),
        ("{threshold: {1: 2}}", "reward 'threshold': 1 is no name of a parameter"),
        ("{probability: {tau: 1}}", "reward 'probability' takes no 'tau'; it takes: no parameters"),
        ("{soft_numeric: {x: 1}}", "reward 'soft_numeric' takes no 'x'; it takes: tolerance"),
        ("{soft_numeric: {tolerance: true}}", "reward 'soft_numeric': tolerance must be a finite number, not True"),
        ("{soft_numeric: {tolerance: '0.1'}}", "reward 'soft_numeric': tolerance must be a finite number, not '0.1'"),
        ("{soft_numeric: {tolerance: .nan}}", "reward 'soft_numeric': tolerance must be a finite number, not nan"),
        ("{soft_numeric: {tolerance: .inf}}", "reward 'soft_numeric': tolerance must be a finite number, not inf"),
        ("{soft_numeric: {tolerance: null}}", "reward 'soft_numeric': tolerance must be a finite number, not None"),
        ("{soft_numeric: {tolerance: [1]}}", "reward 'soft_numeric': tolerance must be a finite number, not [1]"),
        # clip
        ("clip", "reward 'clip': missing a required argument: 'of'; it takes: of, low, high"),
        ("{clip: {of: gain, low: 1, high: 1}}", "clip: low 1 must be below high 1"),
        ("{clip: {of: gain, low: 2, high: 1}}", "clip: low 2 must be below high 1"),
        ("{clip: {of: gain, low: a}}", "clip: low must be a finite number, not 'a'"),
        ("{clip: {of: gain, high: .nan}}", "clip: high must be a finite number, not nan"),
        ("{clip: {of: gain, high: false}}", "clip: high must be a finite number, not False"),
        # thresholds
        ("{threshold: {tau: high}}", "tau must be a finite number, not 'high'"),
        ("{threshold: {tau: true}}", "tau must be a finite number, not True"),
        ("{threshold: {tau: .nan}}", "tau must be a finite number, not nan"),
        ("{threshold: {tau: null}}", "tau must be a finite number, not None"),
        ("{threshold: {of: null}}", "a reward is a name or a mapping, not None"),
        ("{sigmoid_threshold: {width: 0}}", "sigmoid_threshold: width must be above 0, not 0"),
        ("{sigmoid_threshold: {width: -0.1}}", "sigmoid_threshold: width must be above 0, not -0.1"),
        ("{sigmoid_threshold: {width: wide}}", "sigmoid_threshold: width must be a finite number, not 'wide'"),
        # tiers
        ("{tiers: {at: 3}}", "tiers: at is 3; it must be a list of numbers"),
        ("{tiers: {at: '123'}}", "tiers: at is '123'; it must be a list of numbers"),
        ("{tiers: {pay: null}}", "tiers: pay is None; it must be a list of numbers"),
        ("{tiers: {at: [0, 1, a]}}", "tiers: at must be a finite number, not 'a'"),
        ("{tiers: {at: [1, 2]}}", "tiers: at [1, 2] and pay [0.5, 0.9, 1.0] must rise, and be of one length"),
        ("{tiers: {at: [], pay: []}}", "tiers: at [] and pay [] must rise, and be of one length"),
        ("{tiers: {at: [1, 0], pay: [1, 2]}}", "tiers: at [1, 0] and pay [1, 2] must rise, and be of one length"),
        ("{tiers: {at: [0, 1], pay: [2, 1]}}", "tiers: at [0, 1] and pay [2, 1] must rise, and be of one length"),
        ("{tiers: {at: [0], pay: [-1]}}", "tiers: at [0] and pay [-1] must rise, and be of one length"),
        # hybrid
        ("{hybrid: {probability: null}}", "hybrid: probability's weight must be a finite number, not None"),
        ("{hybrid: {probability: high}}", "hybrid: probability's weight must be a finite number, not 'high'"),
        ("{hybrid: {probability: true}}", "hybrid: probability's weight must be a finite number, not True"),
        ("{hybrid: {probability: [1]}}", "hybrid: probability's weight must be a finite number, not [1]"),
        ("{hybrid: {probability: {}}}", "hybrid: probability has no weight"),
        ("{hybrid: {probability: 1.0e+300}}", "hybrid: probability's weight is 1e+300; it must lie between"),
        (
            "{hybrid: {probability: {weight: 1, tau: 2}}}",
            "reward 'probability' takes no 'tau'; it takes: no parameters",
        ),
        ("{hybrid: {1: 1}}", "reward 'hybrid': 1 is no name of a parameter"),
        ("{hybrid: {clip: [0, 1]}}", "hybrid: no term; give at least one"),
        ("{hybrid: {binary: 1, clip: [1, 0]}}", "hybrid: clip is [1, 0]; low must be below high"),
        ("{hybrid: {binary: 1, clip: [1, 1]}}", "hybrid: clip is [1, 1]; low must be below high"),
        ("{hybrid: {binary: 1, clip: 1}}", "hybrid: clip is 1; it must be [low, high]"),
        ("{hybrid: {binary: 1, clip: [0, 1, 2]}}", "hybrid: clip is [0, 1, 2]; it must be [low, high]"),
        ("{hybrid: {binary: 1, clip: [0, b]}}", "hybrid: clip must be a finite number, not 'b'"),
        # gated, fallback, masked, spread_filter
        ("gated", "reward 'gated': missing a required argument: 'of'; it takes: of, gate, floor"),
        ("{gated: {of: binary, gate: null}}", "a reward is a name or a mapping, not None"),
        ("{gated: {of: binary, gate: [[binary]]}}", "a reward is a name or a mapping, not ['binary']"),
        ("{gated: {of: binary, floor: low}}", "gated: floor must be a finite number, not 'low'"),
        ("{gated: {of: [binary]}}", "a reward is a name or a mapping, not ['binary']"),
        ("{fallback: {first: 0}}", "a reward is a name or a mapping, not 0"),
        ("{masked: binary}", "reward 'masked': its parameters must be a mapping, not 'binary'"),
        ("{spread_filter: {beta: -1}}", "spread_filter: beta is -1; it must lie between 0 and inf"),
        ("{spread_filter: {beta: .inf}}", "spread_filter: beta must be a finite number, not inf"),
        ("{spread_filter: {decay: 1.5}}", "spread_filter: decay is 1.5; it must lie between 0 and 1"),
        # however deep
        (
            "{gated: {of: {hybrid: {masked: {weight: 1, of: {clip: {of: gain, low: b}}}}}}}",
            "clip: low must be a finite",
        ),
    ],
)
def test_a_malformed_recipe_is_refused_in_words(recipe, message):
    """Failure: a default stays in force without a word, or a user sees a TypeError from inside."""
    with pytest.raises(RewardError) as caught:
        Reward(yaml.safe_load(recipe))
    assert str(caught.value).startswith(message)


OTHER_WORDS = """
    of tau width at pay low high gate floor first beta decay weight tolerance per share soft linear cosine quantile
    window until . .. .x a. json.dumps json.decoder
"""
words = st.sampled_from(["", *FORMULAS, *COMBINATORS, *OTHER_WORDS.split()])
scalars = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | words
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | scalars, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=600)
@given(st.one_of(junk, st.dictionaries(st.sampled_from(COMBINATORS), junk, min_size=1, max_size=1), combined(junk)))
def test_whatever_yaml_holds_is_a_reward_or_a_reward_error(spec):
    """Failure: a KeyError or TypeError from inside in place of a sentence about the recipe."""
    with contextlib.suppress(RewardError):
        assert Reward(spec).name


def test_a_reward_that_overflows_is_an_error_and_no_infinity():
    """Failure: an infinite reward, which zeroes its group's advantages without a word."""
    huge = {"hybrid": {NUMBER: 1e9}}
    with pytest.raises(RewardError, match=r"reward 'hybrid.*' came out as inf"):
        Reward(huge).of(changed(answered_number=1e300))
