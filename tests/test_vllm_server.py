"""The managed server: first its processes, with a stand-in for vLLM that starts at once, then a real vLLM on CPU.

The real one is looked for in CONTEXT_RL_VLLM_PYTHON (a python), then in .venv-vllm in the repository root; without
either these tests are skipped. scripts/setup_vllm_cpu.sh makes the latter. Each start takes half a minute.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import scorer.vllm.server as server_module
from context_rl.prompts import answer_text, base_prefix
from context_rl.tasks.symbolic import problems, worked_solution
from scorer.tokens import encode_answer, encode_prefix
from scorer.types import Greedy, Item, Score, ScorerError, Unscored
from scorer.vllm import VllmScorer, open_vllm
from scorer.vllm.server import launch, serve_command, server_environment

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "models" / "tiny-base")


def descendants(pid: int) -> list[psutil.Process]:
    """The process and everything it started, by way of others too."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those still alive after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [p for p in processes if alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


# The processes, with a stand-in for vLLM -----------------------------------------------------------------------------

STAND_IN = """
import http.server, signal, subprocess, sys

# Like vLLM's engine: a child of its own, which here does not even listen to SIGTERM.
subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(folder: Path, program: str) -> Path:
    """A python with a `vllm` beside it that is `program`. Returns the python."""
    folder.mkdir()
    python = folder / "python"
    python.symlink_to(sys.executable)
    (folder / "vllm").write_text(program)
    return python


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STOP_GRACE_S", 1.0)


def test_close_ends_every_process_also_those_that_ignore_sigterm(tmp_path: Path) -> None:
    """Fails if stopping a server leaves its engine behind, which holds the memory until someone notices."""
    server = launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", STAND_IN))
    processes = descendants(server.supervisor_pid)
    assert len(processes) == 3
    assert server.exit_code() is None
    server.close()
    server.close()
    assert left_after(processes, 0) == []


PARENT = """
import os, sys, time
import scorer.vllm.server

scorer.vllm.server.STOP_GRACE_S = 1.0
options = {"python": sys.argv[3], "dtype": "float32", "enforce_eager": True}
server = scorer.vllm.server.launch(sys.argv[1], log_path=sys.argv[2], **options)
if sys.argv[4] == "forks" and os.fork() == 0:
    time.sleep(600)  # this child has a copy of the pipe to the supervisor and never closes it
print(server.supervisor_pid, flush=True)
if sys.argv[4] == "leaves":
    sys.exit(sys.stdin.readline())
time.sleep(600)
"""


def start_parent(tmp_path: Path, model: str, python: Path | str, how: str) -> tuple[subprocess.Popen, int]:
    """A process that launches a server and does not close it. Returns it and the supervisor's pid."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PARENT, model, str(tmp_path / "log"), str(python), how]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    line = parent.stdout.readline()
    assert line, f"the server did not come up: {(tmp_path / 'log').read_text()[-2000:]}"
    return parent, int(line)


def kill(parent: subprocess.Popen) -> None:
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()


@pytest.mark.parametrize("how", ["waits", "forks"])
def test_sigkill_of_the_parent_ends_every_process(tmp_path: Path, how: str) -> None:
    """Fails if a run that was killed leaves a server behind, also where a forked child still holds its pipe."""
    parent, supervisor = start_parent(tmp_path, "m", stand_in(tmp_path / "bin", STAND_IN), how)
    processes, forked = descendants(supervisor), descendants(parent.pid)
    assert len(processes) == 3
    kill(parent)
    assert left_after(processes, 20) == []
    for process in forked:
        if alive(process):
            process.kill()


def test_a_parent_that_exits_without_close_leaves_nothing(tmp_path: Path) -> None:
    """Fails if only close() stops the server: a script that ends on an error would leave it running."""
    parent, supervisor = start_parent(tmp_path, "m", stand_in(tmp_path / "bin", STAND_IN), "leaves")
    processes = descendants(supervisor)
    assert len(processes) == 3
    parent.communicate("leave now\n", timeout=30)
    assert left_after(processes, 20) == []


def test_a_server_that_dies_early_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    """Fails if the cause (no memory, wrong flag) has to be looked for, or a dead server is waited for."""
    program = "import sys\nprint('line of an older run' * 3)\nprint('no memory for the cache')\nsys.exit(3)"
    start = time.monotonic()
    with pytest.raises(ScorerError, match=r"exit code 3.*\n(.*\n)*no memory for the cache"):
        launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program))
    assert time.monotonic() - start < 10


def test_a_server_that_never_answers_is_stopped_at_the_deadline(tmp_path: Path, capfd, monkeypatch) -> None:
    """Fails if a start that hangs blocks a run for good, without a word or with a server left behind."""
    monkeypatch.setattr(server_module, "PROGRESS_EVERY_S", 0.5)
    program = "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)"
    with pytest.raises(ScorerError, match="did not answer within 2 s"):
        launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program), startup_timeout_s=2)
    assert "vLLM loads m: 1 s" in capfd.readouterr().err
    assert not psutil.pid_exists(int((tmp_path / "log").read_text().split()[-1]))


def test_a_lost_port_is_tried_again(tmp_path: Path) -> None:
    """Fails if a port that somebody takes between choice and use ends the run."""
    marker = tmp_path / "tried"
    first = f"""
        import pathlib, sys
        if not pathlib.Path({str(marker)!r}).exists():
            pathlib.Path({str(marker)!r}).touch()
            sys.exit("OSError: [Errno 98] Address already in use")
    """
    program = textwrap.dedent(first) + STAND_IN
    with launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program)) as server:
        assert server.exit_code() is None


def test_a_python_without_vllm_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    """Fails if a missing extra shows as FileNotFoundError of a path nobody knows."""
    with pytest.raises(ScorerError, match=r"no vLLM beside .*setup_vllm_cpu\.sh"):
        launch("m", log_path=tmp_path / "log", python=tmp_path / "python")


def test_the_command_asks_for_raw_log_probs_and_neutral_defaults() -> None:
    """Fails if a flag that the scores depend on gets lost, or a user's own flag no longer wins."""
    command = serve_command(
        ["vllm"],
        "m",
        served_name="n",
        port=1,
        dtype="float32",
        seed=7,
        max_model_len=64,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        extra_args=["--max-logprobs", "99"],
    )
    line = " ".join(command)
    assert line.startswith("vllm serve m --host 127.0.0.1 --port 1 --served-model-name n ")
    for flags in (
        "--logprobs-mode raw_logprobs",
        "--max-logprobs 64",
        "--generation-config vllm",
        "--dtype float32",
        "--seed 7",
        "--max-model-len 64",
        "--gpu-memory-utilization 0.5",
        "--enforce-eager",
    ):
        assert flags in line
    assert line.endswith("--max-logprobs 99")


def test_the_servers_environment_lacks_what_the_trainers_launcher_set() -> None:
    """Fails if vLLM takes itself for a rank of the training job, or runs on the one thread meant for the trainer."""
    launcher = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "x",
    }
    env = server_environment({**launcher, "PATH": "p", "VLLM_CPU_KVCACHE_SPACE": "4", "HOME": "h"}, Path("bin"))
    assert not launcher.keys() & env.keys()
    assert env["PATH"] == f"bin{os.pathsep}p"
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["HOME"]) == ("4", "h")
    assert server_environment({}, Path("bin"))["VLLM_CPU_KVCACHE_SPACE"] == "1"


# A real vLLM on CPU --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_python() -> str:
    candidates = [os.environ.get("CONTEXT_RL_VLLM_PYTHON"), str(ROOT / ".venv-vllm" / "bin" / "python")]
    for python in filter(None, candidates):
        if (Path(python).parent / "vllm").exists():
            return python
    pytest.skip("no vLLM: set CONTEXT_RL_VLLM_PYTHON, or run scripts/setup_vllm_cpu.sh, which makes .venv-vllm")


@pytest.fixture(scope="module")
def real(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmScorer]:
    log_path = tmp_path_factory.mktemp("vllm") / "log"
    options = {"python": vllm_python, "dtype": "float32", "enforce_eager": True}
    with open_vllm(MODEL, log_path=log_path, prompts_per_request=8, **options) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def reference() -> Iterator[PreTrainedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the server has threads on these cores too: with 4 a forward pass took 0.8 s
    yield AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def forward_logprobs(model: PreTrainedModel, item: Item) -> list[float]:
    """The answer's log-probs by one plain forward pass over the whole sequence, nothing batched, nothing cached."""
    ids = torch.tensor([item.prefix_ids + item.answer_ids])
    with torch.inference_mode():
        logprobs_TV = model(ids).logits[0].float().log_softmax(-1)
    start = len(item.prefix_ids)
    return [logprobs_TV[start + i - 1, token].item() for i, token in enumerate(item.answer_ids)]


@pytest.fixture(scope="module")
def items(real: VllmScorer) -> list[Item]:
    """50 questions with the gold trace, without one, and with its words shuffled; right and wrong answers."""
    rng = random.Random(0)
    made = []
    for i, (question, answer, animals) in enumerate(itertools.islice(problems(seed=5), 50)):
        gold = worked_solution(animals)
        trace = [gold, None, " ".join(rng.sample(gold.split(), len(gold.split())))][i % 3]
        prefix = encode_prefix(real.tokenizer, base_prefix(question, trace))
        said = answer if i % 2 else str(int(answer) + 1)
        made.append(Item(prefix, encode_answer(real.tokenizer, "Answer:", answer_text(said))))
    return made


def test_every_token_agrees_with_a_plain_forward_pass(
    real: VllmScorer, reference: PreTrainedModel, items: list[Item]
) -> None:
    """Fails if vLLM's scores are those of other positions, of processed log-probs, or of another model."""
    results = real.score([*items, *items[:5]])
    expected = [forward_logprobs(reference, item) for item in [*items, *items[:5]]]
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        assert isinstance(result, Score), result
        worst = max(worst, *(abs(a - b) for a, b in zip(result.token_logprobs, wanted, strict=True)))
    print(f"largest difference to transformers: {worst:.2e} over {sum(map(len, expected))} tokens")
    assert worst < 1e-4
    spread = [sum(values) for values in expected]
    assert max(spread) - min(spread) > 1, "scores that are all alike would agree with anything"


def test_greedy_answers_are_those_of_transformers(
    real: VllmScorer, reference: PreTrainedModel, items: list[Item]
) -> None:
    """Fails if the model's own answer is sampled, cut elsewhere, or continued from the answer to be scored."""
    results = real.score(items, Greedy(max_new_tokens=8))
    assert all(isinstance(r, Score) for r in results)
    for result, item in zip(results, items, strict=True):
        prefix = torch.tensor([item.prefix_ids])
        with torch.inference_mode():
            ids = reference.generate(
                prefix, attention_mask=torch.ones_like(prefix), do_sample=False, max_new_tokens=8, pad_token_id=0
            )[0, prefix.shape[1] :]
        assert result.greedy_text == real.tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0]
    assert len({r.greedy_text for r in results}) > 10


def test_the_longest_item_is_scored_and_one_token_more_is_refused_here(
    real: VllmScorer, reference: PreTrainedModel, items: list[Item]
) -> None:
    """Fails if max_length is not what the server takes: items would be refused there, or room be wasted."""
    long = items[0].prefix_ids * 40
    item = Item(long[: real.max_length - 4], items[0].answer_ids[:1] * 4)
    [result] = real.score([item])
    assert isinstance(result, Score), result
    assert result.token_logprobs == pytest.approx(forward_logprobs(reference, item), abs=1e-4)
    with pytest.raises(ValueError, match="item 0"):
        real.score([Item((*item.prefix_ids, 5), item.answer_ids)])


def test_an_id_outside_the_vocabulary_costs_no_other_item_its_score(real: VllmScorer, items: list[Item]) -> None:
    """Fails if one bad item makes vLLM refuse the items that share its request."""
    bad = Item(items[0].prefix_ids, (10**6,))
    results = real.score([items[0], bad, items[1]])
    assert [type(r) for r in results] == [Score, Unscored, Score]
    assert "vocabulary" in results[1].reason


def test_the_fingerprint_names_weights_and_settings(real: VllmScorer) -> None:
    """Fails if stored scores of another dtype or of other weights could be taken for this server's."""
    fingerprint = real.fingerprint
    assert {
        "backend": "vllm",
        "model": MODEL,
        "dtype": "float32",
        "route": "prompt_logprobs",
    }.items() <= fingerprint.items()
    assert fingerprint["settings"].startswith(f"vllm-{fingerprint['vllm']}-")
    assert fingerprint["weights"] != "unknown"


def test_sigkill_of_the_parent_leaves_no_vllm_process(vllm_python: str, tmp_path: Path) -> None:
    """Fails if vLLM's engine or worker survive a killed run: they hold the memory and the cores."""
    parent, supervisor = start_parent(tmp_path, MODEL, vllm_python, "waits")
    processes = descendants(supervisor)
    assert len(processes) >= 4, "the supervisor, the API server, the engine and its worker"
    kill(parent)
    assert left_after(processes, 20) == []


def test_close_leaves_no_vllm_process(real: VllmScorer) -> None:
    """Fails if close() returns before the engine is gone. Last in this file: it ends the server of the others."""
    processes = descendants(real._server.supervisor_pid)
    assert len(processes) >= 4
    real.close()
    assert left_after(processes, 0) == []
    with pytest.raises(ScorerError):
        real.score([Item((1,), (2,))])
