"""Requests to one or several vLLM servers over HTTP, in the fastest of three ways that a server offers.

- batch: POST /inference/v1/generate_batch, many requests in one. Only servers with our plugin have it.
- generate: POST /inference/v1/generate, one request each; `vllm serve --enable-scale-out`.
- completions: POST /v1/completions, several prompts of equal parameters in one request; every vLLM.

Nothing is decided here about what a reply means (`scorer.vllm.replies`) or about asking again (`scorer.vllm.asks`).
"""

import base64
import binascii
import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from tqdm import tqdm

from scorer.types import ScorerError, Unscored, Usage
from scorer.vllm.asks import Ask
from scorer.vllm.replies import Reply
from scorer.vllm.server import auth_headers

CONNECT_TIMEOUT_S = 10.0
REST_S = 30.0
"""Seconds for which a replica that did not answer gets no new group, where there is another."""
PROMPTS_PER_COMPLETION = 16
SHOW_PROGRESS_AFTER_S = 10.0
TRANSPORTS = ("batch", "generate", "completions")
PATHS = {
    "batch": "/inference/v1/generate_batch",
    "generate": "/inference/v1/generate",
    "completions": "/v1/completions",
}


class RequestFailed(Exception):
    """A request without a usable answer. `fault` is one of `scorer.types.FAULTS`; the server may ask for `wait_s`."""

    def __init__(self, fault: str, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.fault, self.wait_s = fault, wait_s

    @property
    def unanswered(self) -> bool:
        """Whether the server said nothing at all."""
        return self.fault in ("timeout", "connection")


def exchange(http: httpx.Client, path: str, body: Mapping[str, Any], timeout_s: float) -> tuple[httpx.Response, str]:
    """(Status and headers, text) of the answer to a POST, which is whole within `timeout_s` seconds.

    Raises:
        RequestFailed: no answer, or not all of it in time.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with http.stream("POST", path, json=body) as reply:
            pieces = []
            for piece in reply.iter_bytes():
                pieces.append(piece)
                if time.monotonic() > deadline:  # httpx's own timeout starts anew with every byte
                    raise RequestFailed("timeout", f"timeout after {timeout_s:g} s, within the answer")
    except httpx.ConnectTimeout as error:
        raise RequestFailed("connection", f"no connection: {error}") from error
    except httpx.TimeoutException as error:
        raise RequestFailed("timeout", f"timeout after {timeout_s:g} s") from error
    except httpx.RequestError as error:
        raise RequestFailed("connection", f"connection lost: {type(error).__name__}: {error}") from error
    except RuntimeError as error:  # another thread has closed this client, because the server was restarted
        raise RequestFailed("connection", f"connection closed: {error}") from error
    return reply, b"".join(pieces).decode(errors="replace")


def open_client(url: str, headers: Mapping[str, str], timeout_s: float, connections: int) -> httpx.Client:
    """An HTTP client of one server, for up to `connections` threads."""
    return httpx.Client(
        base_url=url,
        headers=headers,
        # pool=None: waiting for a connection of our own pool says nothing about the server.
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s), pool=None),
        # vLLM drops connections that were idle for 5 s; we drop them first.
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=2),
        trust_env=not is_loopback(url),
    )


class Replica:
    """One server.

    Attributes:
        url: without /v1.
        served_name: of the model in requests; set by whoever has found it.
        transports: those that the server has; set by the probe.
        resting_until: time.monotonic() before which it gets no new group.
    """

    def __init__(self, url: str, timeout_s: float, connections: int):
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.served_name = ""
        self.transports: tuple[str, ...] = ("completions",)
        self.resting_until = 0.0
        self.timeout_s = timeout_s
        self.http = open_client(self.url, auth_headers(), timeout_s, connections)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of the server's answer. Its first byte has to come within `timeout_s` seconds, and so has its last.

        Raises:
            RequestFailed: no usable answer.
            ScorerError: the server does not know the model or the caller: no request can succeed.
        """
        reply, text = exchange(self.http, path, body, self.timeout_s)
        status = reply.status_code
        said = f"HTTP {status}: {error_message(text)}" if status != 200 else ""
        if status in (401, 403, 404):
            raise ScorerError(f"{self.url}{path} refuses every request for {self.served_name!r}: {said}")
        if status == 429:
            raise RequestFailed("overloaded", said)
        if status >= 500:
            raise RequestFailed("server_error", said)
        if status != 200:
            raise RequestFailed("refused", said)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestFailed("garbled", f"the reply is no JSON ({error}): {text!r:.80}") from error

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object from the server, for the checks at the start.

        Raises:
            RequestFailed: nobody answers.
            ScorerError: something else than a vLLM server does.
        """
        try:
            reply = self.http.get(path)
        except httpx.HTTPError as error:
            raise RequestFailed("connection", str(error)) from error
        try:
            answer = reply.json()
        except ValueError:
            answer = None
        if reply.status_code != 200 or not isinstance(answer, dict):
            raise ScorerError(
                f"{self.url}{path} answers, but not as vLLM does (HTTP {reply.status_code}: {reply.text!r:.200}); "
                "is the URL that of an OpenAI-compatible vLLM server?"
            )
        return answer


Request = tuple[Replica, str, list[int]]
"""Where to, by which transport, and the positions of the asks that travel together."""


class Servers:
    """Replicas of one model. `send` is a `scorer.vllm.asks.Send`.

    The asks of a group go to one replica, call after call, because its cache has what they share. A replica that fails
    is passed over by the next attempt and rests for a while.
    """

    def __init__(self, replicas: Sequence[Replica], concurrency: int, prompts_per_request: int):
        self.replicas = list(replicas)
        self.concurrency, self.prompts_per_request = concurrency, prompts_per_request
        self.pins: dict[str, int] = {}
        self.load = [0] * len(self.replicas)
        self._lock = threading.Lock()
        self._next = itertools.count()

    def send(self, asks: Sequence[Ask], attempt: int, usage: Usage) -> tuple[list[Reply | Unscored], bool]:
        """One reply an ask, in order, and whether all that was sent stayed without any answer."""
        requests = self.requests(asks, attempt)
        nowhere = Unscored("the server has no endpoint for it (vllm serve --enable-scale-out)", "refused")
        replies: list[Reply | Unscored] = [nowhere] * len(asks)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="vllm-scorer")
        progress = tqdm(total=len(asks), desc="scoring", unit="request", leave=False, delay=SHOW_PROGRESS_AFTER_S)
        try:
            futures = [pool.submit(self.deliver, request, asks, usage) for request in requests]
            failures = self.watch(futures, requests, progress)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            progress.close()
        for future, (_, _, positions) in zip(futures, requests, strict=True):
            if future.cancelled():
                because = f"not sent, because the requests before it failed: {failures[-1]}"
                found: list[Reply | Unscored] = [Unscored(because, "not_sent")] * len(positions)
            else:
                found = future.result()[0]
            for position, reply in zip(positions, found, strict=True):
                replies[position] = reply
        return replies, bool(requests) and len(failures) == len(requests)

    def watch(self, futures: Sequence[Future], requests: Sequence[Request], progress: tqdm) -> list[RequestFailed]:
        """Waits for all requests; returns the failures of those that no server answered.

        When a full round of requests in a row went unanswered, the rest is not sent: with a server that hangs, each
        round would take as long as the timeout.
        """
        positions = {future: request[2] for future, request in zip(futures, requests, strict=True)}
        failures, in_a_row = [], 0
        for future in as_completed(futures):
            progress.update(len(positions[future]))
            if future.cancelled():
                failures.append(failures[-1])
                continue
            _, failure = future.result()
            if failure is None:
                in_a_row = 0
                continue
            failures.append(failure)
            in_a_row += 1
            if in_a_row >= self.concurrency * len(self.replicas):
                for waiting in futures:
                    waiting.cancel()
        return failures

    def requests(self, asks: Sequence[Ask], attempt: int) -> list[Request]:
        """The asks in requests, those of a group to one replica, siblings side by side."""
        by_kind: dict[tuple[int, str, Any], list[int]] = {}
        requests: list[Request] = []
        for position, ask in enumerate(asks):
            index = self.pinned(ask, attempt)
            replica = self.replicas[index]
            transport = transport_for(ask, replica.transports)
            if transport is None:
                continue
            alike = parameters_of(ask) if transport == "completions" else None
            size = {"batch": self.prompts_per_request, "generate": 1, "completions": PROMPTS_PER_COMPLETION}[transport]
            waiting = by_kind.setdefault((index, transport, alike), [])
            if not waiting or len(waiting) >= min(size, self.prompts_per_request):
                waiting = by_kind[index, transport, alike] = []
                requests.append((replica, transport, waiting))
            waiting.append(position)
        return requests

    def pinned(self, ask: Ask, attempt: int) -> int:
        """The replica of the ask's group, for another attempt the next one that does not rest; a new group, and one
        whose replica rests, gets the one with the fewest."""
        if len(self.replicas) == 1:
            return 0
        with self._lock:
            key = ask.group or f"prefix {hash(ask.prompt[:32])}"
            now = time.monotonic()
            pin = self.pins.get(key)
            if pin is None or self.replicas[pin].resting_until > now:
                awake = [i for i, replica in enumerate(self.replicas) if replica.resting_until <= now]
                pin = min(awake or range(len(self.replicas)), key=lambda i: self.load[i])
                self.pins[key] = pin
                self.load[pin] += 1
                return pin
            following = [(pin + attempt + step) % len(self.replicas) for step in range(len(self.replicas))]
            return next((i for i in following if self.replicas[i].resting_until <= now), following[0])

    def deliver(
        self, request: Request, asks: Sequence[Ask], usage: Usage
    ) -> tuple[list[Reply | Unscored], RequestFailed | None]:
        """A reply or an `Unscored` for each ask of one request, and what went wrong where no answer came at all."""
        replica, transport, positions = request
        mine = [asks[position] for position in positions]
        body = BODIES[transport](replica.served_name, mine)
        began = time.perf_counter()
        try:
            answer = replica.post(PATHS[transport], body)
        except RequestFailed as failure:
            if failure.unanswered:
                replica.resting_until = time.monotonic() + REST_S
                return [Unscored(str(failure), failure.fault)] * len(mine), failure
            if failure.fault != "refused" or len(mine) == 1:
                return [Unscored(str(failure), failure.fault)] * len(mine), None
            # The server refuses a request for one bad prompt in it. Sent one by one, the others get their score.
            alone = [self.deliver((replica, transport, [position]), asks, usage) for position in positions]
            unanswered = [failure for _, failure in alone if failure is not None]
            return [replies[0] for replies, _ in alone], unanswered[0] if len(unanswered) == len(alone) else None
        finally:
            with self._lock:
                usage.requests += 1
                usage.latencies.append(time.perf_counter() - began)
        return READERS[transport](answer, mine), None

    def close(self) -> None:
        """Closes the connections."""
        for replica in self.replicas:
            replica.http.close()


# --- the three transports: bodies out, replies in ---


def transport_for(ask: Ask, available: Sequence[str]) -> str | None:
    """The first of TRANSPORTS that the server has and that can carry the ask; None where there is none."""
    able = {
        "batch": True,
        "generate": ask.kind.startswith("offset"),
        "completions": not ask.kind.startswith("offset"),
    }
    return next((transport for transport in TRANSPORTS if transport in available and able[transport]), None)


def parameters_of(ask: Ask) -> str:
    """Equal for asks that can travel in one completions request."""
    return json.dumps(ask.params, sort_keys=True)


def batch_body(model: str, asks: Sequence[Ask]) -> dict[str, Any]:
    return {
        "model": model,
        "requests": [
            {"token_ids": ask.prompt, "sampling_params": {**ask.params, "detokenize": ask.kind == "greedy"}}
            for ask in asks
        ],
    }


def generate_body(model: str, asks: Sequence[Ask]) -> dict[str, Any]:
    [ask] = asks
    params = {**ask.params, "detokenize": False}
    return {"model": model, "token_ids": ask.prompt, "sampling_params": params, "return_token_ids": True}


def completions_body(model: str, asks: Sequence[Ask]) -> dict[str, Any]:
    params = {**asks[0].params, "return_token_ids": True}
    if "logprob_token_ids" in params:
        params |= {"logprobs": 0, "return_tokens_as_token_ids": True}
    return {"model": model, "prompt": [ask.prompt for ask in asks], **params}


def read_batch(answer: object, asks: Sequence[Ask]) -> list[Reply | Unscored]:
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        return [Unscored(f"the reply has no results: {answer!r:.120}", "garbled")] * len(asks)
    if len(results) != len(asks):
        return [Unscored(f"{len(results)} results for {len(asks)} requests", "missing")] * len(asks)
    return [one_of_a_batch(result) for result in results]


def one_of_a_batch(result: object) -> Reply | Unscored:
    if not isinstance(result, dict):
        return Unscored(f"the result is {result!r:.80}", "garbled")
    if "error" in result:
        fault = "refused" if result.get("kind") == "refused" else "server_error"
        return Unscored(f"vLLM: {result['error']}", fault)
    try:
        scores = decoded(result.get("prompt_token_id_logprobs"))
    except ValueError as error:
        return Unscored(f"the scores are no array: {error}", "garbled")
    choice = first_choice(result)
    rows = choice.get("logprobs")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else None
    return Reply(
        prompt_ids=result.get("prompt_token_ids"),
        prompt_logprobs=result.get("prompt_logprobs"),
        offset_logprobs=scores,
        token_ids=choice.get("token_ids"),
        finish_reason=choice.get("finish_reason"),
        first_logprobs=first
        and {token_id: entry.get("logprob") if isinstance(entry, dict) else entry for token_id, entry in first.items()},
        cached_tokens=result.get("num_cached_tokens"),
    )


def read_generate(answer: object, asks: Sequence[Ask]) -> list[Reply | Unscored]:
    if not isinstance(answer, dict) or "choices" not in answer:
        return [Unscored(f"the reply has no choices: {answer!r:.120}", "garbled")]
    try:
        scores = decoded(answer.get("prompt_token_id_logprobs"))
    except ValueError as error:
        return [Unscored(f"the scores are no base64 of a NumPy array: {error}", "garbled")]
    return [Reply(answer.get("prompt_token_ids"), offset_logprobs=scores, cached_tokens=cached_tokens(answer))]


def read_completions(answer: object, asks: Sequence[Ask]) -> list[Reply | Unscored]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        return [Unscored(f"the reply has no choices: {answer!r:.120}", "garbled")] * len(asks)
    by_index: dict[int, list[dict[str, Any]]] = {}
    for choice in choices:
        if isinstance(choice, dict) and isinstance(choice.get("index"), int):
            by_index.setdefault(choice["index"], []).append(choice)
    # The server counts cached tokens for the whole request.
    cached = cached_tokens(answer)
    replies: list[Reply | Unscored] = []
    for index in range(len(asks)):
        found = by_index.get(index, [])
        if len(found) != 1:
            replies.append(
                Unscored(f"{len(found)} results for prompt {index} of {len(asks)} in one request", "missing")
            )
            continue
        choice = found[0]
        logprobs = choice.get("logprobs")
        top = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
        first = top[0] if isinstance(top, list) and top and isinstance(top[0], dict) else None
        replies.append(
            Reply(
                prompt_ids=choice.get("prompt_token_ids"),
                prompt_logprobs=choice.get("prompt_logprobs"),
                token_ids=choice.get("token_ids"),
                finish_reason=choice.get("finish_reason"),
                first_logprobs=first and {key.removeprefix("token_id:"): value for key, value in first.items()},
                cached_tokens=cached if index == 0 else 0,
            )
        )
    return replies


BODIES: dict[str, Callable[[str, Sequence[Ask]], dict[str, Any]]] = {
    "batch": batch_body,
    "generate": generate_body,
    "completions": completions_body,
}
READERS: dict[str, Callable[[object, Sequence[Ask]], list[Reply | Unscored]]] = {
    "batch": read_batch,
    "generate": read_generate,
    "completions": read_completions,
}


def first_choice(result: Mapping[str, Any]) -> dict[str, Any]:
    choices = result.get("choices")
    return choices[0] if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict) else {}


def cached_tokens(answer: Mapping[str, Any]) -> Any:
    """Tokens read from the prefix cache, where the server tells (--enable-prompt-tokens-details)."""
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return details.get("cached_tokens") if isinstance(details, dict) else None


def decoded(scores: object) -> np.ndarray | list[Any] | None:
    """Scores as an array: from vLLM's base64 of a .npy file, or from our plugin's {"shape", "float32"}.

    None and lists stay what they are.

    Raises:
        ValueError: it is something else.
    """
    if scores is None or isinstance(scores, list):
        return scores
    if isinstance(scores, dict) and isinstance(scores.get("float32"), str):
        try:
            return np.frombuffer(base64.b64decode(scores["float32"], validate=True), "<f4").reshape(scores["shape"])
        except (binascii.Error, KeyError, TypeError) as error:
            raise ValueError(repr(error)) from error
    if not isinstance(scores, str):
        raise ValueError(f"{scores!r:.80}")
    try:
        array = np.lib.format.read_array(io.BytesIO(base64.b64decode(scores, validate=True)), allow_pickle=False)
    except (binascii.Error, EOFError, OSError) as error:
        raise ValueError(str(error)) from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"shape {array.shape}, type {array.dtype}")
    return array


def error_message(text: str) -> str:
    """What the server says about a refused request, at most 300 characters."""
    try:
        return str(json.loads(text)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:300]


def is_loopback(url: str) -> bool:
    """Whether the URL names this machine itself, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
