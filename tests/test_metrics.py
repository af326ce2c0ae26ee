"""The numbers of an evaluation and their intervals. A failure means that a table claims a precision it does not have,
or a difference that is none."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics import bootstrap_interval, paired_difference, summarise, wilson_interval

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # At 0/n the interval is [0, z^2 / (n + z^2)], at n/n its mirror image.
        (0, 10, 0.0, Z**2 / (10 + Z**2)),
        (10, 10, 10 / (10 + Z**2), 1.0),
        # At 1/2 it is 1/2 -+ z / (2 sqrt(n + z^2)).
        (50, 100, 0.5 - Z / (2 * math.sqrt(100 + Z**2)), 0.5 + Z / (2 * math.sqrt(100 + Z**2))),
    ],
)
def test_wilsons_interval_by_hand(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_as_published(successes, n, low, high):
    """Failure: another interval than Wilson's without continuity correction."""
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_inside_0_and_1_holds_the_proportion_and_has_a_width(case):
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= successes / n <= high + 1e-12
    mirrored = wilson_interval(n - successes, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


def test_no_items_have_no_interval():
    """Failure: 0/0 becomes a number."""
    with pytest.raises(ValueError, match="no item"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="no item"):
        bootstrap_interval([])


def test_the_bootstrap_interval_is_near_the_normal_one_on_a_large_sample():
    """Failure: the interval of the values in place of their mean's, or 90 % in place of 95 %."""
    values = np.random.default_rng(1).exponential(2.0, 4000)
    error = values.std(ddof=1) / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert (low - values.mean()) / error == pytest.approx(-Z, abs=0.12)
    assert (high - values.mean()) / error == pytest.approx(Z, abs=0.12)


def test_the_bootstrap_interval_is_the_same_every_time_and_depends_on_its_seed():
    values = list(range(40))
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([3.0] * 10) == (3.0, 3.0)


def rows(correct: list[bool | None], logprobs: list[float | None] | None = None) -> list[dict]:
    logprobs = logprobs or [None if c is None else -1.0 for c in correct]
    return [
        {"correct": c, "logprob": p, "unscored": "too long" if p is None else None}
        for c, p in zip(correct, logprobs, strict=True)
    ]


def test_the_paired_difference_covers_nothing_in_95_of_100_experiments_without_an_effect():
    """Failure: "better" is shown where nothing changed (too narrow), or nothing can ever be shown (too wide)."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        # Two arms on 200 items: they share an item's difficulty and differ by chance only.
        difficulty = rng.uniform(0, 1, 200)
        a, b = (rng.uniform(0, 1, 200) < difficulty for _ in range(2))
        low, high = paired_difference(rows(a.tolist()), rows(b.tolist()), "correct")["ci"]
        covered += low <= 0 <= high
    assert 0.92 * 300 <= covered <= 0.98 * 300


def test_the_paired_difference_by_hand():
    """Failure: the sign, or items that only one side scored."""
    a = rows([True, True, False, None, True], [-1.0, -2.0, -3.0, None, -1.0])
    b = rows([False, True, True, True, None], [-2.0, -2.5, -1.0, -9.0, None])
    assert paired_difference(a, b, "correct")["difference"] == 0
    found = paired_difference(a, b, "logprob")
    assert found["n"] == 3
    assert found["difference"] == pytest.approx((1 + 0.5 - 2) / 3, rel=1e-12)
    assert found["ci"][0] < found["difference"] < found["ci"][1]
    assert paired_difference(b, a, "logprob")["difference"] == pytest.approx(-found["difference"], rel=1e-12)


def test_pairing_makes_the_interval_narrow():
    """Failure: the arms are resampled one by one, and an effect on every item is lost among their differences."""
    logprobs = [-float(i) for i in range(100)]
    a, b = rows([True] * 100, [p + 0.1 for p in logprobs]), rows([True] * 100, logprobs)
    assert paired_difference(a, b, "logprob")["ci"] == pytest.approx([0.1, 0.1], abs=1e-9)


def test_arms_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        paired_difference(rows([True, True]), rows([True]), "correct")


def test_a_difference_over_no_common_items_is_a_value_error_like_the_others():
    with pytest.raises(ValueError, match="no item"):
        paired_difference(rows([True, None]), rows([None, True]), "correct")


def test_a_summary_counts_what_was_not_scored_and_leaves_it_out_of_every_mean():
    """Failure: an unscored item counts as a wrong answer or as probability one."""
    found = summarise(rows([True, None, False, True, None], [-1.0, None, -3.0, -0.5, None]))
    assert found["n"] == 3
    assert found["unscored"] == 2
    assert found["accuracy"] == pytest.approx(2 / 3, rel=1e-12)
    assert found["mean_logprob"] == pytest.approx(-1.5, rel=1e-12)
    assert found["accuracy_ci"] == list(wilson_interval(2, 3))
    assert found["mean_logprob_ci"] == list(bootstrap_interval([-1.0, -3.0, -0.5]))


def test_a_condition_without_a_single_score_is_an_error_with_its_reason():
    """Failure: an accuracy of nothing."""
    with pytest.raises(ValueError, match="none of 2 items could be scored: too long"):
        summarise(rows([None, None]))
    with pytest.raises(ValueError, match="none of 0 items could be scored: no items"):
        summarise([])
