"""Conditions compared row by row. A failure means that a difference is not of the same questions, that one is called
shown which is not, or that what was left out is not said."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats

from eval.comparisons import compare, compare_seeds
from eval.metrics import (
    bootstrap_interval,
    holm,
    mcnemar,
    paired_proportions_interval,
    seeds_mean,
    sign_flip_p,
    smallest_effect,
)


def rows_of(correct, logprobs=None) -> list[dict]:
    """Rows from correct[item] or correct[item][sample]; a number each, or None."""
    rows = []
    for item, samples in enumerate(correct):
        several = isinstance(samples, list | tuple | np.ndarray)
        for sample, value in enumerate(samples if several else [samples]):
            logprob = None if value is None else -1.0 if logprobs is None else logprobs[item]
            row = {"id": f"q{item}", "correct": None if value is None else bool(value), "logprob": logprob}
            rows.append({**row, "sample": sample} if several else row)
    return rows


def drawn(rng, shape, share=0.5) -> list:
    return (rng.random(shape) < share).tolist()


def fields(comparison) -> dict:
    return {**dataclasses.asdict(comparison), "words": None}


def test_one_row_an_item_is_mcnemars_test_by_hand():
    """Failure: the sign, the counts, or the wrong test."""
    none = rows_of([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    trained = rows_of([1, 1, 1, 1, 1, 1, 1, 0, 0, 1])
    (found,) = compare({"trained": trained, "none": none}, "none")
    assert (found.condition, found.reference, found.key) == ("trained", "none", "correct")
    assert (found.n_items, found.n_pairs, found.unscored, found.unmatched, found.seeds) == (10, 10, 0, 0, 1)
    assert found.difference == pytest.approx(0.6, rel=1e-12)
    assert found.ci == paired_proportions_interval(7, 1, 10)
    assert found.p == found.p_holm == mcnemar(7, 1)
    assert found.smallest == smallest_effect(10, 0.8)
    assert found.words.startswith("no difference shown (")
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_the_order_of_rows_does_not_matter():
    """Failure: rows are matched by place, and a run that wrote its rows in another order is compared crosswise."""
    rng = np.random.default_rng(0)
    conditions = {"trained": rows_of(drawn(rng, (40, 3))), "none": rows_of(drawn(rng, 40))}
    mixed = {name: [rows[i] for i in rng.permutation(len(rows))] for name, rows in conditions.items()}
    (found,), (other) = compare(conditions, "none"), compare(mixed, "none")
    # (The drawn interval depends on the order of items; the pairs do not.)
    for field in ("n_items", "n_pairs", "unmatched", "unscored"):
        assert getattr(found, field) == getattr(other[0], field)
    assert found.difference == pytest.approx(other[0].difference, rel=1e-12)
    assert found.ci == pytest.approx(other[0].ci, abs=0.03)
    single = {"a": rows_of(drawn(rng, 40)), "none": conditions["none"]}
    assert compare(single, "none") == compare({"a": single["a"][::-1], "none": single["none"]}, "none")


@pytest.mark.parametrize("key", ["correct", "logprob"])
def test_rows_that_change_their_item_change_the_interval(key):
    """Failure: pairing is broken. The conditions agree on nearly every item; moved to other items they do not."""
    rng = np.random.default_rng(1)
    right, logprobs = rng.random(200) < 0.5, -rng.exponential(3.0, 200)
    none = rows_of(right.tolist(), logprobs.tolist())
    changed = right ^ (rng.random(200) < 0.05)
    trained = rows_of(changed.tolist(), (logprobs + rng.normal(0.3, 0.1, 200)).tolist())
    order = rng.permutation(200)
    moved = [{**row, "id": f"q{order[i]}"} for i, row in enumerate(trained)]
    (paired,), (broken,) = (compare({"trained": t, "none": none}, "none", key) for t in (trained, moved))
    assert broken.difference == pytest.approx(paired.difference, abs=1e-12)
    assert broken.ci[1] - broken.ci[0] > 2.5 * (paired.ci[1] - paired.ci[0])
    assert broken.p > paired.p or paired.p > 0.05
    if key == "logprob":
        assert paired.words == "better"
        assert broken.words.startswith("no difference shown")


def test_samples_of_an_item_are_one_observation():
    """Failure: k samples pass for k items; sampling an item often would show anything."""
    rng = np.random.default_rng(2)
    base, trained = drawn(rng, 60), drawn(rng, 60, 0.6)
    (once,) = compare({"trained": rows_of(trained), "none": rows_of(base)}, "none")
    (often,) = compare({"trained": rows_of([[t] * 16 for t in trained]), "none": rows_of(base)}, "none")
    assert (often.n_items, often.n_pairs) == (60, 960)
    assert often.difference == pytest.approx(once.difference, rel=1e-12)
    assert often.ci == pytest.approx(once.ci, abs=0.03)
    assert often.p == pytest.approx(once.p, abs=0.03)
    assert often.smallest == pytest.approx(once.smallest, rel=0.1)


def test_several_samples_go_through_the_items_means():
    """Failure: another statistic than the mean over items, or samples drawn one by one."""
    rng = np.random.default_rng(3)
    a, b = rng.random((50, 4)) < 0.7, rng.random((50, 4)) < 0.5
    (found,) = compare({"trained": rows_of(a), "untrained": rows_of(b)}, "untrained")
    d = a.mean(1) - b.mean(1)
    assert found.difference == pytest.approx(d.mean(), rel=1e-12)
    assert found.ci == bootstrap_interval(d)
    assert found.p == sign_flip_p(d)
    assert "McNemar" not in found.test
    assert found.words == "better"


def test_a_condition_without_samples_meets_every_sample_of_the_other():
    """Failure: only sample 0 is compared with "none", whichever side "none" is on."""
    none, trained = rows_of([1, 0]), rows_of([[1, 1, 0, 0], [1, 1, 1, 0]])
    (found,) = compare({"trained": trained, "none": none}, "none")
    (turned,) = compare({"trained": trained, "none": none}, "trained")
    assert (found.n_items, found.n_pairs, found.unmatched) == (2, 8, 0)
    assert found.difference == pytest.approx(((0.5 - 1) + 0.75) / 2, rel=1e-12)
    assert turned.difference == pytest.approx(-found.difference, rel=1e-12)


def test_samples_are_matched_by_their_number_and_the_rest_is_counted():
    """Failure: samples are matched by place, or rows vanish without being counted."""
    a = [{"id": "x", "sample": s, "correct": s == 2, "logprob": -1.0} for s in (2, 0, 7)]
    b = [{"id": "x", "sample": s, "correct": s == 1, "logprob": -1.0} for s in (0, 1, 2)]
    b += [{"id": "y", "sample": s, "correct": True, "logprob": -1.0} for s in (0, 1)]
    (found,) = compare({"a": a, "b": b}, "b")
    # (2: right against wrong), (0: both wrong); 7 of a, 1 of b and both of y have no partner.
    assert (found.n_items, found.n_pairs, found.unmatched, found.difference) == (1, 2, 4, 0.5)


def test_unscored_rows_are_left_out_with_their_partners_and_counted():
    """Failure: a row that could not be scored counts as wrong."""
    a = rows_of([[1, None], [None, None], [1, 0], [1, 1]])
    b = rows_of([[0, 1], [1, 1], [None, 0], [1, 1]])
    (found,) = compare({"a": a, "b": b}, "b")
    assert (found.n_items, found.n_pairs, found.unscored) == (3, 4, 4)
    # Items: x 1 - 0, the second of none, the third 0 - 0, the last 0. Every item counts once.
    assert found.difference == pytest.approx(1 / 3, rel=1e-12)


def test_log_probs_have_a_permutation_p_and_a_bootstrap_interval():
    """Failure: log-probs are counted as right and wrong, or said in percentage points."""
    rng = np.random.default_rng(4)
    x, y = -rng.exponential(2.0, 10), -rng.exponential(2.0, 10)
    (found,) = compare({"a": rows_of([1] * 10, x.tolist()), "b": rows_of([1] * 10, y.tolist())}, "b", "logprob")
    expected = scipy.stats.permutation_test(
        (x, y), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", vectorized=True
    )
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.ci == bootstrap_interval(x - y)
    assert found.smallest == pytest.approx(2.8015852 * (x - y).std(ddof=1) / math.sqrt(10), rel=1e-6)
    assert found.words == f"no difference shown ({found.smallest:.2g} would have been)"


def test_p_values_are_adjusted_over_the_list_and_so_is_the_smallest_effect():
    """Failure: of many conditions without an effect, some are called better."""
    rng = np.random.default_rng(5)
    conditions = {"none": rows_of(drawn(rng, 150))}
    conditions |= {f"c{i}": rows_of(drawn(rng, 150, 0.5 + i / 25)) for i in range(5)}
    found = compare(conditions, "none")
    assert [c.condition for c in found] == [f"c{i}" for i in range(5)]
    assert [c.p_holm for c in found] == holm([c.p for c in found])
    by_itself = compare({name: conditions[name] for name in ("none", "c2")}, "none")[0]
    assert found[2].p == by_itself.p < found[2].p_holm
    assert found[2].smallest > by_itself.smallest
    for c in found:
        assert (c.words == "better") == (c.p_holm < 0.05 and c.ci[0] > 0)


def test_experiments_without_an_effect_are_called_better_or_worse_in_5_of_100_at_most():
    """Failure: the words do not keep what the tests promise, with four samples an item and three conditions."""
    rng, repetitions, shown = np.random.default_rng(6), 200, 0
    for _ in range(repetitions):
        hard = rng.random((40, 1))
        draws = {name: rows_of(rng.random((40, 2)) < hard) for name in ("a", "b", "c", "none")}
        shown += any(not c.words.startswith("no difference") for c in compare(draws, "none"))
    assert shown <= 0.1 * repetitions


def test_where_nothing_changed_the_interval_still_has_a_width():
    """Failure: [0, 0] from a bootstrap of zeros: "the same for sure" after ten questions."""
    once, often = rows_of([1, 0] * 5), rows_of([[1, 1], [0, 0]] * 5)
    for rows, others in ((once, once), (often, often), (often, once)):
        (found,) = compare({"a": rows, "b": others}, "b")
        assert found.ci == paired_proportions_interval(0, 0, 10)
        assert (found.p, found.smallest) == (1, smallest_effect(10, 0))


def test_where_no_difference_could_have_been_shown_none_is_promised():
    """Failure: "140 points would have been shown", after two or three questions."""
    two, sampled, other = rows_of([1, 0]), rows_of([[1, 1], [0, 1]]), rows_of([[1, 0], [1, 1]])
    for rows, others in ((two, two), (sampled, other), (sampled[:2], other[:2])):
        (found,) = compare({"a": rows, "b": others}, "b")
        assert (found.smallest, found.words) == (None, "no difference shown")


def test_identical_log_probs_promise_nothing():
    """Failure: "0 would have been shown" of values without a spread."""
    rows = rows_of([1] * 30)
    (found,) = compare({"a": rows, "b": rows}, "b", "logprob")
    assert (found.p, found.smallest, found.words) == (1, None, "no difference shown")


def test_what_cannot_be_compared_is_an_error_that_names_it():
    """Failure: a difference of nothing, of an item counted twice, or of infinities."""
    a, b = rows_of([1, 0]), rows_of([1, 1])
    with pytest.raises(ValueError, match="no condition 'gold' to compare with; there are 'a', 'b'"):
        compare({"a": a, "b": b}, "gold")
    with pytest.raises(ValueError, match="condition 'a' has item 'q1', sample None twice"):
        compare({"a": [*a, a[1]], "b": b}, "b")
    sampled = rows_of([[1, 0], [1, 1]])
    with pytest.raises(ValueError, match="condition 'b' has item 'q0', sample 1 twice"):
        compare({"a": a, "b": [*sampled, sampled[1]]}, "a")
    with pytest.raises(ValueError, match="'a' and 'b' have nothing to compare: no item and sample is in both"):
        compare({"a": a, "b": [{**row, "id": "other " + row["id"]} for row in b]}, "b")
    with pytest.raises(ValueError, match="nothing to compare: all 2 pairs have an unscored side"):
        compare({"a": rows_of([None, 1]), "b": rows_of([1, None])}, "b")
    with pytest.raises(ValueError, match="condition 'a', item 'q0': logprob is -inf"):
        compare({"a": rows_of([1, 1], [-math.inf, -1.0]), "b": b}, "b", "logprob")
    with pytest.raises(ValueError, match="condition 'a', item 'q0' has no 'gain'"):
        compare({"a": a, "b": b}, "b", "gain")
    assert compare({"b": b}, "b") == []


# --- several runs ---


def runs_of(rng, seeds: int, items: int, effect: float = 0.0) -> dict[int, dict[str, list[dict]]]:
    none = rows_of(drawn(rng, items))
    return {seed: {"none": none, "trained": rows_of(drawn(rng, items, 0.5 + effect))} for seed in range(seeds)}


def test_several_runs_are_seeds_and_items():
    """Failure: runs are pooled as if their items were new ones, or in the wrong columns."""
    rng = np.random.default_rng(7)
    runs = runs_of(rng, 4, 50, 0.3)
    # Another order of rows in one run, an item that one run lacks, one that another could not score.
    runs[1]["trained"] = runs[1]["trained"][::-1]
    runs[2]["trained"] = [row for row in runs[2]["trained"] if row["id"] != "q7"]
    runs[3]["trained"][9] = {**runs[3]["trained"][9], "correct": None, "logprob": None}
    (found,) = compare_seeds(runs, "none")
    values = np.full((4, 50), np.nan)
    for seed, conditions in runs.items():
        none = {row["id"]: row["correct"] for row in conditions["none"]}
        for row in conditions["trained"]:
            if row["correct"] is not None:
                values[seed, int(row["id"][1:])] = float(row["correct"]) - none[row["id"]]
    expected = seeds_mean(values)
    assert found.difference == pytest.approx(expected.mean, rel=1e-12)
    assert found.ci == pytest.approx(expected.ci, rel=1e-9)
    assert found.p == found.p_holm == pytest.approx(expected.p, rel=1e-9)
    assert (found.n_items, found.n_pairs, found.unscored, found.unmatched, found.seeds) == (50, 198, 1, 1, 4)
    assert found.words == "better"
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_runs_that_disagree_show_less_than_one_run_does():
    """Failure: a lucky seed carries the verdict. One run in three is far better, two are as they were."""
    rng = np.random.default_rng(8)
    none = rows_of(drawn(rng, 300))
    lucky = {"none": none, "trained": rows_of(drawn(rng, 300, 0.9))}
    runs = {0: lucky, 1: {"none": none, "trained": none}, 2: {"none": none, "trained": none}}
    assert compare(lucky, "none")[0].words == "better"
    assert compare_seeds(runs, "none")[0].words.startswith("no difference shown")


def test_runs_in_which_nothing_changed():
    """Failure: [0, 0] and a p-value of 0 / 0."""
    none = rows_of([1, 0] * 20)
    (found,) = compare_seeds({s: {"none": none, "trained": none} for s in "abc"}, "none")
    assert found.ci == paired_proportions_interval(0, 0, 40)
    assert found.p == 1
    assert found.smallest == smallest_effect(40, 0)


def test_runs_that_cannot_be_compared_are_an_error_that_names_why():
    """Failure: an interval over seeds from one of them, or a condition that silently has fewer runs."""
    runs = runs_of(np.random.default_rng(9), 2, 5)
    with pytest.raises(ValueError, match="1 run says nothing about other seeds"):
        compare_seeds({0: runs[0]}, "none")
    with pytest.raises(ValueError, match="no condition 'gold'"):
        compare_seeds(runs, "gold")
    with pytest.raises(ValueError, match="seeds 0 and 1 do not have the same conditions: shuffled"):
        compare_seeds({0: runs[0], 1: {**runs[1], "shuffled": runs[1]["none"]}}, "none")
