"""The evaluation command: conditions on the same questions, kept traces and rows, several readers, one clear line."""

import json
from pathlib import Path

import pytest

import eval.run as command
from eval.conditions import Written
from eval.run import main
from recipes.train_context import main as train

ROOT = Path(__file__).resolve().parents[1]
BASE, Q = str(ROOT / "models/tiny-base"), str(ROOT / "models/tiny-context")
SMALL = ["--task", "symbolic", "--questions", "12", "--max_trace_tokens", "24", "--base", BASE]
WITH_Q = [*SMALL, "--untrained", Q, "--trained", Q]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One evaluation of everything there is."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*WITH_Q, "--samples", "2", "--out", str(out)]) == 0
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((out / "rows").iterdir()) for line in path.read_text().splitlines()]


def test_every_condition_and_decoding_reads_the_same_questions(whole):
    """Failure: conditions are compared on different questions, or one is missing without a word."""
    result = json.loads((whole / "result.json").read_text())
    assert result["conditions"] == ["none", "untrained", "trained", "shuffled", "own", "gold", "masked"]
    by_job: dict[tuple, list] = {}
    for row in rows(whole):
        by_job.setdefault((row["condition"], row["decoding"], row["sample"]), []).append(row["id"])
    written = ("untrained", "trained", "shuffled", "masked", "own")
    decodings = (("greedy", 0), ("sampled", 0), ("sampled", 1))
    jobs = {(c, *decoding) for c in written for decoding in decodings}
    jobs |= {("none", "greedy", 0), ("gold", "greedy", 0)}
    assert set(by_job) == jobs
    assert len({tuple(ids) for ids in by_job.values()}) == 1
    for name in ("report.md", "traces.html"):
        assert (whole / name).stat().st_size > 500


def test_what_stands_in_the_traces_place(whole):
    """Failure: the shuffled condition leaves traces where they were, or masked ones still state the answer."""
    found = {(r["condition"], r["decoding"], r["sample"], r["id"]): r for r in rows(whole)}
    ids = {key[3] for key in found}
    for i in ids:
        assert found["none", "greedy", 0, i]["trace"] is None
        assert found["gold", "greedy", 0, i]["correct"] is True
        assert found["trained", "greedy", 0, i]["trace"] == found["untrained", "greedy", 0, i]["trace"]  # the same q
    moved = sorted(found["shuffled", "sampled", 0, i]["trace"] for i in ids)
    assert moved == sorted(found["trained", "sampled", 0, i]["trace"] for i in ids)
    assert any(found["shuffled", "sampled", 0, i]["trace"] != found["trained", "sampled", 0, i]["trace"] for i in ids)
    first, second = ([found["own", "sampled", k, i]["trace"] for i in sorted(ids)] for k in (0, 1))
    assert first != second  # two samples


def test_the_report_says_the_numbers_of_the_rows(whole):
    """Failure: a table shows other numbers than the rows behind it."""
    result = json.loads((whole / "result.json").read_text())["bases"][BASE]
    for decoding, conditions in result["conditions"].items():
        for condition, shown in conditions.items():
            mine = [r for r in rows(whole) if r["condition"] == condition and r["decoding"] in (decoding, "greedy")]
            mine = [r for r in mine if r["decoding"] == decoding or condition in ("none", "gold")]
            assert shown["n"] == 12
            assert shown["accuracy"] == pytest.approx(sum(r["correct"] for r in mine) / len(mine))
            assert shown["mean_logprob"] == pytest.approx(sum(r["logprob"] for r in mine) / len(mine))
    assert all(c["reference"] in ("none", "untrained") for c in result["comparisons"]["greedy"])


def test_a_second_call_generates_and_scores_nothing(whole, monkeypatch):
    """Failure: an evaluation that was cut begins again from nothing."""
    before = (whole / "report.md").read_text()
    monkeypatch.setattr(command, "write_traces", None)
    monkeypatch.setattr(command, "open_scorer", None)
    assert main([*WITH_Q, "--samples", "2", "--out", str(whole)]) == 0
    assert (whole / "report.md").read_text() == before


def test_another_base_model_reads_the_kept_traces(whole, monkeypatch, tmp_path):
    """Failure: a transfer table compares base models on different traces, or pays for them twice."""
    written = []
    real = command.write_traces
    monkeypatch.setattr(command, "write_traces", lambda *a, **k: written.append(k["description"]) or real(*a, **k))
    conditions = ["--conditions", "none", "trained"]
    assert main([*WITH_Q, "--samples", "2", "--out", str(whole), *conditions, "--base", BASE, Q]) == 0
    assert written == []
    report = (whole / "report.md").read_text()
    assert "## Transfer" in report
    result = json.loads((whole / "result.json").read_text())
    assert list(result["bases"]) == [BASE, Q]


def test_other_settings_do_not_take_the_kept_rows(whole, capsys):
    """Failure: results of another seed or length are shown as this one's."""
    before = len(list((whole / "traces").iterdir()))
    assert main([*WITH_Q, "--out", str(whole), "--seed", "7", "--conditions", "trained"]) == 0
    assert len(list((whole / "traces").iterdir())) == before + 2


def test_a_q_that_never_stops_and_one_that_says_nothing_are_told_apart(tmp_path, monkeypatch):
    """Failure: cut traces look like finished ones, or an empty trace like no trace."""
    texts = iter([Written("", True), Written("legs " * 30, False)] * 12)
    monkeypatch.setattr(command, "write_traces", lambda model, tokenizer, asked, **_: [next(texts) for _ in asked])
    out = tmp_path / "out"
    assert main([*SMALL, "--trained", Q, "--conditions", "trained", "--samples", "0", "--out", str(out)]) == 0
    facts = json.loads((out / "result.json").read_text())["bases"][BASE]["facts"]["conditions"]["trained"]["greedy"]
    assert facts["empty"]["value"] == facts["cut"]["value"] == 0.5
    assert facts["no_trace"] == 0


def test_a_trace_too_long_for_the_base_model_is_listed_with_its_reason(tmp_path, monkeypatch, capsys):
    """Failure: a row that has no score disappears, or counts as wrong."""
    endless = Written("legs " * 2000, False)
    monkeypatch.setattr(
        command,
        "write_traces",
        lambda model, tokenizer, asked, **_: [endless, *[Written("a", True)] * (len(asked) - 1)],
    )
    out = tmp_path / "out"
    assert main([*SMALL, "--trained", Q, "--conditions", "trained", "--samples", "0", "--out", str(out)]) == 0
    found = json.loads((out / "result.json").read_text())["bases"][BASE]
    assert found["conditions"]["greedy"]["trained"]["n"] == 11
    assert found["conditions"]["greedy"]["trained"]["unscored"] == 1
    assert "the base model has 1024" in found["unscored"][0]["unscored"]
    assert "1 rows could not be scored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL, "--conditions", "trained"], "the condition 'trained' needs --trained"),
        (["--task", "symbolic"], "give --run, or --task and --base"),
        ([*SMALL, "--samples", "-1"], "--samples must be 0 or more"),
        ([*SMALL, "--base", BASE, BASE], "--base names a model twice"),
        (["--run", "nowhere"], "--run nowhere: no finished run there"),
        (["--run", "a", "b", "--trained", "c"], "several --run bring their own q"),
        ([*SMALL, "--untrained", "nowhere"], "cannot load 'nowhere', which is to write traces"),
        (["--task", "symbolic", "--base", "nowhere", "--questions", "3", "--conditions", "none"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path, capsys):
    """Failure: a traceback, or minutes of work before the mistake is noticed."""
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_task_without_solutions_has_no_gold_condition(tmp_path, capsys):
    """Failure: an empty reference solution is evaluated as if it were one."""
    data = tmp_path / "mine.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"What is {n} plus 1?", "answer": n + 1}) + "\n" for n in range(30))
    )
    words = ["--task", "qa", "--data", str(data), "--base", BASE, "--samples", "0", "--max_trace_tokens", "8"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a/result.json").read_text())["conditions"] == ["none", "own"]
    assert main([*words, "--out", str(tmp_path / "b"), "--conditions", "gold"]) == 1
    assert "solutions in the data (0 of the questions have one)" in capsys.readouterr().err


def test_several_runs_are_evaluated_together_over_their_seeds(tmp_path, capsys):
    """Failure: seeds are pooled as if they were more questions, or the runs' own folders are mixed up."""
    for seed in ("1", "2"):
        words = ["--max_steps", "1", "--per_device_train_batch_size", "16", "--no_evaluate", "--seed", seed]
        assert train([*words, "--max_completion_length", "24", "--output_dir", str(tmp_path / f"run{seed}")]) == 0
    folders = [str(tmp_path / f"run{seed}") for seed in (1, 2)]
    words = [
        "--questions",
        "12",
        "--samples",
        "1",
        "--conditions",
        "untrained",
        "trained",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["--run", *folders, *words]) == 0
    found = json.loads((tmp_path / "o/seeds.json").read_text())
    assert found["runs"] == folders
    assert [len(values) for values in found["conditions"]["sampled"].values()] == [2, 2, 2]
    assert {(c["condition"], c["reference"], c["seeds"]) for c in found["comparisons"]["sampled"]} == {
        ("untrained", "none", 2), ("trained", "none", 2), ("trained", "untrained", 2)
    }  # fmt: skip
    assert "Over seeds and questions" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"run1", "run2", "seeds.md", "seeds.json"}


def test_a_runs_own_columns_and_held_out_file_are_taken_from_it(tmp_path):
    """Failure: a run on a file with columns of its own cannot be evaluated, or is on a fifth of its held-out rows."""
    for name, start in (("mine", 0), ("later", 100)):
        lines = [json.dumps({"ask": f"What is {n} plus 1?", "say": n + 1}) for n in range(start, start + 15)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = ["--data", str(tmp_path / "mine.jsonl"), "--eval_data", str(tmp_path / "later.jsonl")]
    words = ["--task", "qa", *data, "--question_column", "ask", "--answer_column", "say", "--no_evaluate"]
    small = ["--max_steps", "1", "--per_device_train_batch_size", "16", "--max_completion_length", "16"]
    assert train([*words, *small, "--output_dir", str(tmp_path / "run")]) == 0
    evaluate = ["--run", str(tmp_path / "run"), "--samples", "0", "--conditions", "none"]
    assert main(evaluate) == 0
    found = json.loads((tmp_path / "run/eval_run/result.json").read_text())
    assert (found["task"], found["questions"]) == ("qa", 15)
    assert main([*evaluate, "--task", "symbolic", "--questions", "5", "--out", str(tmp_path / "other")]) == 0


def test_a_models_weights_are_read_once(tmp_path, monkeypatch):
    """Failure: every condition reads gigabytes of weights again to name its files."""
    read = []
    monkeypatch.setattr(command, "weights_digest", lambda model: read.append(model) or "x")
    command.identity.cache_clear()
    assert main([*WITH_Q, "--questions", "3", "--samples", "0", "--out", str(tmp_path / "out")]) == 0
    command.identity.cache_clear()
    assert sorted(read) == sorted({BASE, Q})
