"""The reward formulas against values computed by hand, and the advantages against TRL's own lines.

A failure means that runs are trained on, or compared by, another number than the one that is named.
"""

import dataclasses
import importlib.util
import inspect
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from context_rl.rewards import (
    ARMS,
    FORMULAS,
    LOGGED,
    Option,
    Reward,
    RewardError,
    RewardInputs,
    grpo_advantages,
    logged_values,
    no_spread_share,
)

LN2 = math.log(2)
NAN, INF = math.nan, math.inf

HELPED = RewardInputs(
    token_logprobs=(-LN2, -2 * LN2),
    baseline_logprobs=(-3 * LN2, -4 * LN2),
    correct=True,
    answered_number=90.0,
    gold_number=100.0,
    masked_logprobs=(-4 * LN2, -2 * LN2),
    options=(Option(-3 * LN2, 4), Option(-2 * LN2, 8), Option(-4 * LN2, 2)),
    label=1,
    question="Tom has seven red apples and buys five more. How many?",
    answer="12",
    trace="Tom has seven red apples and 12 in all",
    trace_tokens=10,
    judged=0.7,
)
"""With the trace the two tokens have probability 1/2 and 1/4, without it 1/8 and 1/16, with the answer masked 1/16 and
1/4. The options have probability 1/8, 1/4 (the right one) and 1/16, on 4, 8 and 2 characters."""

BY_FAMILY = {family: [n for n, f in FORMULAS.items() if f.family == family] for family in ("absolute", "relative")}
OF_LIKELIHOOD = [*BY_FAMILY["absolute"], *BY_FAMILY["relative"]]
CONTRASTIVE = [(name, per) for name in ("option_probability", "option_margin") for per in ("answer", "character")]

any_logprob = st.floats(-1e5, 0) | st.floats(-5, 0) | st.sampled_from([0.0, -1e5, -5e-324])
any_number = st.floats(allow_nan=False, allow_infinity=False)


def logprobs_of(tokens: int, times: int) -> st.SearchStrategy[tuple[float, ...]]:
    """Up to hundreds of tokens from a few drawn ones."""
    return st.tuples(*[any_logprob] * tokens).map(lambda values: values * times)


@st.composite
def inputs(draw: st.DrawFn) -> RewardInputs:
    tokens, times = draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 3, 80]))
    options = tuple(draw(st.lists(st.builds(Option, any_logprob, st.integers(0, 200)), min_size=2, max_size=5)))
    return RewardInputs(
        token_logprobs=draw(logprobs_of(tokens, times)),
        baseline_logprobs=draw(logprobs_of(tokens, times)),
        correct=draw(st.booleans()),
        answered_number=draw(st.none() | any_number),
        gold_number=draw(any_number),
        masked_logprobs=draw(logprobs_of(tokens, times)),
        options=options,
        label=draw(st.integers(0, len(options) - 1)),
        question=draw(st.sampled_from(["", "How many apples are there?", "a b c d e f"])),
        answer=draw(st.sampled_from(["", "12", "red apples"])),
        trace=draw(st.sampled_from(["", "12", "There are 12 red apples.", "a b c d a b c d", "Answer: 12"])),
        trace_tokens=draw(st.integers(0, 5000)),
        finished=draw(st.booleans()),
        judged=draw(st.floats(0, 1)),
    )


def with_logprobs(token: list[float], baseline: list[float] | None = None) -> RewardInputs:
    return RewardInputs(tuple(token), tuple(baseline or token), correct=False)


def value(name: str, x: RewardInputs, **parameters: object) -> float:
    """The formula as a recipe names it."""
    return Reward({name: parameters} if parameters else name).of(x)


# --- every formula by hand ----------------------------------------------------------------------------------------

CERTAIN = {"token_logprobs": (0.0, 0.0)}
HOPELESS = {"token_logprobs": (-1e4, -1e4), "baseline_logprobs": (0.0, 0.0)}
BY_HAND: dict[str, list[tuple[dict, dict, float]]] = {
    # name: [(parameters, what differs from HELPED, value)]
    "logprob_sum": [
        ({}, {}, -3 * LN2),
        ({}, CERTAIN, 0.0),
        ({}, {"token_logprobs": (-1.0, -2.0, -6.0), "baseline_logprobs": (-1.0,) * 3}, -9.0),
    ],
    "logprob_mean": [
        ({}, {}, -1.5 * LN2),
        ({}, CERTAIN, 0.0),
        ({}, {"token_logprobs": (-1.0, -2.0, -6.0), "baseline_logprobs": (-1.0,) * 3}, -3.0),
    ],
    "probability": [({}, {}, 1 / 8), ({}, CERTAIN, 1.0), ({}, HOPELESS, 0.0)],
    # The square root of 1/2 * 1/4.
    "geometric_probability": [({}, {}, 8**-0.5), ({}, CERTAIN, 1.0), ({}, HOPELESS, 0.0)],
    # (1/2 + 1/4) / 2, and one hopeless token of two costs half.
    "mean_probability": [({}, {}, 3 / 8), ({}, {"token_logprobs": (0.0, -1e4)}, 0.5)],
    # A perplexity is cut at a million: two tokens of 10^-8 have 10^8.
    "negative_perplexity": [
        ({}, {}, -(2**1.5)),
        ({}, CERTAIN, -1.0),
        ({}, {"token_logprobs": (-5 * math.log(10),) * 2}, -1e5),
        ({}, {"token_logprobs": (-8 * math.log(10),) * 2}, -1e6),
    ],
    # The smallest is -2 ln 2; its weight is RLT's 0.01 unless given.
    "logprob_mean_min": [
        ({}, {}, -1.52 * LN2),
        ({"weight": 0.5}, {}, -2.5 * LN2),
        ({"weight": 0}, {}, -1.5 * LN2),
    ],
    "gain": [({}, {}, 2 * LN2), ({}, {"baseline_logprobs": (-LN2, 0.0)}, -LN2)],
    "probability_gain": [({}, {}, 1 / 8 - 1 / 128), ({}, {"baseline_logprobs": (-LN2, 0.0)}, 1 / 8 - 1 / 2)],
    # Perplexity falls from 2^3.5 to 2^1.5: by three quarters. From 2^0.5 to 2^1.5 it doubles. At worst -100.
    "perplexity_improvement": [
        ({}, {}, 0.75),
        ({}, {"baseline_logprobs": (-LN2, 0.0)}, -1.0),
        ({}, {"token_logprobs": (-math.log(50),) * 2, "baseline_logprobs": (0.0, 0.0)}, -49.0),
        ({}, HOPELESS, -100.0),
    ],
    # (1/4) / (1/8 + 1/4 + 1/16); per character 2^-1/4 against 2^-3/4 and 2^-2.
    "option_probability": [
        ({}, {}, 4 / 7),
        ({"per": "answer"}, {"label": 2}, 1 / 7),
        ({"per": "character"}, {}, 2**-0.25 / (2**-0.75 + 2**-0.25 + 2**-2)),
        ({"per": "character"}, {"label": 2}, 2**-2 / (2**-0.75 + 2**-0.25 + 2**-2)),
    ],
    # -2 ln 2 over the best wrong one's -3 ln 2; per character -1/4 ln 2 over -3/4 ln 2.
    "option_margin": [
        ({}, {}, LN2),
        ({"per": "answer"}, {"label": 0}, -LN2),
        ({"per": "character"}, {}, 0.5 * LN2),
        ({"per": "character"}, {"label": 2}, -1.75 * LN2),
    ],
    "binary": [({}, {}, 1.0), ({}, {"correct": False}, 0.0)],
    # |90 - 100| / (0.1 * 100) = 1. Below one the distance is absolute: |0.3 - 0.2| / 0.1.
    "judge_soft": [({}, {}, 0.7), ({}, {"judged": 0.0}, 0.0), ({}, {"correct": None}, 0.7)],
    "soft_numeric": [
        ({}, {}, math.exp(-1)),
        ({}, {"answered_number": 110.0}, math.exp(-1)),
        ({}, {"answered_number": 100.0}, 1.0),
        ({"tolerance": 0.05}, {}, math.exp(-2)),
        ({}, {"answered_number": -90.0, "gold_number": -100.0}, math.exp(-1)),
        ({}, {"answered_number": 0.3, "gold_number": 0.2}, math.exp(-1)),
        ({}, {"answered_number": 0.1, "gold_number": 0.0}, math.exp(-1)),
        ({}, {"answered_number": None}, 0.0),
    ],
    "well_formed": [
        ({}, {}, 1.0),
        ({}, {"finished": False}, 0.0),
        ({}, {"trace": " \n"}, 0.0),
        ({}, {"trace": "So.\nAnswer: 12"}, 0.0),
    ],
    "length_band": [
        *(({}, {"trace_tokens": n}, v) for n, v in [(3, 0.0), (4, 1.0), (1024, 1.0), (1025, 0.0)]),
        *(
            ({"low": 10, "high": 20, "soft": 4}, {"trace_tokens": n}, v)
            for n, v in [(6, 0.0), (9, 0.75), (10, 1.0), (20, 1.0), (22, 0.5), (24, 0.0), (99, 0.0)]
        ),
        ({"low": 4.5}, {"trace_tokens": 4}, 0.0),
    ],
    # Eight words are five 4-grams, of which the last is the first again.
    "repetition": [({}, {}, 0.0), ({}, {"trace": "one two three four one two three four"}, 0.2)],
    # Nine words are six 4-grams, of which the first three stand in the question.
    "copied": [({}, {}, 0.5), ({}, {"trace": "nothing that was there before"}, 0.0)],
    "leak": [({}, {}, 1.0), ({}, {"trace": "seven and five"}, 0.0), ({}, {"trace": "$12.00 then"}, 1.0)],
    # "12" begins at 29 of 38 characters; at 2 of 8, which is the default share itself; at 0.
    "early_leak": [
        ({}, {}, 0.0),
        ({"share": 0.8}, {}, 1.0),
        ({}, {"trace": "= 12 yes"}, 0.0),
        ({"share": 0.26}, {"trace": "= 12 yes"}, 1.0),
        ({}, {"trace": "12, is it not?"}, 1.0),
        ({}, {"trace": "seven and five"}, 0.0),
    ],
}


@pytest.mark.parametrize(
    ("name", "parameters", "changes", "expected"),
    [(name, *case) for name, cases in BY_HAND.items() for case in cases],
)
def test_each_formula_has_its_hand_computed_value(name, parameters, changes, expected):
    """Failure: a wrong sign, a sum in a mean's place, a wrong base, a `>` for `>=`, or a default that moved."""
    assert value(name, dataclasses.replace(HELPED, **changes), **parameters) == pytest.approx(expected, rel=1e-12)


def test_every_formula_and_every_parameter_there_is_has_a_hand_computed_value():
    """Failure: a new formula, or a new parameter, came without a value in the table above."""
    assert set(BY_HAND) == set(FORMULAS)
    for name, cases in BY_HAND.items():
        known = list(inspect.signature(FORMULAS[name].function).parameters)[1:]
        assert {key for parameters, _, _ in cases for key in parameters} == set(known), name
        assert any(changes for _, changes, _ in cases) or any(parameters for parameters, _, _ in cases), name


def test_soft_numeric_refuses_a_gold_answer_without_a_number():
    """Failure: a data set of texts is trained on a constant."""
    with pytest.raises(RewardError, match="soft_numeric needs gold answers that are numbers"):
        value("soft_numeric", dataclasses.replace(HELPED, gold_number=None))


@pytest.mark.parametrize("options", [(), (Option(-1.0, 3),)])
@pytest.mark.parametrize("name", ["option_probability", "option_margin"])
def test_contrastive_rewards_refuse_a_question_without_a_choice(name, options):
    """Failure: a data set without choices is trained on a constant, or dies of a ValueError from max()."""
    with pytest.raises(RewardError, match="contrastive rewards need multiple-choice questions"):
        value(name, dataclasses.replace(HELPED, options=options, label=0))


# --- bounds, sign, monotony ---------------------------------------------------------------------------------------


@given(inputs())
def test_every_formula_is_finite_and_within_its_documented_bounds(x):
    """Failure: an infinity, which zeroes its group's advantages; or bounds that let an unsafe gate through."""
    for name, formula in FORMULAS.items():
        for parameters in ({}, {"per": "character"}) if formula.family == "contrastive" else ({},):
            found = formula.function(x, **parameters)
            assert isinstance(found, float), name
            assert math.isfinite(found), name
            assert formula.low <= found <= formula.high, name


@given(inputs(), st.integers(0, 400), st.floats(0, 1e5))
def test_a_likelier_token_never_lowers_a_reward_of_the_likelihood(x, position, step):
    """Failure: the sign. -log p would train the opposite of what is meant."""
    position %= len(x.token_logprobs)
    likelier = list(x.token_logprobs)
    likelier[position] = min(0.0, likelier[position] + step)
    other = dataclasses.replace(x, token_logprobs=tuple(likelier))
    for name in OF_LIKELIHOOD:
        assert FORMULAS[name].function(other) >= FORMULAS[name].function(x), name


@given(st.lists(st.floats(-3, -0.01), min_size=1, max_size=6), st.integers(0, 5), st.floats(1e-3, 0.01))
def test_a_likelier_token_is_worth_more(token, position, step):
    """Failure: a formula that does not look at every token, or is cut where answers still differ."""
    likelier = list(token)
    likelier[position % len(token)] += step
    worse, better = with_logprobs(token, token), with_logprobs(likelier, token)
    for name in OF_LIKELIHOOD:
        assert FORMULAS[name].function(better) > FORMULAS[name].function(worse), name


@given(inputs(), st.integers(0, 400), st.floats(0, 1e5))
def test_a_likelier_answer_without_the_trace_lowers_relative_rewards_only(x, position, step):
    """Failure: the baseline is added where it is to be taken off, or enters an absolute formula."""
    position %= len(x.baseline_logprobs)
    likelier = list(x.baseline_logprobs)
    likelier[position] = min(0.0, likelier[position] + step)
    other = dataclasses.replace(x, baseline_logprobs=tuple(likelier))
    for name in BY_FAMILY["relative"]:
        assert FORMULAS[name].function(other) <= FORMULAS[name].function(x), name
    for name in BY_FAMILY["absolute"]:
        assert FORMULAS[name].function(other) == FORMULAS[name].function(x), name


@pytest.mark.parametrize("name", BY_FAMILY["relative"])
def test_relative_rewards_are_zero_where_the_trace_changes_nothing(name):
    """Failure: the baseline is not the same tokens' log-prob."""
    assert value(name, with_logprobs([-0.3, -2.0, -0.7])) == 0


@pytest.mark.parametrize(("name", "per"), CONTRASTIVE)
@given(x=inputs(), place=st.integers(0, 4), step=st.floats(0, 1e5))
def test_contrastive_rewards_rise_with_the_right_option_and_fall_with_a_wrong_one(name, per, x, place, step):
    """Failure: the sign, or another option than `label` is taken for the right one."""
    place %= len(x.options)
    options = list(x.options)
    options[place] = dataclasses.replace(options[place], logprob=min(0.0, options[place].logprob + step))
    before, after = (
        FORMULAS[name].function(dataclasses.replace(x, options=o), per=per) for o in (x.options, tuple(options))
    )
    rounding = 1e-12 if name == "option_probability" else 0.0
    if place == x.label:
        assert after >= before - rounding
    else:
        assert after <= before + rounding


@pytest.mark.parametrize(("name", "per"), CONTRASTIVE)
def test_contrastive_rewards_move_strictly_with_either_option(name, per):
    """Failure: a formula that looks at one option only."""
    before = value(name, HELPED, per=per)
    for place, sign in ((1, 1), (0, -1)):
        options = list(HELPED.options)
        options[place] = dataclasses.replace(options[place], logprob=options[place].logprob + 0.1)
        assert sign * (value(name, dataclasses.replace(HELPED, options=tuple(options)), per=per) - before) > 1e-3


def test_the_option_margin_is_above_zero_where_the_right_option_is_the_likeliest():
    """Failure: the margin is to the mean or to the last wrong option, not to the best of them."""
    for label, above in ((0, False), (1, True), (2, False)):
        assert (value("option_margin", dataclasses.replace(HELPED, label=label)) > 0) == above


def test_gain_and_mean_log_prob_are_the_same_experiment_under_group_scaling():
    """Failure: the docstring of `gain` no longer holds, and an ablation compares other things than it says."""
    rows = [with_logprobs([a, -1.0], [-2.0, -0.5]) for a in (-0.1, -0.5, -3.0, -1.0)]
    gain, mean = ([value(name, x) for x in rows] for name in ("gain", "logprob_mean"))
    assert grpo_advantages(gain, 4) == pytest.approx(grpo_advantages(mean, 4), abs=1e-9)
    assert gain != mean


# --- what is no score is no input ---------------------------------------------------------------------------------

NO_LOGPROBS = [(), (NAN,), (-INF,), (INF,), (1e-9,), (-1.0, NAN), (None,), ("-1.0",)]


@pytest.mark.parametrize("logprobs", NO_LOGPROBS, ids=repr)
@pytest.mark.parametrize("field", ["token_logprobs", "baseline_logprobs", "masked_logprobs"])
def test_a_log_prob_that_is_none_is_refused_where_it_enters(field, logprobs):
    """Failure: a failed score becomes a reward; a missing one read as 0.0 is the best there is."""
    with pytest.raises(RewardError, match=r"is no log-prob|no log-probs"):
        dataclasses.replace(HELPED, **{field: logprobs})


@pytest.mark.parametrize("logprob", [NAN, -INF, INF, 1e-9, None])
def test_an_option_that_was_not_scored_is_refused(logprob):
    """Failure: the softmax over options is taken with an option missing."""
    with pytest.raises(RewardError, match="is no log-prob"):
        dataclasses.replace(HELPED, options=(Option(-1.0, 3), Option(logprob, 3)), label=0)


@pytest.mark.parametrize("label", [None, -1, 3])
def test_a_right_option_that_does_not_exist_is_refused(label):
    """Failure: Python's options[-1] is taken for the right one."""
    with pytest.raises(RewardError, match=f"3 options, and the right one is number {label}"):
        dataclasses.replace(HELPED, label=label)


@pytest.mark.parametrize("field", ["answered_number", "gold_number"])
@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_a_number_that_is_not_finite_is_refused(field, number):
    """Failure: soft_numeric is NaN, which takes its whole group out of training."""
    with pytest.raises(RewardError, match="is no answer's number"):
        dataclasses.replace(HELPED, **{field: number})


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("soft_numeric", {"tolerance": 0}, "tolerance is 0; it must be above 0"),
        ("soft_numeric", {"tolerance": -0.1}, "tolerance is -0.1; it must be above 0"),
        ("logprob_mean_min", {"weight": -0.5}, "weight is -0.5; below 0 it would pay for an unlikely token"),
        ("early_leak", {"share": 25}, "share is 25; it must lie in [0, 1]"),
        ("early_leak", {"share": -0.1}, "share is -0.1; it must lie in [0, 1]"),
        ("length_band", {"low": 9, "high": 8}, "a length band needs low <= high and soft >= 0, not [9, 8] and 0"),
        ("length_band", {"soft": -1}, "a length band needs low <= high and soft >= 0, not [4, 1024] and -1"),
        ("option_margin", {"per": "token"}, "per is 'token'; it can be answer or character"),
        ("option_probability", {"per": 3}, "per is 3; it can be answer or character"),
    ],
)
def test_a_parameter_out_of_range_is_refused_before_the_run(name, parameters, message):
    """Failure: a run that dies at its first step, or rewards traces that hide the answer, or gates nothing."""
    with pytest.raises(RewardError) as caught:
        Reward({name: parameters})
    assert str(caught.value) == f"reward {name!r}: {message}"


# --- the catalogue ------------------------------------------------------------------------------------------------

PER_CHARACTER = {
    "option_probability_per_character": "option_probability",
    "option_margin_per_character": "option_margin",
}


def test_every_formula_that_is_a_reward_is_an_arm_and_everything_of_a_trace_alone_is_logged():
    """Failure: a formula is missing from logs and comparisons; or a safeguard is swept as if it were a reward."""
    rewards = {name for name, formula in FORMULAS.items() if formula.family != "safeguard"}
    assert rewards <= set(ARMS)
    assert not (set(FORMULAS) - rewards) & set(ARMS)
    assert set(LOGGED) == set(FORMULAS) | {name for name, spec in ARMS.items() if Reward(spec).alone}


@given(inputs())
def test_what_is_logged_is_what_would_train(x):
    """Failure: the columns rewards/* of a run are not the rewards of those names."""
    logged = logged_values(x)
    assert list(logged) == list(LOGGED)
    for name, found in logged.items():
        assert found == Reward(ARMS.get(name, name)).of(x), name


def test_a_logged_value_by_hand_and_none_where_a_reward_does_not_fit():
    """Failure: a reward that has no value for a question is logged as a number, or takes the others with it."""
    logged = logged_values(HELPED)
    assert (logged["guarded"], logged["gated"]) == pytest.approx((1 / 8, 1 / 8), rel=1e-12)
    assert logged["masked_probability"] == pytest.approx(1 / 64, rel=1e-12)
    assert logged["option_margin_per_character"] == pytest.approx(0.5 * LN2, rel=1e-12)
    textual = dataclasses.replace(HELPED, gold_number=None, masked_logprobs=None, options=(), label=None)
    unfit = {"soft_numeric", "masked_probability", *PER_CHARACTER, *PER_CHARACTER.values()}
    values = logged_values(textual)
    assert {name for name, found in values.items() if found is None} == unfit
    assert {n: v for n, v in values.items() if v is not None} == {n: v for n, v in logged.items() if n not in unfit}


# --- advantages ---------------------------------------------------------------------------------------------------


def trl_lines() -> str:
    """From the installed trl/trainer/grpo_trainer.py: from rewards of each function to advantages."""
    [folder] = importlib.util.find_spec("trl").submodule_search_locations
    text = (Path(folder) / "trainer" / "grpo_trainer.py").read_text()
    first, last = "        unscorable_mask = ", "        advantages = torch.nan_to_num(advantages, nan=0.0)\n"
    assert text.count(first) == text.count(last) == 1, "TRL's code has changed; look at it and at advantages.py anew"
    return textwrap.dedent(text[text.index(first) : text.index(last) + len(last)])


TRL_LINES = compile(trl_lines(), "trl/trainer/grpo_trainer.py", "exec")


def trl_advantages(rewards: list[float | None], group_size: int, scale: str) -> list[float]:
    """TRL's own lines, with one reward function of weight 1, in double precision."""
    rewards_per_func = torch.tensor([[NAN if r is None else r] for r in rewards], dtype=torch.float64)
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1, dtype=torch.float64),
        scale_rewards=scale,
    )
    names = {"torch": torch, "nanstd": nanstd, "self": trainer, "device": torch.device("cpu")}
    names |= {"rewards_per_func": rewards_per_func, "num_generations": group_size}
    exec(TRL_LINES, names)
    return names["advantages"].tolist()


reward_value = st.none() | st.floats(-1e4, 1e4, allow_subnormal=False)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(st.integers(2, 5).flatmap(lambda g: st.tuples(st.just(g), st.lists(reward_value, min_size=g, max_size=6 * g))))
def test_advantages_are_trls(scale, sized):
    """Failure: the advantages in the run's tables are not those the policy was trained on."""
    group_size, rewards = sized
    rewards = rewards[: len(rewards) // group_size * group_size]
    expected = trl_advantages(rewards, group_size, scale)
    # Equal rewards have a rounding error for a standard deviation, which the 1e-4 below it makes harmless.
    assert grpo_advantages(rewards, group_size, scale) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # Groups (1, 3) and (0, 4): means 2 and 2, sample deviations sqrt 2 and 2 sqrt 2.
        ("group", [-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), -2 / (8**0.5 + 1e-4), 2 / (8**0.5 + 1e-4)]),
        # All four: mean 2, squares 1 + 1 + 4 + 4 over 3.
        ("batch", [x / ((10 / 3) ** 0.5 + 1e-4) for x in (-1, 1, -2, 2)]),
        ("none", [-1, 1, -2, 2]),
    ],
)
def test_advantages_by_hand(scale, expected):
    """Failure: population in place of sample deviation, or the batch's mean in place of the group's."""
    assert grpo_advantages([1.0, 3.0, 0.0, 4.0], 2, scale) == pytest.approx(expected, rel=1e-12)


def test_an_unscored_row_gets_nothing_and_takes_nothing():
    """Failure: None is read as reward 0, the best log-prob there is (TRL's nansum trap)."""
    advantages = grpo_advantages([-4.0, -2.0, None, -3.0], 4)
    assert advantages == pytest.approx([-1 / (1 + 1e-4), 1 / (1 + 1e-4), 0.0, 0.0], rel=1e-12)
    assert grpo_advantages([None, None, 1.0, None], 2, "batch") == [0.0] * 4


def test_rows_that_are_no_whole_groups_are_refused():
    """Failure: groups are cut at the wrong place, and questions are compared with one another."""
    with pytest.raises(ValueError, match="5 rewards are no whole number of groups of 4"):
        grpo_advantages([1.0] * 5, 4)


def test_groups_without_spread_are_counted_by_group():
    """Failure: under batch scaling a report says that no group is without gradient, as TRL's frac_reward_zero_std does;
    or a group with one scored row counts as one that trains."""
    rewards = [0.3] * 4 + [0.0, 0.0, 0.0, 1.0] + [None, None, None, 1.0] + [None, 1.0, 2.0, math.nan]
    assert no_spread_share(rewards, 4) == 0.5
    for scale in ("group", "batch", "none"):
        advantages = grpo_advantages(rewards, 4, scale)
        trains = [any(abs(a) > 1e-9 for a in advantages[start : start + 4]) for start in range(0, 16, 4)]
        assert trains == [False, True, False, True], scale


def test_a_scaling_that_trl_does_not_have_is_refused():
    """Failure: a KeyError('True') in the first step in place of a sentence."""
    with pytest.raises(ValueError, match="scale is 'True'; it can be group, batch, none"):
        grpo_advantages([1.0, 2.0], 2, "True")
