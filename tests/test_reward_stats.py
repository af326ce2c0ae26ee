"""The reward bench's statistics, by hand and by brute force. A failure means that a formula is recommended, or thrown
away, for a number that is wrong."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from eval import reward_stats
from eval.reward_stats import (
    AgreementStatistics,
    ClusterSums,
    DropStatistics,
    GroupStatistics,
    auc,
    average_ranks,
    cluster_of,
    has_no_spread,
    rank_correlation,
    ratio,
    spread_squares,
)

FEW = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0])
"""Few values, so that there are ties."""


def ranks_by_brute_force(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [sum(place + 1 for place, v in enumerate(ordered) if v == value) / ordered.count(value) for value in values]


def spearman_by_brute_force(xs: list[float], ys: list[float]) -> float | None:
    a, b = ranks_by_brute_force(xs), ranks_by_brute_force(ys)
    mean = (len(a) + 1) / 2
    sizes = [sum((v - mean) ** 2 for v in ranks) for ranks in (a, b)]
    if 0 in sizes:
        return None if sizes == [0, 0] else 0.0
    return sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True)) / math.sqrt(sizes[0] * sizes[1])


def auc_by_brute_force(values: list[float], right: list[bool]) -> float:
    pairs = [
        (a, b) for a, r in zip(values, right, strict=True) for b, s in zip(values, right, strict=True) if r and not s
    ]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def array(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=float)


# --- of one group ---


@given(st.lists(FEW, min_size=2, max_size=9))
def test_ranks_as_by_counting(values):
    """Ties get the first's or the last's rank instead of their mean: correlations of thresholded rewards are off."""
    assert average_ranks(np.array(values)).tolist() == ranks_by_brute_force(values)


@given(st.lists(st.tuples(FEW, FEW), min_size=2, max_size=9))
def test_rank_correlation_as_by_its_definition(pairs):
    """Spearman's rho is wrong with ties, or a constant reward gets a correlation that it does not have."""
    xs, ys = map(list, zip(*pairs, strict=True))
    rho, known = rank_correlation(average_ranks(array(xs)), average_ranks(np.array(ys)))
    expected = spearman_by_brute_force(xs, ys)
    assert known[0] == (expected is not None)
    if expected is not None:
        assert rho[0] == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_by_hand():
    """The textbook's value without ties, 1 - 6 sum d^2 / (n (n^2 - 1)), is not found."""
    rho, _ = rank_correlation(average_ranks(array([1, 2, 3, 4, 5])), average_ranks(np.array([2.0, 1, 4, 3, 5])))
    assert rho[0] == pytest.approx(1 - 6 * 4 / (5 * 24))


@given(st.lists(st.tuples(FEW, st.booleans()), min_size=2, max_size=9).filter(lambda g: len({r for _, r in g}) == 2))
def test_auc_as_by_counting_pairs(group):
    """Ties count whole or not at all, or right and wrong are exchanged."""
    values, right = map(list, zip(*group, strict=True))
    assert auc(average_ranks(array(values)), np.array(right))[0] == pytest.approx(auc_by_brute_force(values, right))


@pytest.mark.parametrize(
    "group",
    [
        [0.5] * 8,
        [0.5] * 7 + [0.5 + 1e-10],  # one number in float32
        [0.3] * 7 + [0.3 + 1e-5],
        [0.0] * 7 + [1e-8],
        [0.0] * 7 + [1e-6],
        [-1e6, -1e6, -1e6, -1e6 + 0.01],
        [1.0, 0.0, 1.0, 1.0],
    ],
)
def test_no_spread_is_what_trl_logs(group):
    """The share of groups without spread is not the frac_reward_zero_std that a training run would show."""
    std = nanstd(torch.tensor(group, dtype=torch.float32))
    assert bool(has_no_spread(array(group))[0]) == bool(torch.isclose(std, torch.zeros(())))


def test_equal_values_have_exactly_no_spread():
    """The mean of equal values is off by rounding: a constant reward falls by 10^16 standard deviations, or counts as
    having spread, as it does in TRL's log (eight times 0.3 in float32: 3e-8)."""
    assert spread_squares(np.full((1, 7), 0.1))[0] == 0.0
    assert has_no_spread(array([0.3] * 8))[0]
    assert nanstd(torch.full((8,), 0.3)) > reward_stats.ZERO_STD, "TRL has mended this; say so in has_no_spread"


# --- sums and intervals ---


def groups_of(seed: int, questions: int = 40, repeats: int = 3) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(cluster, rewards of three formulas, right or wrong, tokens): rightness itself, chance, the length."""
    rng = np.random.default_rng(seed)
    found = []
    for question, _ in itertools.product(range(questions), range(repeats)):
        right, tokens = rng.random(8) < 0.4, rng.permutation(8) + 5.0
        found.append((question, np.array([right, rng.random(8), tokens]), right, tokens))
    return found


def statistics_of(groups, clusters: int = 40) -> GroupStatistics:
    statistics = GroupStatistics(["right", "chance", "length"], clusters)
    for cluster, values, right, tokens in groups:
        statistics.add(cluster, values, right, tokens, values)
    return statistics


def test_planted_facts_are_found():
    """A formula that is rightness is not seen to rank perfectly, or one of chance or of length is not seen to be it."""
    found = statistics_of(groups_of(0)).results()
    assert found["right"]["auc"].value == 1.0
    assert found["right"]["rank"].value == pytest.approx(1.0)
    low, high = found["chance"]["auc"].ci
    assert low < 0.5 < high
    assert high - low < 0.15
    low, high = found["chance"]["length"].ci
    assert low < 0 < high
    assert found["length"]["length"].value == pytest.approx(1.0)
    assert found["length"]["no_spread"].value == 0.0


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """The 95 % intervals are those of something else: too narrow, too wide, or beside it."""
    held = []
    for seed in range(60):
        low, high = statistics_of(groups_of(seed, questions=30)).results()["chance"]["auc"].ci
        held.append(low <= 0.5 <= high)
    assert sum(held) >= 50


def test_groups_of_a_question_are_not_counted_as_independent():
    """Many steps on the same questions make an interval narrow, although no new question was seen."""
    groups = groups_of(1, repeats=1)
    once, often = statistics_of(groups).results(), statistics_of(groups * 4).results()
    assert often["chance"]["auc"].value == pytest.approx(once["chance"]["auc"].value)
    assert often["chance"]["auc"].ci == pytest.approx(once["chance"]["auc"].ci)
    assert often["chance"]["auc"].groups == 4 * once["chance"]["auc"].groups


def test_streamed_sums_are_the_means_over_all_groups():
    """Sums over clusters lose or double a group: the stream says something else than all groups at once."""
    groups = groups_of(2)
    found = statistics_of(groups).results()["chance"]
    mixed = [g for g in groups if 0 < g[2].sum() < 8]
    aucs = [auc_by_brute_force(list(values[1]), list(right)) for _, values, right, _ in mixed]
    ranks = [spearman_by_brute_force(list(values[1]), list(map(float, right))) for _, values, right, _ in mixed]
    lengths = [spearman_by_brute_force(list(values[1]), list(tokens)) for _, values, _, tokens in groups]
    for name, values in {"auc": aucs, "rank": ranks, "length": lengths}.items():
        assert found[name].value == pytest.approx(sum(values) / len(values)), name
        assert found[name].groups == len(values)


def test_masking_is_measured_in_the_spread_of_the_groups():
    """The difference is not in units of the within-group std, or its sign says that leaks cost reward."""
    statistics = GroupStatistics(["a", "b"], 2)
    values = array([1, 2, 3, 4], [0, 0, 1, 1])
    masked = array([0, 1, 2, 3], [math.nan] * 4)
    for cluster in (0, 1):
        statistics.add(cluster, values, [True, False, True, False], [1, 2, 3, 4], masked)
    found = statistics.results()
    assert found["a"]["masking"].value == pytest.approx(1 / math.sqrt(5 / 3))
    assert found["a"]["masked_auc"].value == pytest.approx(0.25)
    assert found["b"]["masking"].value is None, "masking does not apply"
    assert found["b"]["masked_auc"].value is None
    assert found["b"]["auc"].value == pytest.approx(0.5)


def test_a_formula_that_does_not_fit_spoils_no_other():
    """NaN of one formula gets into the sums of the others."""
    groups = groups_of(3)
    clean = statistics_of(groups).results()
    holes = [(c, np.where([[False], [True], [False]], math.nan, v), r, t) for c, v, r, t in groups]
    found = statistics_of(holes).results()
    for name in ("right", "length"):
        assert found[name] == clean[name]
    assert all(estimate.value is None for estimate in found["chance"].values())


def test_a_group_of_one_trace_and_no_groups_at_all_say_nothing():
    """A lone trace divides by zero, or a run without mixed groups gets an AUC."""
    statistics = GroupStatistics(["a"], 1)
    statistics.add(0, array([1.0]), [True], [3])
    assert all(e.value is None and e.ci is None for e in statistics.results()["a"].values())
    statistics.add(0, array([1.0, 2.0]), [True, True], [3, 3])
    found = statistics.results()["a"]
    assert found["auc"].value is None, "no wrong trace"
    assert found["length"].value is None, "all of one length"
    assert found["no_spread"].value == 0.0
    assert found["no_spread"].ci is None, "one question has no interval"


def test_drops_by_hand():
    """Drops are means of standardised groups (which explode), or in the spoilt traces' spread."""
    drops = DropStatistics(["a", "flat"], 3)
    drops.add(0, array([0, 2], [1, 1]), array([0, 0], [0, 0]))
    drops.add(1, array([5, 5, 8], [1, 1, 1]), array([4, 4, 4], [0, 0, 0]))
    drops.add(2, np.zeros((2, 0)), np.zeros((2, 0)))  # none of its traces was scored
    found = drops.results()
    assert found["a"].value == pytest.approx((2 + 6) / 5 / math.sqrt((2 + 6) / (1 + 2)))
    assert found["a"].groups == 2
    assert found["flat"].value is None, "no spread, no unit"


def test_agreement_by_hand():
    """Agreement counts groups in which neither scorer tells traces apart, or is not a rank correlation."""
    agreement = AgreementStatistics(["a"], 4)
    agreement.add(0, array([1, 2, 3]), array([10, 20, 30]))
    agreement.add(1, array([1, 2, 3]), array([3, 2, 1]))
    agreement.add(2, array([1, 2, 3]), array([5, 5, 5]))
    agreement.add(3, array([4, 4, 4]), array([5, 5, 5]))
    found = agreement.results()["a"]
    assert found.value == pytest.approx(0.0)
    assert found.groups == 3


def test_unknown_draws_leave_an_interval_of_the_known_ones():
    """A bootstrap draw without any mixed group makes the whole interval NaN."""
    table = ClusterSums(["a"], 3)
    table.add(0, n=1, total=2.0)
    table.add(1, n=1, total=4.0)
    table.add(2, n=0, total=0.0)
    found = table.estimates(ratio("total", "n"), ("total", "n"), "n")["a"]
    assert found.value == 3.0
    assert found.ci == (2.0, 4.0)


def test_clusters_are_questions_until_there_are_many(monkeypatch):
    """Memory grows with the questions, or a question lies in two clusters."""
    monkeypatch.setattr(reward_stats, "CLUSTERS", 10)
    cluster, count = cluster_of(f"q{i}" for i in range(10))
    assert count == 10
    assert sorted(cluster(f"q{i}") for i in range(10)) == list(range(10))
    names = [f"q{i}" for i in range(500)]
    cluster, count = cluster_of(names)
    assert count == 10
    found = [cluster(name) for name in names]
    assert set(found) == set(range(10))
    random.Random(0).shuffle(names)
    again, _ = cluster_of(names)
    assert [again(f"q{i}") for i in range(500)] == found, "by the name, not by the order"
