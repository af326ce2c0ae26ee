"""Rewards that move: thresholds by the share of the training or by the values seen of late, and what they remember.

A failure means that a run trains on another threshold than its recipe says, or that a resumed run is not the run that
was interrupted.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_reward_compose import NUMBER, rows_of

from context_rl.rewards import ARMS, Reward, RewardError
from context_rl.rewards.schedules import Schedule, cosine, linear, quantile


def rewards_of(reward: Reward, *numbers: float, progress: float = 0.0, groups: list[int] | None = None) -> list[float]:
    return reward(rows_of(*numbers), groups or [0] * len(numbers), progress)


# --- by the share of the training ---------------------------------------------------------------------------------

ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("tau", "at"),
    [
        (0.3, {0.0: 0.3, 0.5: 0.3, 1.0: 0.3}),
        ({"linear": [0.1, 0.9]}, {-0.1: 0.1, 0.0: 0.1, 0.25: 0.3, 0.5: 0.5, 1.0: 0.9, 1.1: 0.9}),
        ({"linear": [2, -2]}, {0.0: 2, 0.75: -1, 1.0: -2}),
        ({"linear": [0.1, 0.9], "until": 0.5}, {0.0: 0.1, 0.125: 0.3, 0.25: 0.5, 0.5: 0.9, 0.75: 0.9, 1.0: 0.9}),
        # 0.9 - 0.8 (1 + cos(pi / 4)) / 2, with cos(pi / 4) the root of a half.
        (
            {"cosine": [0.1, 0.9]},
            {-0.1: 0.1, 0.0: 0.1, 0.25: 0.5 - 0.4 * ROOT, 0.5: 0.5, 0.75: 0.5 + 0.4 * ROOT, 1.0: 0.9, 1.1: 0.9},
        ),
        ({"cosine": [1, 0]}, {0.0: 1, 1 / 3: 0.75, 2 / 3: 0.25, 1.0: 0}),
        ({"cosine": [0.1, 0.9], "until": 0.5}, {0.0: 0.1, 0.125: 0.5 - 0.4 * ROOT, 0.25: 0.5, 0.5: 0.9, 1.0: 0.9}),
    ],
)
def test_a_threshold_stands_where_its_schedule_says(tau, at):
    """Failure: it moves the other way, too fast, not at all, or on after `until`."""
    schedule = Schedule(tau, "tau")
    for progress, expected in at.items():
        assert schedule.at([7.0], progress) == pytest.approx(expected, rel=1e-12, abs=1e-12), progress
    assert schedule.moves == isinstance(tau, dict)


@given(st.sampled_from([linear, cosine]), st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 1), st.floats(0, 1))
def test_a_schedule_stays_between_its_ends_and_goes_one_way(curve, start, end, one, other):
    """Failure: a threshold overshoots what was asked for."""
    early, late = (curve(start, end, done) for done in sorted((one, other)))
    low, high = min(start, end) - 1e-12, max(start, end) + 1e-12
    assert low <= early <= high
    assert low <= late <= high
    assert (late - early) * (1 if end > start else -1) >= -1e-12


@pytest.mark.parametrize(
    ("kind", "paid"),
    [
        # tau at 0, 1/4, 1/2 and 1: 0, 0.25, 0.5, 1 and 0, 0.146, 0.5, 1.
        ("linear", {0.0: [1, 1, 1, 1], 0.25: [0, 0, 1, 1], 0.5: [0, 0, 1, 1], 1.0: [0, 0, 0, 1]}),
        ("cosine", {0.0: [1, 1, 1, 1], 0.25: [0, 1, 1, 1], 0.5: [0, 0, 1, 1], 1.0: [0, 0, 0, 1]}),
    ],
)
def test_a_scheduled_threshold_pays_from_where_it_stands_on(kind, paid):
    """Failure: the reward's threshold does not get the training's progress."""
    reward = Reward({"threshold": {"of": NUMBER, "tau": {kind: [0, 1]}}})
    for progress, expected in paid.items():
        assert rewards_of(reward, 0, 0.2, 0.5, 1, progress=progress) == expected
    assert reward.thresholds == {"tau": 1}


def test_the_slope_of_a_sigmoid_threshold_moves_with_it():
    """Failure: only hard thresholds move."""
    reward = Reward({"sigmoid_threshold": {"of": NUMBER, "tau": {"linear": [0, 4]}, "width": 2}})
    assert rewards_of(reward, 1, progress=0.25) == [0.5]
    assert rewards_of(reward, 4, progress=0.5) == pytest.approx([1 / (1 + math.exp(-1))], rel=1e-12)


# --- by the values of late ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([4, 1, 3, 2], 0, 1),
        ([4, 1, 3, 2], 1, 4),
        ([4, 1, 3, 2], 0.5, 2.5),
        # 0.7 of the three steps from 1 to 4.
        ([4, 1, 3, 2], 0.7, 3.1),
        ([5], 0.7, 5),
        ([1, 1, 2], 0.5, 1),
    ],
)
def test_a_quantile_by_hand(values, q, expected):
    """Failure: off by one place, or without interpolation."""
    assert quantile(values, q) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_the_quantile_is_numpys(values, q):
    """Failure: another of the nine definitions than the docstring names."""
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-9)


def test_a_quantile_of_nothing_is_refused():
    """Failure: a threshold of 0 out of nowhere."""
    with pytest.raises(ValueError, match="no values have no quantile"):
        quantile([], 0.5)


def test_a_quantile_threshold_keeps_up_with_the_values_and_forgets_those_before_its_window():
    """Failure: the present batch does not count, old batches count for ever, or the window has another length."""
    reward = Reward({"threshold": {"of": NUMBER, "tau": {"quantile": 0.5, "window": 4}}})
    assert rewards_of(reward, 1, 2) == [0, 1]
    assert reward.thresholds == {"tau": 1.5}
    assert rewards_of(reward, 3, 4) == [1, 1]
    assert reward.thresholds == {"tau": 2.5}
    # The window is now 3, 4, 5, 2.
    assert rewards_of(reward, 5, 2) == [1, 0]
    assert reward.thresholds == {"tau": 3.5}
    assert reward.state == [[3, 4, 5, 2]]
    assert rewards_of(reward, *[9] * 4) == [1] * 4
    assert rewards_of(reward, 8) == [0]


@pytest.mark.parametrize("window", [1, 7, 1024])
def test_a_window_is_as_long_as_it_says(window):
    """Failure: memory and checkpoints grow with the run, or a quantile of fewer values jumps about."""
    reward = Reward({"threshold": {"of": NUMBER, "tau": {"quantile": 0.7, "window": window}}})
    for batch in range(300):
        rewards_of(reward, *range(5 * batch, 5 * batch + 5))
    assert reward.state == [[float(n) for n in range(1500 - window, 1500)]]


def test_a_window_is_1024_values_long_unless_said_otherwise():
    """Failure: the default is not that of the docstring."""
    reward = Reward({"threshold": {"of": NUMBER, "tau": {"quantile": 0.7}}})
    rewards_of(reward, *range(2000))
    assert reward.state == [[float(n) for n in range(976, 2000)]]


def test_unscored_rows_do_not_enter_the_window():
    """Failure: a failed score moves the threshold."""
    reward = Reward({"threshold": {"of": NUMBER, "tau": {"quantile": 0.5}}})
    one, two = rows_of(1, 2)
    assert reward([None, one, None, two], [0] * 4) == [None, 0, None, 1]
    assert reward([None, None], [0, 0]) == [None, None]
    assert reward.state == [[1, 2]]


def test_each_moving_threshold_has_a_name_of_its_own():
    """Failure: one threshold's curve hides another's in the logs, or a filter before it takes its name."""
    moving = {
        name: {"weight": 1, "of": NUMBER, "tau": {"linear": [start, 9]}}
        for name, start in (("threshold", 1), ("sigmoid_threshold", 2))
    }
    reward = Reward({"hybrid": {"spread_filter": {"weight": 1, "of": NUMBER}, **moving}})
    assert reward.thresholds == {}
    rewards_of(reward, 0)
    assert reward.thresholds == {"tau": 1, "tau2": 2}
    fixed = Reward({"threshold": {"of": NUMBER, "tau": 1}})
    rewards_of(fixed, 0)
    assert fixed.thresholds == {}


# --- RLPR's filter ------------------------------------------------------------------------------------------------


def test_the_spread_filters_running_mean_by_hand():
    """Failure: the mean starts at 0, moves by `decay` in place of 1 - `decay`, or does not count the present batch."""
    spec = {"of": NUMBER, "beta": 0.5, "decay": 0.9}
    reward = Reward({"spread_filter": spec})
    # Two rows d apart have a standard deviation of d / sqrt 2. Means: 6; 6 * 0.9 + 2.4 * 0.1 = 5.64.
    assert rewards_of(reward, 0, 2, 0, 10, groups=[0, 0, 1, 1]) == [1, 1, 0, 10]
    assert reward.state == [[pytest.approx(6 * ROOT)]]
    assert rewards_of(reward, 0, 2.4) == [1.2, 1.2]
    assert reward.state == [[pytest.approx(5.64 * ROOT)]]
    # 5.64 * 0.9 + 2.9 * 0.1 = 5.366, half of it 2.683.
    assert rewards_of(reward, 0, 2.9) == [0, 2.9]
    # Without memory, a group that is alone in its batch is its own mean.
    forgetful = Reward({"spread_filter": spec | {"decay": 0}})
    rewards_of(forgetful, 0, 10)
    assert rewards_of(forgetful, 0, 0.1) == [0, 0.1]


def test_unscored_rows_do_not_enter_the_spread():
    """Failure: a failed score counts as a trace without spread."""
    reward = Reward({"spread_filter": {"of": NUMBER}})
    zero, two, four = rows_of(0, 2, 4)
    values = reward([zero, None, four, two, None, four, None, None], [0, 0, 0, 1, 1, 1, 2, 2])
    assert values == [0, None, 4, 2, None, 4, None, None]
    assert reward.state == [[pytest.approx(3 * ROOT)]]


# --- a resumed run ------------------------------------------------------------------------------------------------

QUANTILE = {"threshold": {"of": NUMBER, "tau": {"quantile": 0.7, "window": 40}}}
FILTER = {"spread_filter": {"of": NUMBER, "beta": 0.9}}
OPEN = {"length_band": {"low": 0}}
REMEMBERING = {
    "quantile": QUANTILE,
    "sigmoid": {"sigmoid_threshold": {"of": NUMBER, "tau": {"quantile": 0.3, "window": 25}}},
    "filter": FILTER,
    "both": {
        "hybrid": {
            "threshold": {"weight": 1, **QUANTILE["threshold"]},
            "spread_filter": {"weight": 0.5, **FILTER["spread_filter"]},
        }
    },
    "deep": {
        "gated": {"of": {"fallback": {"first": QUANTILE, "of": {"clip": {"of": FILTER, "low": 0}}}}, "gate": OPEN}
    },
    "filter of a quantile": {"spread_filter": {"of": QUANTILE}},
    "threshold of a filter": {"threshold": {"of": FILTER, "tau": {"quantile": 0.5}}},
}


def batch_of(step: int) -> tuple[list, list[int]]:
    """Four groups of drifting values, whose spread differs between groups and falls from step to step."""
    rng = np.random.default_rng(step)
    numbers = rng.normal(step / 5, np.repeat(1 + rng.random(4), 4) * 5 / (1 + step))
    return rows_of(*numbers), [n // 4 for n in range(16)]


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("interrupted", [1, 7])
def test_a_resumed_reward_goes_on_as_if_nothing_had_happened(name, interrupted):
    """Failure: N steps and a restart are another experiment than an uninterrupted run."""
    spec, steps = REMEMBERING[name], 20
    whole, first = Reward(spec), Reward(spec)
    expected = [whole(*batch_of(step), step / steps) for step in range(steps)]
    before = [first(*batch_of(step), step / steps) for step in range(interrupted)]
    resumed = Reward(spec)
    resumed.state = json.loads(json.dumps(first.state))
    after = [resumed(*batch_of(step), step / steps) for step in range(interrupted, steps)]
    assert before + after == expected
    assert resumed.state == whole.state
    assert resumed.thresholds == whole.thresholds


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_a_reward_remembers_makes_a_difference(name):
    """Failure: the test above compares rewards that remember nothing."""
    first, forgetful = Reward(REMEMBERING[name]), Reward(REMEMBERING[name])
    expected = [first(*batch_of(step)) for step in range(20)][7:]
    assert [forgetful(*batch_of(step)) for step in range(7, 20)] != expected


def test_reading_the_state_changes_nothing_and_it_does_not_change_with_the_reward():
    """Failure: a checkpoint that is written later than it was taken holds another step's state."""
    reward = Reward(QUANTILE)
    rewards_of(reward, 1, 2)
    kept = reward.state
    rewards_of(reward, 3)
    assert kept == [[1, 2]]
    assert reward.state == reward.state == [[1, 2, 3]]


def test_loading_a_state_replaces_what_was_there():
    """Failure: a reward that was tried out before the run starts with the trial's values in its window."""
    for spec, state in ((QUANTILE, [[5.0, 6.0]]), (FILTER, [[2.5]]), (FILTER, [[]])):
        reward = Reward(spec)
        rewards_of(reward, 100, 200)
        reward.state = state
        assert reward.state == state


@pytest.mark.parametrize("spec", [s for s in ARMS.values() if Reward(s).alone], ids=str)
def test_a_reward_that_is_alone_remembers_nothing(spec):
    """Failure: state hides in a reward that is compared offline row by row."""
    assert Reward(spec).state == []


def test_the_state_of_another_reward_is_refused():
    """Failure: a resumed run whose recipe was changed starts with no window, or with another reward's."""
    with pytest.raises(RewardError, match=r"a state of 1 parts is no state of reward 'hybrid.*', which has 2"):
        Reward(REMEMBERING["both"]).state = [[1.0]]


# --- what a recipe can get wrong ----------------------------------------------------------------------------------

ONE_OF = "it can be a number or a mapping with one of linear, cosine, quantile"


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        ({}, f"tau is {{}}; {ONE_OF}"),
        ({"lineal": [0, 1]}, f"tau is {{'lineal': [0, 1]}}; {ONE_OF}"),
        ({"linear": [0, 1], "cosine": [0, 1]}, f"tau is {{'linear': [0, 1], 'cosine': [0, 1]}}; {ONE_OF}"),
        ([0, 1], "tau must be a finite number, not [0, 1]"),
        (math.inf, "tau must be a finite number, not inf"),
        ({"linear": 1}, "tau: linear is 1; it must be [start, end]"),
        ({"linear": [0, 1, 2]}, "tau: linear is [0, 1, 2]; it must be [start, end]"),
        ({"linear": [0, "1"]}, "tau: linear must be a finite number, not '1'"),
        ({"cosine": [True, 1]}, "tau: cosine must be a finite number, not True"),
        ({"cosine": [0, math.nan]}, "tau: cosine must be a finite number, not nan"),
        ({"cosine": [0, 1], "until": 0}, "tau: until is 0; it must lie between 1e-09 and 1"),
        ({"cosine": [0, 1], "until": 50}, "tau: until is 50; it must lie between 1e-09 and 1"),
        ({"cosine": [0, 1], "window": 5}, "tau: cosine takes no 'window'"),
        ({"quantile": 0.5, "until": 0.5}, "tau: quantile takes no 'until'"),
        ({"quantile": 70}, "tau: quantile is 70; it must lie between 0 and 1"),
        ({"quantile": [0, 1]}, "tau: quantile must be a finite number, not [0, 1]"),
        ({"quantile": 0.5, "window": 0}, "tau: window is 0; it must lie between 1 and 1e+09"),
        ({"quantile": 0.5, "window": 2.5}, "tau: window is 2.5; it must be a whole number"),
        ({"quantile": 0.5, "window": None}, "tau: window must be a finite number, not None"),
        ({"quantile": 0.5, 1: 2}, "tau: quantile takes no 1"),
    ],
)
def test_a_malformed_schedule_is_refused_in_words(tau, message):
    """Failure: a threshold stands still, or somewhere else, without a word."""
    for spec in ({"threshold": {"tau": tau}}, {"hybrid": {"sigmoid_threshold": {"weight": 1, "tau": tau}}}):
        with pytest.raises(RewardError) as caught:
            Reward(spec)
        assert str(caught.value) == message
