"""A vLLM server of our own: started, waited for until it really scores, restarted once, and never left behind.

    with launch("models/tiny-base", log_path="runs/x/vllm.log", dtype="float32") as server:
        scorer = VllmScorer(server.url, model=server.served_name, server=server)

How its processes are kept from outliving this one: `scorer.vllm.supervisor`.
"""

import functools
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scorer.types import ScorerError
from scorer.vllm.command import LAUNCHER_VARIABLES, PLUGIN_FOLDER, serve_command, server_environment
from scorer.vllm.start import LOG_TAIL_LINES, PROBE_TIMEOUT_S, ServerStart, auth_headers

__all__ = ["LAUNCHER_VARIABLES", "PLUGIN_FOLDER", "ManagedServer", "auth_headers", "launch"]

STARTUP_TIMEOUT_S = 600.0
PORT_ATTEMPTS = 3


class ManagedServer:
    """A running `vllm serve`. Made by `launch`; a context manager that closes itself. Threads may share it.

    Attributes:
        model: what it was asked to serve (a folder or a hub name).
        dtype: as given to `launch`.
        log_path: everything the server printed, after a restart that of both.
        generation: 0, and 1 after the restart. `url` and `served_name` belong to one generation: read them again.
    """

    def __init__(
        self,
        command_for: Callable[..., list[str]],
        env: Mapping[str, str],
        *,
        log_path: Path,
        model: str,
        dtype: str,
        timeout_s: float,
    ):
        """Starts `command_for(port=..., served_name=...)` and returns once it scores; see `wait_until_ready`."""
        self.model, self.dtype, self.log_path, self.generation = model, dtype, log_path, 0
        self._start_once = functools.partial(ServerStart, command_for, env, log_path, model)
        self._closed, self._restarting, self._restarted = threading.Event(), threading.Lock(), False
        self._starting: ServerStart | None = None
        self._current = self._start(timeout_s)

    def __enter__(self) -> "ManagedServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Address on the loopback interface, without /v1. A restart changes it."""
        return self._current.url

    @property
    def served_name(self) -> str:
        """The name to use in requests. A restart changes it.

        It is drawn at random for every start, so that a request which reaches another server by mistake is refused
        there instead of being scored by another model.
        """
        return self._current.served_name

    @property
    def supervisor_pid(self) -> int:
        """The process between this one and the server; every process of the server descends from it."""
        return self._current.process.pid

    def exit_code(self) -> int | None:
        """Exit code of the server, None while it runs; 128 + N where signal N ended it, as in a shell.

        While a dead server is being replaced, it is still the dead one's.
        """
        return self._current.process.exit_code()

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines this server wrote."""
        return "\n".join(self._current.log()[-lines:])

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once the server has answered a scoring request. Says on stderr how long it has waited.

        Raises:
            ScorerError: the server ended, refused the request, answered it without log-probs, or did not answer in
                `timeout_s` seconds; with the lines of its log that name the cause.
        """
        self._current.wait_until_ready(timeout_s, self._closed.is_set)

    def restart_once(self, seen_generation: int, timeout_s: float = STARTUP_TIMEOUT_S) -> bool:
        """Starts a server that died or hangs again, with the same command on a new port, and waits until it scores.

        May be called by several threads at once, also on suspicion: a server that scores is left alone. Callers read
        `url`, `served_name` and `generation` again when it returns True.

        Args:
            seen_generation: `generation` as the caller read it before its requests failed.
            timeout_s: seconds until the first scored request of the new server at the latest.

        Returns:
            True: the server is another than the caller knew. False: it is the same one, and it scores.

        Raises:
            ScorerError: it was started again before, the new one did not come up, or this server was closed.
        """
        with self._restarting:
            if self.generation > seen_generation:
                return True
            if self._closed.is_set():
                raise ScorerError(f"the vLLM server for {self.model} was closed")
            code = self.exit_code()
            if code is None and self._scores():
                return False
            how = "does not answer" if code is None else f"ended with exit code {code}"
            if self._restarted:
                raise ScorerError(
                    f"vLLM for {self.model} died twice: the restarted server {how}; {self._current.explain()}"
                )
            self._restarted = True
            print(f"vLLM for {self.model} {how}; it is started again", file=sys.stderr, flush=True)
            self._current.process.stop()
            self._current = self._start(timeout_s)
            if self._closed.is_set():  # close() came between the last look at this and the line above
                self._current.process.stop()
                raise ScorerError(f"the vLLM server for {self.model} was closed")
            self.generation += 1
            return True

    def close(self) -> None:
        """Ends the server with all its processes and waits for that. Safe to call twice; a forked child has no say."""
        self._closed.set()
        for start in (self._starting, self._current):
            if start is not None:
                start.process.stop()

    def _scores(self) -> bool:
        try:
            return self._current.not_ready(PROBE_TIMEOUT_S) is None
        except ScorerError:
            return False

    def _start(self, timeout_s: float) -> ServerStart:
        """A server that scores; another port is tried where somebody took the first one. On an error none is left."""
        for attempt in range(1, PORT_ATTEMPTS + 1):
            start = self._starting = self._start_once()
            try:
                start.wait_until_ready(timeout_s, self._closed.is_set)
                return start
            except BaseException as error:
                start.process.stop()
                lost_the_port = any("Address already in use" in line for line in start.log())
                if not isinstance(error, ScorerError) or not lost_the_port or attempt == PORT_ATTEMPTS:
                    raise
            finally:
                self._starting = None
        raise AssertionError("unreachable")


def launch(
    model: str | Path,
    *,
    log_path: str | Path | None = None,
    python: str | Path | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    device: str | None = None,
    api_server_count: int | None = None,
    enforce_eager: bool = False,
    seed: int = 0,
    plugin: bool = True,
    extra_args: Sequence[str] = (),
    startup_timeout_s: float = STARTUP_TIMEOUT_S,
) -> ManagedServer:
    """Starts `vllm serve MODEL` on a free port of the loopback interface and returns once it scores.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        log_path: file for the server's output, appended to; None makes one in the system's folder for temporary files.
        python: interpreter of the environment that has vLLM; None is this one.
        dtype: as vLLM spells it; "float32" agrees with transformers to 1e-4. Otherwise the LM head alone is float32.
        max_model_len: most tokens of prompt + answer, None for the model's own limit.
        gpu_memory_utilization: share of each GPU's memory, None for vLLM's default.
        device: the GPUs that the server may use, such as "1" or "0,1", as CUDA numbers all of this machine's; None
            leaves it those of this process.
        api_server_count: processes that take requests, None for vLLM's default.
        enforce_eager: no torch.compile and no CUDA graphs: starts faster, decodes slower.
        plugin: load `scorer/vllm/plugin` into the server: faster scoring, same numbers.
        extra_args: further arguments of `vllm serve`; they come last and win. Those that would change what is scored
            are refused.
        startup_timeout_s: seconds until the first scored request at the latest.

    Raises:
        ScorerError: no vLLM beside `python`, a refused flag, or the server did not come up (with what its log says).
    """
    python = Path(sys.executable if python is None else python)
    vllm = python.parent / "vllm"  # no resolve(): a venv's python is a link into another installation
    if not vllm.exists():
        raise ScorerError(
            f"there is no vLLM beside {python}: install the 'vllm' extra there, or name the python of an environment "
            "that has it (scripts/setup_vllm_cpu.sh makes one for CPU)"
        )
    command_for = functools.partial(
        serve_command,
        [str(python), str(vllm)],
        str(model),
        dtype=dtype,
        seed=seed,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        api_server_count=api_server_count,
        enforce_eager=enforce_eager,
        extra_args=tuple(extra_args),
    )
    command_for(served_name="n", port=1)  # a refused flag is an error before anything is written or started
    if log_path is None:
        handle, log_path = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        os.close(handle)
    return ManagedServer(
        command_for,
        server_environment(os.environ, python.parent, device=device, plugin=plugin),
        log_path=Path(log_path),
        model=str(model),
        dtype=dtype,
        timeout_s=startup_timeout_s,
    )
