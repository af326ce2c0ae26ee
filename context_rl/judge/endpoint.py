"""One chat endpoint that speaks OpenAI's protocol: a request, its repetitions, and which errors no repetition mends."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from scorer.types import ScorerError
from scorer.vllm.http import RequestFailed, error_message, exchange, open_client

KEY = "OPENAI_API_KEY"
PASSING = ("timeout", "connection", "overloaded", "server_error")
"""Faults that may be gone at the next attempt."""
LONGEST_WAIT_S = 60.0
SHORTEST_KEY = 8
"""Characters of a key that is a secret. Local servers take any word for one, and "no" must not vanish from replies."""
FIXED = ("model", "messages", "stream", "n")
"""What `options` cannot set."""


class JudgeError(ScorerError):
    """The judge cannot work at all (a wrong key, no such model, nobody answers): one line that says what to do."""


class Said(NamedTuple):
    """A reply: its text (None: there is none, see `shown`), and whether it was cut at the token limit."""

    text: str | None
    shown: str
    cut: bool


class ChatEndpoint:
    """POST {url}/chat/completions. The environment's OPENAI_API_KEY, if set, goes into the header and nowhere else.

    Args:
        url: as OpenAI's clients take it; it mostly ends in /v1.
        timeout_s: seconds for one request.
        connections: of all threads together.
        options: the request's body besides model and messages; None takes a key out.

    Attributes:
        requests: sent so far, repeated ones included.

    Raises:
        JudgeError: settings or a key that cannot be used.
    """

    def __init__(self, url: str, model: str, *, timeout_s: float, connections: int, options: Mapping[str, Any]):
        check_endpoint(url, options)
        self.url, self.model = url.rstrip("/").removesuffix("/chat/completions"), model
        self.timeout_s = timeout_s
        self.options = {name: value for name, value in options.items() if value is not None}
        self.key = os.environ.get(KEY, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise JudgeError(f"{KEY} holds characters that no key has; set it anew")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = open_client(self.url, headers, timeout_s, connections)
        self.requests = 0
        self._lock = threading.Lock()

    def ask(self, messages: Sequence[Mapping[str, str]], waits_s: Sequence[float], over: threading.Event) -> Said:
        """The reply, after as many attempts as there are waits, and one. Threads may share the endpoint.

        Args:
            waits_s: between two attempts; the server may ask for longer.
            over: ends the waiting, and with it the attempts.

        Raises:
            RequestFailed: no usable answer.
            JudgeError: every other request would be refused too.
        """
        body = {"model": self.model, "messages": messages, **self.options}
        for wait in waits_s:
            try:
                return self._post(body)
            except RequestFailed as failure:
                pause = min(max(wait, failure.wait_s), LONGEST_WAIT_S)
                if failure.fault not in PASSING or over.wait(pause):
                    raise
        return self._post(body)

    def _post(self, body: Mapping[str, Any]) -> Said:
        with self._lock:
            self.requests += 1
        reply, text = exchange(self.http, "/chat/completions", body, self.timeout_s)
        if len(self.key) >= SHORTEST_KEY:  # some servers repeat it in their errors
            text = text.replace(self.key, "***")
        if reply.status_code == 200:
            return read_reply(text)
        said = f"HTTP {reply.status_code}: {' '.join(error_message(text).split())}"
        if advice := self._hopeless(reply, text):
            raise JudgeError(f"the judge at {self.url} refuses every request: {said}; {advice}")
        if reply.status_code == 429 or reply.status_code >= 500:
            fault = "overloaded" if reply.status_code == 429 else "server_error"
            asked_for = reply.headers.get("retry-after", "")
            raise RequestFailed(fault, said, float(asked_for) if asked_for.isdecimal() else 0.0)
        raise RequestFailed("refused", said)

    def _hopeless(self, reply: httpx.Response, text: str) -> str | None:
        """What to do about an answer that any other request would get too; None for another one."""
        status = reply.status_code
        if status in (401, 403):
            return f"is {KEY} the right key for it?" if self.key else f"set {KEY}"
        if status in (404, 405):
            return f"check --judge_url (it mostly ends in /v1) and --judge_model {self.model!r}"
        if status == 402 or (status == 429 and "insufficient_quota" in text):
            return "the account has no credit left"
        if reply.is_redirect:
            return f"it has moved to {reply.headers.get('location')!r:.200}; give that as --judge_url"
        return None

    def close(self) -> None:
        """Closes the connections."""
        self.http.close()


def check_endpoint(url: str, options: Mapping[str, Any]) -> None:
    """Raises JudgeError for a URL that is none or holds a password, and for options that are not the user's to set."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise JudgeError(f"--judge_url is {url!r}; it must be an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise JudgeError(f"--judge_url holds a password or a query; a key belongs into {KEY}, which is written nowhere")
    for name in options:
        if name in FIXED:
            raise JudgeError(f"--judge_options cannot set {name!r}")


def read_reply(text: str) -> Said:
    """The reply in the body of an answer with status 200."""
    try:
        choice = json.loads(text)["choices"][0]
        content, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Said(None, text, False)
    if not isinstance(content, str):
        return Said(None, text, cut)
    content = content.encode("utf-8", "replace").decode()  # half a character cannot be written down
    return Said(content, content, cut)
