"""The report on a folder of runs: what it reads, how it groups, what it counts, what it judges, what it writes."""

import html
import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats

from eval import report
from eval.comparisons import compare_seeds
from eval.metrics import paired_difference, summarise
from eval.report_arms import compact, group_arms, parts_of, reward_labels
from eval.report_data import blocks_of, reached, running_mean, target_accuracy
from eval.report_pairs import compare_arms
from eval.report_rules import ArmFacts, Pair, collapse_reasons, recommend, reward_up_accuracy_down, slope
from eval.report_runs import FAILED, FINISHED, STOPPED, read_runs

# --- made-up run folders ---


def rows_of(share: float, items: int, rng: np.random.Generator, condition: str) -> list[dict]:
    """Held-out rows of both decodings, right with this probability."""
    out = []
    for decoding in ("greedy", "sampled"):
        for n in range(items):
            right = bool(rng.random() < share)
            trace = None if condition == "none" else f"{condition} <b>trace</b> | of {n}"
            row = {"id": f"q{n}", "decoding": decoding, "trace": trace, "correct": right, "unscored": None}
            out.append({**row, "logprob": -0.1 if right else -2.0, "base_answer": " 1"})
    return out


def make_run(
    folder: Path,
    *,
    reward="probability",
    seed: int = 1,
    end: float = 0.9,
    steps: int = 60,
    items: int = 40,
    finished: bool = True,
    settings: dict | None = None,
    metrics: dict | None = None,
    untrained: float = 0.4,
    rows: bool = True,
) -> Path:
    """A run folder as train_context.py leaves it; accuracy climbs from 0.4 to `end` in the first half."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(str(reward)), round(1000 * end)])
    config = {"seed": seed, "reward": reward, "task": "symbolic", "output_dir": str(folder), "scale_rewards": "group"}
    data = {"train": "t", "held_out": "h"}
    described = {"settings": config | (settings or {}), "scorer": {"weights": "w"}, "data": data, "git": "g"}
    (folder / "config.yaml").write_text(yaml.safe_dump(described))
    lines = []
    for step in range(1, steps + 1):
        level = 0.4 + (end - 0.4) * min(1.0, step / 30)
        line = {"step": step, "accuracy": level, "reward": level, "entropy": 0.1, "trace_tokens": 20.0 + step}
        line |= {"rewards/leak": 0.5, "no_spread": 0.25, "seconds/step": 2.0, "seconds/scoring": 0.5}
        lines.append(line | (metrics or {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return folder
    by = {
        "none": rows_of(0.3, items, np.random.default_rng(0), "none"),
        "untrained": rows_of(untrained, items, np.random.default_rng(1), "untrained"),
        "trained": rows_of(end, items, rng, "trained"),
    }
    split = {c: {d: [r for r in of if r["decoding"] == d] for d in ("greedy", "sampled")} for c, of in by.items()}
    if rows:
        (folder / "eval").mkdir()
        for condition, of in by.items():
            (folder / "eval" / f"symbolic.{condition}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in of))
    result = {
        "task": "symbolic",
        "seconds": 100.0,
        "scoring_share": 0.25,
        "no_spread_share": 0.25,
        "no_spread_share_first_20": 0.1,
        "eval": {c: {d: summarise(r) for d, r in of.items()} for c, of in split.items()},
        "differences": {
            f"trained_minus_{o}": paired_difference(split["trained"]["sampled"], split[o]["sampled"], "correct")
            for o in ("none", "untrained")
        },
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def grid(root: Path, ends: dict[str, float], seeds=(1, 2, 3), **options) -> Path:
    for reward, end in ends.items():
        for seed in seeds:
            make_run(root / f"reward={reward},seed={seed}", reward=reward, seed=seed, end=end, **options)
    return root


def arms_of(root: Path, by=()):
    return group_arms(read_runs([root]), by)


def tables_of(markdown: str) -> list[list[list[str]]]:
    """The tables of report.md as cells."""
    found, table = [], []
    for line in [*markdown.split("\n"), ""]:
        if line.startswith("|"):
            cells = [html.unescape(c.strip().replace("\\|", "|")) for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not all(re.fullmatch(r"-{3,}:?", c) for c in cells):
                table.append(cells)
        elif table:
            found.append(table)
            table = []
    return found


class PageTables(HTMLParser):
    """The tables and the prose of report.html."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.prose, self.cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "p", "li"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            text = self.cell.replace("\u2212", "-")
            self.tables[-1][-1].append("-" if text == "\u2013" else text)
        elif tag in ("p", "li"):
            self.prose.append(self.cell.replace("\u00a0", " "))

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def column(table: list[list[str]], name: str) -> dict[str, str]:
    return {row[0]: row[table[0].index(name)] for row in table[1:]}


# --- reading and grouping ---


def test_arms_are_runs_that_differ_in_their_seed_alone(tmp_path):
    """Failure: seeds are taken for arms, a setting without effect splits an arm, or one with an effect does not."""
    make_run(tmp_path / "a", seed=1)
    make_run(tmp_path / "b", seed=2, settings={"output_dir": "elsewhere", "save_steps": 7})
    make_run(tmp_path / "c", seed=1, settings={"scale_rewards": "batch"})
    arms, notes = arms_of(tmp_path)
    assert {arm.name: [run.name for run in arm.runs] for arm in arms} == {
        "scale_rewards=group": ["a", "b"],
        "scale_rewards=batch": ["c"],
    }
    assert notes == []


def test_names_hold_only_what_tells_arms_apart(tmp_path):
    """Failure: a name lacks an axis or repeats a constant, a path of this machine stands in it, or --by is ignored."""
    for n, (reward, model) in enumerate([(r, m) for r in ("binary", "tiers") for m in ("/x/small", "/x/large")]):
        make_run(tmp_path / str(n), reward=reward, settings={"scorer_model": model, "learning_rate": 1e-4})
    assert [arm.name for arm in arms_of(tmp_path)[0]] == [
        "binary, base small",
        "binary, base large",
        "tiers, base small",
        "tiers, base large",
    ]
    assert arms_of(tmp_path, ["scorer_model"])[0][0].name == "base small, binary"


def test_rewards_of_one_name_are_called_by_their_specification():
    """Failure: two thresholds are one word in every table, or a reward has a long name without need."""
    half = {"threshold": {"of": "probability", "tau": 0.5}}
    moving = {"threshold": {"of": "probability", "tau": {"quantile": 0.7}}}
    assert list(reward_labels([half, "binary"]).values()) == ["threshold", "binary"]
    assert list(reward_labels([half, moving]).values()) == [
        "threshold(probability, tau 0.5)",
        "threshold(probability, tau quantile 0.7)",
    ]
    assert compact({"fallback": {"first": "binary", "of": {"masked": {"of": "probability"}}}}) == (
        "fallback(first binary, masked(probability))"
    )
    assert [parts_of("probability"), parts_of(half), parts_of(moving)] == [1, 4, 5]


def test_of_a_seed_run_twice_the_finished_one_counts(tmp_path):
    """Failure: one seed counts as two independent ones, and intervals are too narrow."""
    make_run(tmp_path / "cut", steps=10, finished=False)
    make_run(tmp_path / "whole")
    [arm], notes = arms_of(tmp_path)
    assert [run.name for run in arm.runs] == ["whole"]
    assert notes == ["probability: seed 1 is there twice; cut is left out for whole"]


def test_broken_folders_are_listed_with_the_reason_and_the_report_comes_out(tmp_path, capsys):
    """Failure: one broken folder of many costs the whole report, or is passed over in silence."""
    root = grid(tmp_path / "runs", {"probability": 0.9, "binary": 0.6})
    (root / "reward=binary,seed=1" / "result.json").write_text('{"eval": ')
    (root / "reward=binary,seed=2" / "config.yaml").unlink()
    (root / "reward=binary,seed=3" / "eval" / "symbolic.trained.jsonl").write_text('{"id": "q0"}\n')
    (root / "empty").mkdir()
    assert report.main([str(root), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "7 run folders (3 finished, 0 stopped early, 4 failed) in 2 arms" in text
    assert "reward=binary,seed=1: result.json is broken" in text
    assert "- reward=binary,seed=2: no config.yaml" in text
    assert "reward=binary,seed=3: eval/symbolic.trained.jsonl is broken: KeyError" in text
    assert "- empty: no config.yaml" in text
    assert column(tables_of(text)[0], "seeds") == {"probability": "3 / 0 / 0", "binary": "0 / 0 / 2"}
    assert "failed: empty" in capsys.readouterr().out
    assert str(tmp_path) not in text


def test_runs_that_their_ablation_calls_failed_are_listed_with_its_reason(tmp_path):
    """Failure: a run that crashed counts as merely cut short, or one that left no folder is forgotten."""
    root = grid(tmp_path / "runs", {"probability": 0.9}, seeds=(1,))
    make_run(root / "crashed", seed=2, steps=20, finished=False)
    reasons = {"crashed": "error: out of memory", "never": "error: no such model", "reward=probability,seed=1": "old"}
    (root / "failures.json").write_text(json.dumps(reasons))
    found = {run.name: (run.status, run.problem) for run in read_runs([root])}
    assert found == {
        "crashed": (FAILED, "error: out of memory"),
        "never": (FAILED, "error: no such model"),
        "reward=probability,seed=1": (FINISHED, ""),
    }
    assert report.main([str(root), "--out", str(tmp_path / "out")]) == 0
    assert "- never: error: no such model" in (tmp_path / "out" / "report.md").read_text()


def test_nothing_readable_is_an_error_of_one_line_a_folder(tmp_path, capsys):
    """Failure: a wrong path ends in a traceback or an empty report."""
    assert report.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_numbers_are_dashes_and_never_zeros(tmp_path):
    """Failure: a run without evaluation, without entropy or without seconds is shown with 0 of it."""
    folder = make_run(tmp_path / "runs" / "a", rows=False, metrics={"entropy": None, "seconds/step": None})
    result = json.loads((folder / "result.json").read_text())
    for key in ("seconds", "scoring_share", "no_spread_share_first_20", "differences"):
        del result[key]
    (folder / "result.json").write_text(json.dumps(result | {"eval": {}}))
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    summary, training, efficiency, *_ = tables_of((tmp_path / "out" / "report.md").read_text())
    assert summary[1] == ["probability", "1 / 0 / 0", "-", "-", "-", "-", "-"]
    assert training[1] == ["probability", "-", "25.0", "-", "23.0 to 78.0", "50.0", "-", "-"]
    assert efficiency[1] == ["probability", "1 of 1", "30", "-"]


def test_runs_without_an_accuracy_curve_have_a_dash_where_steps_to_the_target_would_be(tmp_path):
    """Failure: an arm whose sampled traces no judge was asked about is said not to have reached the target."""
    root = grid(tmp_path / "runs", {"binary": 0.9})
    for seed in (1, 2, 3):
        make_run(root / f"quiet{seed}", reward="probability", seed=seed, end=0.9, metrics={"accuracy": None})
    assert report.main([str(root), "--out", str(tmp_path / "out")]) == 0
    rows = [row for t in tables_of((tmp_path / "out" / "report.md").read_text()) for row in t]
    [reached] = [row for row in rows if row[0] == "probability" and len(row) == 4 and "of" not in row[1]]
    assert reached == ["probability", "-", "-", "-"]
    assert ["binary", "3 of 3"] in [row[:2] for row in rows]


def test_a_run_that_stopped_early_is_marked_and_is_in_no_number(tmp_path):
    """Failure: half a run moves an arm's means, or nobody sees that it is half a run."""
    root = grid(tmp_path / "runs", {"probability": 0.9})
    make_run(root / "cut", seed=9, end=0.1, steps=20, finished=False, metrics={"no_spread": 1.0})
    assert report.main([str(root), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- cut: stopped early, after step 20" in text
    summary, training, efficiency, *_ = tables_of(text)
    assert column(summary, "seeds") == {"probability": "3 / 1 / 0"}
    assert column(training, "all steps, %") == {"probability": "25.0"}
    assert column(efficiency, "seeds that reached it") == {"probability": "3 of 3"}
    assert column(tables_of(text)[-1], "state")["cut"] == STOPPED


# --- numbers ---


def test_running_mean_is_of_the_last_known_values():
    """Failure: the curves look ahead, or a step without a value counts as 0."""
    found = running_mean(np.array([math.nan, 1.0, 3.0, math.nan, 8.0]), 2)
    assert math.isnan(found[0])
    assert found[1:].tolist() == [1.0, 2.0, 3.0, 8.0]


def test_steps_and_seconds_to_the_target(tmp_path):
    """Failure: the target lies elsewhere than 90 % of the way, or a step is reached before a full window is.

    Accuracy is 0.4 + step / 60 up to step 30: 0.41667 at step 1, 0.9 at the end, so the target is 0.85167, and the mean
    of steps s - 5 to s, level(s - 2.5) there, passes it between steps 29 and 30.
    """
    make_run(tmp_path / "a")
    [arm], _ = arms_of(tmp_path)
    start, target = target_accuracy([arm])
    assert start == pytest.approx(0.4 + 1 / 60)
    assert target == pytest.approx(0.4 + 1 / 60 + 0.9 * (0.5 - 1 / 60))
    assert reached(arm.runs[0], target) == (30.0, 60.0)
    assert reached(arm.runs[0], 0.0) == (6.0, 12.0)
    assert reached(arm.runs[0], 0.95) is None


def test_final_accuracy_has_the_interval_that_its_seeds_allow(tmp_path):
    """Failure: one seed's interval is passed off as one over seeds, or the mean is not that of the seeds' means."""
    grid(tmp_path / "three", {"probability": 0.8})
    make_run(tmp_path / "one" / "a", reward="binary")
    [three], [one] = (blocks_of(arms_of(tmp_path / name)[0])[0].arms for name in ("three", "one"))
    means = [run.summary("trained", "sampled")["accuracy"] for run in three.arm.runs]
    assert three.accuracy.value == pytest.approx(sum(means) / 3)
    assert (three.accuracy.how, one.accuracy.how) == ("seeds and questions", "one seed: questions")
    assert one.accuracy.ci == tuple(one.arm.runs[0].summary("trained", "sampled")["accuracy_ci"])
    gains = [run.result["differences"]["trained_minus_none"]["difference"] for run in three.arm.runs]
    assert three.gain.value == pytest.approx(sum(gains) / 3)


def test_without_rows_the_interval_is_over_seeds_alone(tmp_path):
    """Failure: result.json alone is not enough for a report, or its interval claims questions that were not read."""
    grid(tmp_path, {"probability": 0.8, "binary": 0.5}, rows=False)
    [block] = blocks_of(arms_of(tmp_path)[0])
    assert [n.accuracy.how for n in block.arms] == ["seeds", "seeds"]
    assert block.comparisons["sampled"][0].words == "no held-out rows"
    assert block.recommendation.choice is None


def test_pairs_agree_with_compare_seeds(tmp_path):
    """Failure: the array version of the paired comparison is not the tested one of eval/comparisons.py."""
    grid(tmp_path, {"probability": 0.8, "binary": 0.6})
    arms, _ = arms_of(tmp_path)
    by_name = {arm.name: arm for arm in arms}
    [found] = compare_arms([by_name["probability"], by_name["binary"]], "sampled")

    def rows(arm: str, seed: int) -> list[dict]:
        text = (tmp_path / f"reward={arm},seed={seed}" / "eval" / "symbolic.trained.jsonl").read_text()
        return [row for row in map(json.loads, text.splitlines()) if row["decoding"] == "sampled"]

    [expected] = compare_seeds({s: {a: rows(a, s) for a in by_name} for s in (1, 2, 3)}, "binary")
    assert found.difference == pytest.approx(expected.difference)
    assert found.ci == pytest.approx(expected.ci)
    assert (found.p, found.p_holm) == pytest.approx((expected.p, expected.p_holm))
    assert found.smallest == pytest.approx(expected.smallest)


def test_pairs_are_adjusted_for_their_number_and_say_what_they_could_not_show(tmp_path):
    """Failure: three pairs are tested as if there were one, or "not separable" hides how little could be seen."""
    grid(tmp_path, {"probability": 0.9, "tiers": 0.9, "binary": 0.3}, items=100)
    [block] = blocks_of(arms_of(tmp_path)[0])
    found = {frozenset((c.a, c.b)): c for c in block.comparisons["sampled"]}
    smallest = min(found.values(), key=lambda c: c.p)
    assert smallest.p_holm == pytest.approx(min(1.0, 3 * smallest.p))
    alike = found[frozenset(("probability", "tiers"))]
    assert re.fullmatch(r"not separable with 3 seeds \(\d+\.\d points would have been seen\)", alike.words)
    assert found[frozenset(("probability", "binary"))].words == "probability is better"


def test_arms_on_other_questions_are_not_compared(tmp_path):
    """Failure: accuracies on two tasks stand in one ranking."""
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", settings={"task": "gsm8k"})
    assert [(block.task, len(block.arms)) for block in blocks_of(arms_of(tmp_path)[0])] == [
        ("symbolic", 1),
        ("gsm8k", 1),
    ]


# --- rules ---


def test_collapse_takes_low_entropy_and_short_traces_or_a_loss_beyond_its_interval():
    """Failure: a model that has merely become sure counts as collapsed, or one that has gone silent does not."""
    assert collapse_reasons(0.01, 33.0, (0.5, 0.6), (0.4, 0.5)) == []
    assert collapse_reasons(0.01, 1.0, None, None) == ["silent: entropy 0.010 with traces of 1.0 tokens"]
    assert collapse_reasons(0.5, 1.0, None, None) == []
    assert collapse_reasons(None, None, None, None) == []
    assert collapse_reasons(0.1, 20.0, (-0.05, 0.002), (-0.11, -0.056)) == [
        "below the untrained model by 5.6 to 11.0 points"
    ]


def test_slope_of_known_points():
    """Failure: the slope or its p-value is wrong.

    By hand: x from 0 to 7 has S_xx = 42 and y = 0, 1, 0, 1, ... S_xy = 2, so b = 1 / 21 and t = 0.5477 with 6 degrees
    of freedom, one-sided p = 0.3018.
    """
    found = slope(np.arange(8.0), np.array([0.0, 1, 0, 1, 0, 1, 0, 1]))
    assert found[0] == pytest.approx(1 / 21)
    assert found[1] == pytest.approx(stats.t.sf(0.547723, 6), abs=1e-6)
    assert slope(np.arange(8.0), 2 * np.arange(8.0)) == (2.0, 0.0)
    assert slope(np.arange(7.0), np.arange(7.0)) is None


def test_reward_up_and_accuracy_down_is_flagged_beyond_noise_only():
    """Failure: reward hacking goes unseen, or noise is called that."""
    steps, noise = np.arange(60.0), np.random.default_rng(0).normal(0, 0.02, 60)
    up, flat = 0.3 + 0.005 * steps, np.full(60, 0.5)
    late = np.where(steps < 40, 0.5, 0.5 - 0.02 * (steps - 40))
    assert reward_up_accuracy_down(steps, up + noise, late + noise[::-1]) == "last third"
    assert reward_up_accuracy_down(steps, np.minimum(up, 0.4), np.maximum(0.9 - 0.02 * steps, 0.3)) == "whole run"
    assert reward_up_accuracy_down(steps, up + noise, flat + noise[::-1]) == "no"
    assert reward_up_accuracy_down(steps, up, up) == "no"
    assert reward_up_accuracy_down(steps[:5], up[:5], -up[:5]) is None


def arm(name: str, accuracy: float, **options) -> ArmFacts:
    return ArmFacts(name, **{"seeds": 5, "accuracy": accuracy, "ci": (accuracy - 0.02, accuracy + 0.02)} | options)


def pair(a: str, b: str, difference: float, shown: bool) -> Pair:
    return Pair(a, b, difference, (difference - 0.03, difference + 0.03), 0.001 if shown else 0.6, 0.04, shown)


def test_a_clear_winner_is_recommended_with_its_numbers():
    """Failure: the best arm is not the one named, or the text does not say what it rests on."""
    found = recommend([arm("a", 0.8), arm("b", 0.9)], [pair("a", "b", -0.1, True)])
    assert (found.choice, found.equals) == ("b", ("b",))
    assert found.lines[1] == "Highest accuracy at T = 1: b, 90.0 % [88.0, 92.0]."
    assert found.lines[2] == "Shown to be worse: a, -10.0 points [-13.0, -7.0], Holm's p 0.001."


def test_arms_that_are_not_separable_are_equals_and_the_simplest_is_taken():
    """Failure: a difference that could be chance decides."""
    arms = [arm("a", 0.9, parts=4), arm("b", 0.895, parts=1), arm("c", 0.5)]
    found = recommend(arms, [pair("a", "b", 0.005, False), pair("a", "c", 0.4, True), pair("b", "c", 0.39, True)])
    assert (found.choice, found.equals) == ("b", ("a", "b"))
    assert "no proof that they are equal" in found.lines[0]
    assert found.lines[2].startswith("Not separable from it with 5 seeds: b, -0.5 points [-3.5, +2.5]")
    assert found.lines[2].endswith("4.0 points would have been seen.")


@pytest.mark.parametrize(
    ("slow", "choice"), [((40, 41, 42, 40, 43), "b"), ((20, 41, 12, 30, 43), "a"), ((40, 41, 42, 40, None), "a")]
)
def test_among_equals_speed_decides_only_where_it_is_shown(slow, choice):
    """Failure: an arm is preferred for being faster by chance, or a shown difference in speed is passed over."""
    fast = dict(enumerate((20.0, 22.0, 21.0, 19.0, 20.0)))
    arms = [arm("a", 0.9, steps=dict(enumerate(slow))), arm("b", 0.895, parts=3, steps=fast)]
    assert recommend(arms, [pair("a", "b", 0.005, False)]).choice == choice


def test_an_arm_that_collapsed_in_one_seed_is_dropped():
    """Failure: the highest mean hides that one run in five ends in silence."""
    arms = [arm("a", 0.95, collapsed=("seed 2 silent",)), arm("b", 0.9), arm("c", 0.8)]
    found = recommend(arms, [pair("a", "b", 0.05, True), pair("b", "c", 0.1, True), pair("a", "c", 0.15, True)])
    assert found.choice == "b"
    assert "Dropped, as it collapsed: a (seed 2 silent)." in found.lines
    assert recommend([arms[0]] * 2, []).lines[0] == "No recommendation: every arm collapsed in some seed."


def test_fewer_than_three_seeds_give_no_recommendation():
    """Failure: two lucky seeds become advice."""
    found = recommend([arm("a", 0.9, seeds=2), arm("b", 0.5, seeds=2)], [pair("a", "b", 0.4, True)])
    assert found.choice is None
    assert found.lines[0] == (
        "No recommendation: one needs at least 3 seeds an arm, and two such arms. "
        "Here 2 arms with 2 finished seeds each."
    )


# --- what is written ---


def test_html_and_markdown_say_the_same_numbers(tmp_path):
    """Failure: page and Markdown are made from different numbers, or a cell or a sentence is lost in one of them."""
    root = grid(tmp_path / "runs", {"probability": 0.9, "binary": 0.4, "tiers": 0.88})
    make_run(root / "cut", seed=9, steps=20, finished=False)
    assert report.main([str(root), "--out", str(tmp_path / "out")]) == 0
    markdown, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    found = PageTables(page)
    assert found.tables == tables_of(markdown)
    assert len(found.tables) > 8
    for sentence in found.prose:
        assert html.escape(sentence, quote=False).replace("&gt;", ">") in markdown
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".md", ".html", ".png", ".svg", ".json"}


def test_the_page_needs_no_network_and_runs_no_script(tmp_path):
    """Failure: the page asks a server for something, or text that a model wrote becomes markup in it."""
    root = grid(tmp_path / "runs", {"probability": 0.9})
    report.main([str(root), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"<script|(src|href|srcset)=\"(?!data:)|url\(|@import", page)
    assert "<b>trace" not in page
    assert "&lt;b&gt;trace" in page


def test_without_an_evaluation_traces_of_common_training_questions_stand_side_by_side(tmp_path):
    """Failure: the traces before, during and after training are of different questions, or of another arm."""
    root = grid(tmp_path / "runs", {"probability": 0.9, "binary": 0.6}, seeds=(1,), rows=False)
    for folder in root.iterdir():
        (folder / "traces").mkdir()
        for step, ids in ((1, "ab"), (30, "cb"), (60, "bd")):
            rows = [{"example_id": i, "trace": f"{folder.name[7]}{step}{i}", "correct": step == 60} for i in ids]
            pq.write_table(pa.Table.from_pylist(rows), folder / "traces" / f"step-{step:06d}-000-00.parquet")
        questions = [{"id": i, "question": f"What is {i}?", "answer": i} for i in "abcd"]
        (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    report.main([str(root), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "What is b? Answer: b" in text
    assert ["probability", "p1b (wrong)", "p30b (wrong)", "p60b (right)"] in [r for t in tables_of(text) for r in t]
    assert ["binary", "b1b (wrong)", "b30b (wrong)", "b60b (right)"] in [r for t in tables_of(text) for r in t]


@pytest.mark.parametrize("halfway", [False, True])
def test_held_out_traces_stand_side_by_side_at_the_same_questions(tmp_path, halfway):
    """Failure: a report shows traces of other questions, without the question, or loses those in the middle."""
    root = grid(tmp_path / "runs", {"probability": 0.9, "binary": 0.6}, seeds=(1,))
    for folder in root.iterdir():
        texts = [{"id": f"q{n}", "question": f"What\nis {n}?", "answer": str(n)} for n in range(1000)]
        (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        if halfway:
            rows = [{"id": f"q{n}", "trace": f"{folder.name[7]} mid {n}", "correct": None} for n in (5, 6, 7, 8)]
            text = "".join(json.dumps(row | {"decoding": "greedy", "logprob": None}) + "\n" for row in rows)
            (folder / "eval" / "symbolic.halfway.jsonl").write_text(text)
    [block] = blocks_of(arms_of(root)[0])
    assert len(block.examples.rows) == 3
    for row in block.examples.rows:
        number = row["id"][1:]
        assert not halfway or int(number) in (5, 6, 7, 8)  # those that were watched
        seen = row["arms"]["binary"]
        assert seen["before"][0] == f"untrained <b>trace</b> | of {number}"
        assert seen.get("during") == ((f"b mid {number}", None) if halfway else None)
        assert seen["after"][0] == f"trained <b>trace</b> | of {number}"
    report.main([str(root), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"What is {number}? Answer: {number}" in text
    assert (f"b mid {number} (not scored)" in text) == halfway


def test_two_hundred_folders_take_less_than_a_minute_and_two_gigabytes(tmp_path):
    """Failure: a step of the report is quadratic in the runs or keeps all rows; 40 arms make 780 pairs."""
    for arm_number in range(40):
        reward = {"threshold": {"of": "probability", "tau": round(0.01 * arm_number, 2)}}
        for seed in range(1, 6):
            folder = tmp_path / "runs" / f"{arm_number},seed={seed}"
            make_run(folder, reward=reward, seed=seed, end=0.5 + 0.01 * arm_number, items=100)
    code = (
        "import resource, sys; from eval.report import main; main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    begun = time.monotonic()
    command = [sys.executable, "-c", code, str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kilobytes = time.monotonic() - begun, int(done.stdout.split()[-1])
    print(f"{seconds:.1f} s, {kilobytes / 1e6:.2f} GB")
    assert seconds < 60
    assert kilobytes < 2e6
    text = (tmp_path / "out" / "report.md").read_text()
    assert "200 run folders (200 finished, 0 stopped early, 0 failed) in 40 arms" in text
    assert len(json.loads((tmp_path / "out" / "pairs.json").read_text())) == 2 * 780
