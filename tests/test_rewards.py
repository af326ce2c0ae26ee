"""The reward formulas against values computed by hand, and the advantages against TRL's own lines.

A failure means that runs are trained on, or compared by, another number than the one that is named.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from context_rl.rewards import REWARDS, RewardError, RewardInputs, all_rewards, grpo_advantages, make_reward

LN2 = math.log(2)

HELPED = RewardInputs((-LN2, -2 * LN2), (-3 * LN2, -4 * LN2), correct=True, answered_number=90.0, gold_number=100.0)
"""With the trace the two tokens have probability 1/2 and 1/4, without it 1/8 and 1/16."""

ABSOLUTE = ("logprob_sum", "logprob_mean", "probability")
OF_LIKELIHOOD = (
    *ABSOLUTE,
    *("gain", "probability_gain", "perplexity_improvement", "threshold", "sigmoid_threshold", "hybrid"),
)

logprob = st.floats(-1e4, 0)
inputs = st.integers(1, 6).flatmap(
    lambda n: st.builds(
        RewardInputs,
        token_logprobs=st.tuples(*[logprob] * n),
        baseline_logprobs=st.tuples(*[logprob] * n),
        correct=st.booleans(),
        answered_number=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        gold_number=st.floats(allow_nan=False, allow_infinity=False),
    )
)


def with_logprobs(token: list[float], baseline: list[float] | None = None) -> RewardInputs:
    return RewardInputs(tuple(token), tuple(baseline or token), False, None, None)


# --- every formula by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logprob_sum", -3 * LN2),
        ("logprob_mean", -1.5 * LN2),
        ("probability", 1 / 8),
        ("gain", 2 * LN2),
        ("probability_gain", 1 / 8 - 1 / 128),
        # Perplexity falls from 2^3.5 to 2^1.5: by three quarters.
        ("perplexity_improvement", 0.75),
        ("threshold", 1.0),
        ("sigmoid_threshold", 1 / (1 + math.exp(-2.5))),
        ("binary", 1.0),
        # |90 - 100| / (0.1 * 100) = 1
        ("soft_numeric", math.exp(-1)),
        ("hybrid", 0.5 * (1 / 8) + 0.5 * 1.0),
    ],
)
def test_each_formula_has_its_hand_computed_value(name, expected):
    """Failure: a wrong sign, a sum in a mean's place, a wrong base or a default that moved."""
    assert make_reward(name)(HELPED) == pytest.approx(expected, rel=1e-12)
    assert all_rewards(HELPED)[name] == pytest.approx(expected, rel=1e-12)


def test_every_formula_there_is_has_a_hand_computed_value():
    """Failure: a new formula came without a value in the table above."""
    (mark,) = test_each_formula_has_its_hand_computed_value.pytestmark
    assert [name for name, _ in mark.args[1]] == list(REWARDS)


def test_the_answers_length_divides_the_mean_and_not_the_sum():
    """Failure: long answers are worth less per token, or the mean is taken over something else."""
    x = with_logprobs([-1.0, -2.0, -6.0])
    assert make_reward("logprob_sum")(x) == -9
    assert make_reward("logprob_mean")(x) == -3
    assert make_reward("probability")(x) == pytest.approx(math.exp(-9), rel=1e-12)


@pytest.mark.parametrize(("tau", "expected"), [(0.74, 1.0), (0.76, 0.0), (0.0, 1.0)])
def test_the_threshold_pays_from_tau_on(tau, expected):
    assert make_reward("threshold", {"tau": tau})(HELPED) == expected


def test_a_trace_that_changes_nothing_reaches_a_threshold_of_nothing():
    """Failure: `>` in place of `>=`."""
    same = with_logprobs([-1.0, -2.0])
    assert make_reward("threshold", {"tau": 0.0})(same) == 1.0
    assert make_reward("threshold", {"tau": 1e-9})(same) == 0.0


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"tau": 0.55, "width": 0.2}, 1 / (1 + math.exp(-1))),
        ({"tau": 0.95, "width": 0.1}, 1 / (1 + math.exp(2))),
        ({"tau": 0.65}, 1 / (1 + math.exp(-1))),
    ],
)
def test_the_sigmoid_is_a_threshold_with_a_slope(params, expected):
    assert make_reward("sigmoid_threshold", params)(HELPED) == pytest.approx(expected, rel=1e-12)


def test_a_trace_that_hurts_has_a_negative_improvement_and_is_clipped_at_minus_100():
    """Failure: overflow, or one hopeless trace that outweighs every other in the batch."""
    hurt = with_logprobs([-2 * LN2], [-LN2])
    assert make_reward("perplexity_improvement")(hurt) == pytest.approx(1 - 2, rel=1e-12)
    assert make_reward("perplexity_improvement")(with_logprobs([-1e4], [0.0])) == pytest.approx(-100, rel=1e-12)


@pytest.mark.parametrize(
    ("answered", "gold", "params", "expected"),
    [
        (100.0, 100.0, {}, 1.0),
        (110.0, 100.0, {}, math.exp(-1)),
        (90.0, 100.0, {"tolerance": 0.05}, math.exp(-2)),
        (-90.0, -100.0, {}, math.exp(-1)),
        # Below one the distance is absolute: |0.3 - 0.2| / 0.1
        (0.3, 0.2, {}, math.exp(-1)),
        (0.1, 0.0, {}, math.exp(-1)),
        (None, 100.0, {}, 0.0),
    ],
)
def test_soft_numeric_by_hand(answered, gold, params, expected):
    """Failure: closeness that depends on the sign, or that divides by a gold answer of zero."""
    x = dataclasses.replace(HELPED, answered_number=answered, gold_number=gold)
    assert make_reward("soft_numeric", params)(x) == pytest.approx(expected, rel=1e-12)


def test_soft_numeric_refuses_a_gold_answer_without_a_number():
    """Failure: a data set of texts is trained on a constant."""
    textual = dataclasses.replace(HELPED, gold_number=None)
    with pytest.raises(RewardError, match="soft_numeric needs gold answers that are numbers"):
        make_reward("soft_numeric")(textual)
    values = all_rewards(textual)
    assert values["soft_numeric"] is None
    assert [name for name, value in values.items() if value is None] == ["soft_numeric"]


def test_hybrid_weighs_the_formulas_it_names():
    weights = {"logprob_mean": 2.0, "gain": -1.0, "binary": 0.25}
    assert make_reward("hybrid", weights)(HELPED) == pytest.approx(2 * -1.5 * LN2 - 2 * LN2 + 0.25, rel=1e-12)


@pytest.mark.parametrize(("correct", "expected"), [(True, 1.0), (False, 0.0)])
def test_binary_is_the_graders_verdict_and_nothing_else(correct, expected):
    x = dataclasses.replace(HELPED, correct=correct)
    assert make_reward("binary")(x) == expected


# --- bounds, sign, monotony ---------------------------------------------------------------------------------------

ROUNDING = 1e-12
BOUNDS = {
    "logprob_sum": (-math.inf, 0.0),
    "logprob_mean": (-math.inf, 0.0),
    "probability": (0.0, 1.0),
    "gain": (-math.inf, math.inf),
    "probability_gain": (-1.0, 1.0),
    "perplexity_improvement": (-100.0 - ROUNDING, 1.0),
    "threshold": (0.0, 1.0),
    "sigmoid_threshold": (0.0, 1.0),
    "binary": (0.0, 1.0),
    "soft_numeric": (0.0, 1.0),
    "hybrid": (0.0, 1.0),
}


@given(inputs)
def test_every_reward_is_finite_and_within_its_documented_bounds(x):
    """Failure: an infinity, which zeroes its group's advantages; or a docstring that promises too much."""
    values = all_rewards(x)
    assert values.keys() == BOUNDS.keys()
    for name, value in values.items():
        low, high = BOUNDS[name]
        assert math.isfinite(value), name
        assert low <= value <= high, name


@given(inputs, st.integers(0, 5), st.floats(0, 1e4))
def test_a_likelier_token_never_lowers_a_reward_of_the_likelihood(x, position, step):
    """Failure: the sign. -log p would train the opposite of what is meant."""
    position %= len(x.token_logprobs)
    likelier = list(x.token_logprobs)
    likelier[position] = min(0.0, likelier[position] + step)
    other = dataclasses.replace(x, token_logprobs=tuple(likelier))
    for name in OF_LIKELIHOOD:
        assert make_reward(name)(other) >= make_reward(name)(x), name


@pytest.mark.parametrize("name", [n for n in OF_LIKELIHOOD if n != "threshold"])
def test_a_likelier_answer_is_worth_more(name):
    """Failure: the sign, or a reward that does not look at the answer's log-prob at all."""
    worse, better = with_logprobs([-2.0, -2.0], [-2.0, -2.0]), with_logprobs([-1.9, -2.0], [-2.0, -2.0])
    assert make_reward(name)(better) > make_reward(name)(worse)


@pytest.mark.parametrize("name", ["gain", "probability_gain", "perplexity_improvement"])
def test_relative_rewards_are_zero_where_the_trace_changes_nothing(name):
    """Failure: the baseline is not the same tokens' log-prob."""
    assert make_reward(name)(with_logprobs([-0.3, -2.0, -0.7])) == 0


def test_gain_and_mean_log_prob_are_the_same_experiment_under_group_scaling():
    """Failure: the docstring of `gain` no longer holds, and an ablation compares other things than it says."""
    rows = [with_logprobs([a, -1.0], [-2.0, -0.5]) for a in (-0.1, -0.5, -3.0, -1.0)]
    gain, mean = ([make_reward(name)(x) for x in rows] for name in ("gain", "logprob_mean"))
    assert grpo_advantages(gain, 4) == pytest.approx(grpo_advantages(mean, 4), abs=1e-9)
    assert gain != mean


# --- names and parameters -----------------------------------------------------------------------------------------


def test_an_unknown_reward_names_all_there_are():
    with pytest.raises(RewardError) as caught:
        make_reward("probabilty")
    assert str(caught.value) == f"no reward is called 'probabilty'; there are: {', '.join(REWARDS)}"


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("threshold", {"tua": 1.0}, "reward 'threshold' takes no 'tua'; it takes: tau"),
        ("sigmoid_threshold", {"x": 1.0}, "reward 'sigmoid_threshold' takes no 'x'; it takes: tau, width"),
        ("probability", {"tau": 1.0}, "reward 'probability' takes no 'tau'; it takes: no parameters"),
        (
            "hybrid",
            {"prob": 1.0},
            f"reward 'hybrid' takes no 'prob'; it takes: {', '.join(n for n in REWARDS if n != 'hybrid')}",
        ),
        ("threshold", {"tau": "high"}, "reward 'threshold': tau must be a finite number, not 'high'"),
        ("threshold", {"tau": True}, "reward 'threshold': tau must be a finite number, not True"),
        ("threshold", {"tau": math.nan}, "reward 'threshold': tau must be a finite number, not nan"),
        ("threshold", {"tau": math.inf}, "reward 'threshold': tau must be a finite number, not inf"),
        ("threshold", {"tau": None}, "reward 'threshold': tau must be a finite number, not None"),
    ],
)
def test_a_wrong_parameter_is_named_with_those_that_exist(name, params, message):
    """Failure: a misspelt parameter leaves the default in force without a word."""
    with pytest.raises(RewardError) as caught:
        make_reward(name, params)
    assert str(caught.value) == message


def test_hybrid_does_not_contain_itself():
    """Failure: endless recursion at the first trace."""
    with pytest.raises(RewardError, match="takes no 'hybrid'"):
        make_reward("hybrid", {"hybrid": 1.0})


@pytest.mark.parametrize("value", [0, -0.1])
@pytest.mark.parametrize(("name", "key"), [("sigmoid_threshold", "width"), ("soft_numeric", "tolerance")])
def test_a_scale_that_is_not_positive_is_refused_before_the_run(name, key, value):
    """Failure: a run that dies at its first step, or (negative width) rewards traces that hide the answer."""
    with pytest.raises(RewardError, match=key):
        make_reward(name, {key: value})


# --- advantages ---------------------------------------------------------------------------------------------------


def trl_advantages(rewards: list[float | None], group_size: int, scale: str) -> list[float]:
    """trl/trainer/grpo_trainer.py 1.16, `_generate_and_score_completions`, sum_then_normalize, one function."""
    rewards_per_func = torch.tensor([[math.nan if r is None else r] for r in rewards], dtype=torch.float64)
    unscorable = torch.isnan(rewards_per_func).all(dim=1)
    r = (rewards_per_func * torch.ones(1, 1)).nansum(dim=1)
    r[unscorable] = torch.nan
    means = torch.nanmean(r.view(-1, group_size), dim=1).repeat_interleave(group_size, dim=0)
    if scale in ["group", "none"]:
        std = nanstd(r.view(-1, group_size), dim=1).repeat_interleave(group_size, dim=0)
    else:
        std = nanstd(r).expand_as(r)
    advantages = r - means
    if scale != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).tolist()


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
