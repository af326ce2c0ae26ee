"""What the traces did, against values worked out by hand. A failure means that a report states a wrong fact."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eval.metrics import bootstrap_interval, wilson_interval
from eval.trace_facts import COLUMNS, baselines, facts, facts_table, gain_by_length, spearman


def row(example_id: str, condition: str, logprob: float | None, correct: bool | None, **changes) -> dict:
    return {
        "id": example_id,
        "question": f"Question {example_id}?",
        "answer": "12",
        "condition": condition,
        "decoding": "sampled",
        "sample": 0,
        "trace": None if condition == "none" else "some words",
        "trace_tokens": None if condition == "none" else 2,
        "answer_tokens": [" 12", "\n"],
        "token_logprobs": None if logprob is None else [logprob, 0.0],
        "logprob": logprob,
        "base_answer": None if logprob is None else " 12",
        "correct": correct,
        "unscored": "too long" if logprob is None else None,
    } | changes


NONE = [row("a", "none", -2.0, False), row("b", "none", -2.0, True), row("c", "none", -2.0, False)]
NONE += [row("d", "none", -2.0, True, answer="1200")]
TRAINED = [
    row("a", "trained", -1.0, True, trace="It is 12.", trace_tokens=3, finished=True),
    row("b", "trained", -4.0, False, trace="No idea", trace_tokens=2, finished=False),
    row("c", "trained", -2.0, False, trace="Twelve", trace_tokens=1, finished=True),
    row("d", "trained", -0.5, True, trace="It is 1,200", trace_tokens=4, finished=True, answer="1200"),
]


def of(rows: list[dict], condition: str = "trained", decoding: str = "sampled") -> dict:
    found = facts(rows)
    assert found == json.loads(json.dumps(found, allow_nan=False))
    return found["conditions"][condition][decoding]


# --- by hand ---


def test_help_gain_and_flips_by_hand():
    """An equal log p counts as help, gains have the wrong sign, or the two kinds of flip are mixed up."""
    f = of(NONE + TRAINED)
    assert f["help_rate"] == {"count": 2, "n": 4, "value": 0.5, "ci": pytest.approx([0.15004, 0.84996], abs=1e-5)}
    assert f["mean_gain"] == {"n": 4, "value": 0.125, "ci": list(bootstrap_interval([1.0, -2.0, 0.0, 1.5]))}
    assert (f["wrong_to_right"]["count"], f["right_to_wrong"]["count"]) == (1, 1)
    assert f["wrong_to_right"]["value"] == f["right_to_wrong"]["value"] == 0.25
    assert f["wrong_to_right"]["ci"] == list(wilson_interval(1, 4))
    assert f["accuracy"]["value"] == 0.5


def test_leaks_by_hand():
    """ "1,200" is missed as a mention of 1200, or accuracy is attributed to the wrong half."""
    f = of(NONE + TRAINED)
    assert (f["leak_exact"]["count"], f["leak_normalised"]["count"], f["leak_normalised"]["n"]) == (1, 2, 4)
    assert f["accuracy_leaked"] == {"count": 2, "n": 2, "value": 1.0, "ci": list(wilson_interval(2, 2))}
    assert f["accuracy_unleaked"] == {"count": 0, "n": 2, "value": 0.0, "ci": list(wilson_interval(0, 2))}


def test_length_by_hand():
    """Lengths are counted in other rows than gains, or the rank correlation is Pearson's."""
    f = of(NONE + TRAINED)
    assert f["length"]["quantiles"] == pytest.approx(
        {"0": 1, "5": 1.15, "25": 1.75, "50": 2.5, "75": 3.25, "95": 3.85, "100": 4}
    )
    assert f["length"]["mean"] == 2.5
    # Ranks 3 2 1 4 and 3 1 2 4: 1 - 6 * 2 / (4 * 15).
    assert f["gain_by_length"]["spearman"] == pytest.approx(0.8)
    assert [(b["low"], b["high"], b["n"], b["mean_gain"]) for b in f["gain_by_length"]["bins"]] == [
        (1, 1, 1, 0.0),
        (2, 2, 1, -2.0),
        (3, 3, 1, 1.0),
        (4, 4, 1, 1.5),
    ]


def test_the_worst_and_the_best_cases_come_first():
    """A reader who looks at the worst cases is shown the best."""
    f = of(NONE + TRAINED)
    assert [(case["id"], case["gain"]) for case in f["worst"]][:2] == [("b", -2.0), ("c", 0.0)]
    assert [(case["id"], case["gain"]) for case in f["best"]][:2] == [("d", 1.5), ("a", 1.0)]


def test_cut_traces_are_counted_where_it_is_known():
    """A row that does not say whether its trace ended is taken for one that did, or for one that did not."""
    rows = [{key: value for key, value in r.items() if key != "finished"} if r["id"] == "c" else r for r in TRAINED]
    assert of(NONE + rows)["cut"] == {"count": 1, "n": 3, "value": 1 / 3, "ci": list(wilson_interval(1, 3))}
    bare = [{key: value for key, value in r.items() if key != "finished"} for r in TRAINED]
    assert of(NONE + bare)["cut"] is None


# --- what may be missing ---


def test_a_model_that_never_stops_is_cut_every_time_and_has_no_rank_correlation():
    """Equal lengths become 0/0, or a correlation of 0 that nobody measured."""
    rows = [{**r, "finished": False, "trace_tokens": 64} for r in TRAINED]
    f = of(NONE + rows)
    assert f["cut"]["value"] == 1.0
    assert f["gain_by_length"]["spearman"] is None
    assert f["gain_by_length"]["bins"] == [{"low": 64, "high": 64, "n": 4, "mean_gain": 0.125}]


def test_empty_traces_are_traces():
    """An empty trace is taken for no trace, or white space for words."""
    rows = [{**r, "trace": trace, "trace_tokens": 0} for r, trace in zip(TRAINED, ["", " \n", "", "x"], strict=True)]
    f = of(NONE + rows)
    assert (f["empty"]["count"], f["empty"]["n"], f["no_trace"]) == (3, 4, 0)
    assert f["accuracy_leaked"] is None
    assert f["accuracy_unleaked"]["n"] == 4


def test_unscored_rows_are_counted_and_part_of_no_mean():
    """A failed score counts as a gain of 0 or as a wrong answer, or vanishes without a word."""
    rows = [*TRAINED[:3], row("d", "trained", None, None, trace="It is 1,200", answer="1200")]
    f = of(NONE + rows)
    assert (f["rows"], f["unscored"], f["no_baseline"], f["help_rate"]["n"], f["accuracy"]["n"]) == (4, 1, 0, 3, 3)
    assert f["leak_normalised"]["n"] == 4, "what a trace says is known without a score"
    assert f["accuracy_leaked"]["n"] == 1


def test_rows_without_a_baseline_or_a_trace_are_counted_too():
    """A question whose baseline failed, or that has no gold solution, vanishes or counts as a gain."""
    none = [row("a", "none", None, None), *NONE[1:3]]
    gold = [row("a", "gold", -1.0, True), row("b", "gold", -1.0, True), row("c", "gold", None, None, trace=None)]
    f = of(none + gold, "gold")
    assert (f["rows"], f["no_trace"], f["unscored"], f["no_baseline"], f["help_rate"]["n"]) == (3, 1, 0, 1, 1)
    assert f["wrong_to_right"]["n"] == 1
    assert f["mean_gain"] == {"n": 1, "value": 1.0, "ci": None}, "one question says nothing of others"
    assert facts(none + gold)["none"]["unscored"] == 1


def test_generated_answers_have_accuracy_and_flips_without_a_gain():
    """An answer that was generated, and so has no log p, passes for one that could not be scored."""
    rows = [{**r, "logprob": None, "token_logprobs": None} for r in NONE + TRAINED]
    f = of(rows)
    assert (f["unscored"], f["no_baseline"], facts(rows)["none"]["unscored"]) == (0, 0, 0)
    assert (f["accuracy"]["value"], f["wrong_to_right"]["count"], f["right_to_wrong"]["count"]) == (0.5, 1, 1)
    assert f["accuracy_leaked"]["value"] == 1.0
    assert f["help_rate"] is f["mean_gain"] is f["gain_by_length"]["spearman"] is None


def test_what_is_undefined_is_none():
    """0/0 becomes a number where nothing could be scored or there is no help to compare with."""
    f = of([row("a", "trained", None, None)])
    for key in ("accuracy", "help_rate", "mean_gain", "wrong_to_right", "accuracy_leaked", "accuracy_unleaked"):
        assert f[key] is None
    assert f["gain_by_length"] == {"spearman": None, "bins": []}
    assert f["worst"] == f["best"] == []
    assert facts([])["conditions"] == {}
    assert facts([])["none"]["accuracy"] is None


def test_conditions_and_decodings_are_kept_apart():
    """Greedy and sampled traces, or gold and trained ones, share a line of the report."""
    rows = NONE + TRAINED + [{**r, "decoding": "greedy", "logprob": -2.5} for r in TRAINED]
    found = facts(rows + [{**r, "condition": "gold"} for r in TRAINED])
    assert {c: list(by) for c, by in found["conditions"].items()} == {
        "trained": ["greedy", "sampled"],
        "gold": ["sampled"],
    }
    assert found["conditions"]["trained"]["greedy"]["help_rate"]["value"] == 0.0
    assert (found["questions"], found["rows"]) == (4, 16)


def test_a_baseline_that_was_scored_goes_before_one_that_was_not():
    """A failed duplicate of a no-help row hides the one that was scored."""
    failed = row("a", "none", None, None, decoding="greedy")
    assert baselines([failed, NONE[0]])["a"] is NONE[0]
    assert baselines([NONE[0], failed])["a"] is NONE[0]


def test_every_question_counts_once_however_many_samples_it_has():
    """Samples of one question pass for independent questions, and the intervals are far too narrow."""
    samples = [row("a", "trained", -1.0, True, sample=k) for k in range(8)] + [row("b", "trained", -4.0, False)]
    f = of(NONE[:2] + samples)
    assert f["help_rate"] == {"count": 8, "n": 9, "value": 0.5, "ci": list(wilson_interval(1, 2))}
    assert f["mean_gain"] == {"n": 9, "value": -0.5, "ci": list(bootstrap_interval([1.0, -2.0]))}


# --- length and gain ---


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-3, 3)), min_size=2, max_size=40))
def test_spearman_is_scipys(pairs):
    """Ties get other ranks than their mean."""
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(x, y) is None
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(-5, 5)), min_size=1, max_size=60))
def test_bins_hold_every_row_once_and_split_no_length(pairs):
    """Rows at an edge are counted twice or not at all."""
    bins = gain_by_length(pairs)["bins"]
    assert 1 <= len(bins) <= 5
    assert sum(b["n"] for b in bins) == len(pairs)
    assert all(a["high"] < b["low"] for a, b in pairwise(bins))
    for b in bins:
        inside = [value for length, value in pairs if b["low"] <= length <= b["high"]]
        assert (b["n"], b["mean_gain"]) == (len(inside), pytest.approx(sum(inside) / len(inside)))


def test_bins_hold_about_as_many_rows_each():
    """Bins of equal width leave nearly all rows in one of them."""
    lengths = [random.Random(0).randrange(1, 2**k) for k in range(1, 8) for _ in range(20)] + list(range(100))
    sizes = [b["n"] for b in gain_by_length([(length, 0.0) for length in range(100)])["bins"]]
    assert sizes == [20] * 5
    assert len(gain_by_length([(length, 0.0) for length in lengths])["bins"]) > 2


# --- the table ---


def test_the_table_has_a_line_a_condition_and_dashes_for_none():
    """A column is out of place, or "None" stands in a report."""
    rows = NONE + [{**r, "trace": "words"} for r in TRAINED]
    header, rule, none, trained = facts_table(facts(rows)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (header, rule, none, trained)]
    assert {len(line) for line in cells} == {len(COLUMNS)}
    line = dict(zip(cells[0], cells[3], strict=True))
    assert (line["trace"], line["decoding"], line["questions"]) == ("trained", "T = 1", "4")
    assert line["helps"] == "50.0 % [15.0, 85.0]"
    assert line["mean gain, nats"].startswith("+0.12 [")
    assert (line["right if stated"], line["gain ~ length"], line["cut"]) == ("-", "+0.80", "25.0 %")
    assert dict(zip(cells[0], cells[2], strict=True))["right"] == "50.0 % [15.0, 85.0]"
    assert "None" not in facts_table(facts(rows)) + facts_table(facts([row("a", "gold", None, None, trace=None)]))
