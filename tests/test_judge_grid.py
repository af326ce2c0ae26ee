"""The six experiments with a judge, as shipped: from the grid's YAML through real runs to the report.

A failure means that the grid cannot be run as its first lines say, that a run which needs no judge asks one (or the
other way round), or that the report mixes the two tasks.
"""

import json
from pathlib import Path

import pytest

from eval import report
from recipes import ablate
from tests.stub_judge import StubJudge

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--max_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4", "--train_questions", "16"),
    *("--eval_questions", "6", "--cpu_threads", "1"),
]


@pytest.fixture
def stub():
    with StubJudge() as judge:
        yield judge


def test_the_grid_runs_from_its_yaml_to_the_report(tmp_path, monkeypatch, capsys, stub):
    monkeypatch.chdir(ROOT)
    grid = tmp_path / "judge.yaml"
    text = (ROOT / "recipes/ablations/judge.yaml").read_text()
    assert "http://127.0.0.1:8100/v1" in text
    text = text.replace("http://127.0.0.1:8100/v1", stub.url).replace(
        "../symbolic.yaml", str(ROOT / "recipes/symbolic.yaml")
    )
    grid.write_text(text)
    out = tmp_path / "runs"
    command = [str(grid), "--run", "--jobs", "3", "--only", "*seed=1", "--out", str(out), *SMALL]
    assert ablate.main(command) == 0, capsys.readouterr().err

    results = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")}
    assert len(results) == 6
    for name, result in results.items():
        judged = out / name / "judge.jsonl"
        assert judged.exists() == name.startswith("dialogue"), name
        assert (result["judge"] is None) == name.startswith("mathematics"), name
        if judged.exists():
            kinds = {json.loads(line)["kind"] for line in judged.read_text().splitlines()}
            assert kinds == ({"hard", "soft"} if "soft" in name else {"hard"}), name
    logged = [json.loads(line) for line in (out / "dialogue-perplexity,seed=1/metrics.jsonl").read_text().splitlines()]
    assert not any("judge/requests" in line for line in logged), "a likelihood reward paid for verdicts"

    before = len(stub.asked)
    assert ablate.main(command) == 0
    assert "nothing to do: all 6 runs" in capsys.readouterr().out
    assert len(stub.asked) == before
    assert report.main([str(out), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report/report.md").read_text()
    assert "Part 1: " in page
    assert "Part 2: " in page
    assert "6 finished, 0 stopped early, 0 failed" in page
