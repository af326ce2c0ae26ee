"""A small server in this process that answers like vLLM, or wrongly on request.

The fake model has 16 tokens or more, and a log-prob anyone can compute again (`true_logprobs`), so every number can be
checked.
"""

import base64
import contextlib
import io
import json
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from scorer.types import Item

VOCABULARY = 16
NEWLINE = 10
MAX_MODEL_LEN = 64


def true_logprobs(prefix: Sequence[int], vocabulary: int = VOCABULARY, model: int = 0) -> tuple[float, ...]:
    """The fake model: log-softmax of small integers that depend on the last token and on the prefix's sum."""
    return table((7 * prefix[-1] + sum(prefix) + model) % 13, vocabulary)


@cache
def table(context: int, vocabulary: int) -> tuple[float, ...]:
    logits = [((5 * t + context) % 13) / 2 for t in range(vocabulary)]
    norm = math.log(sum(math.exp(x) for x in logits))
    return tuple(x - norm for x in logits)


def true_score(item: Item, vocabulary: int = VOCABULARY) -> tuple[float, ...]:
    ids = [*item.prefix_ids, *item.answer_ids]
    return tuple(true_logprobs(ids[:i], vocabulary)[ids[i]] for i in range(len(item.prefix_ids), len(ids)))


def piece(token_id: int) -> str:
    return "\n" if token_id == NEWLINE else chr(ord("a") + token_id)


def true_greedy(prefix: tuple[int, ...], max_new_tokens: int) -> tuple[list[int], str, str]:
    """Token ids, text before the first newline, and what ended it."""
    ids: list[int] = []
    while len(ids) < max_new_tokens:
        logprobs = true_logprobs([*prefix, *ids])
        ids.append(logprobs.index(max(logprobs)))
        if ids[-1] == NEWLINE:
            return ids, "".join(map(piece, ids[:-1])), "stop"
    return ids, "".join(map(piece, ids)), "length"


class FakeTokenizer:
    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) % VOCABULARY for char in text[:40]]}

    all_special_ids = (0,)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(piece, ids))

    def __len__(self) -> int:
        return self.vocabulary


class HalfReply(str):
    """The beginning of a body; the connection is closed after it."""


class Wire(Enum):
    """What goes wrong below HTTP; given as a reply's body."""

    RESET = auto()  # the connection is reset before any byte
    SLOW = auto()  # nothing is sent until the client has hung up
    DRIP = auto()  # headers, and then a byte of the body every 20 ms until the client has hung up


PATIENCE_S = 10.0
"""Longest wait for a client to hang up."""


Reply = tuple[int, Any]
"""HTTP status, and the body: a JSON value, or text as it is."""


def encoded(rows: list[list[float]]) -> str:
    """Rows as /inference/v1/generate sends them."""
    file = io.BytesIO()
    np.save(file, np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows and rows[0] else 0))
    return base64.b64encode(file.getvalue()).decode()


def unpacked(text: str) -> list[list[float]]:
    """The reverse of `encoded`."""
    return np.load(io.BytesIO(base64.b64decode(text))).tolist()


class FakeVllm:
    """An HTTP server that scores with `true_logprobs`.

    Args:
        paths: of "completions", "generate" and "batch", those that exist (as without or with our plugin).
        version: decides which form of score-from-offset is understood; None for neither, as on the V1 runner.
        max_ids: the server's --max-logprobs.
        vocabulary: number of the model's tokens.
        max_model_len: as the model's card says.

    Attributes:
        fault: (request body, right reply) -> what is sent in its place, for all requests that score.
        bodies: the scoring requests that came in; `paths_seen` where to.
        shift: added to every log-prob that score-from-offset returns: a route that is wrong.
        cache: a set makes a prompt that was scored once lose its scores to a cache hit, as in vLLM 0.31.
        options: whether `logprob_token_ids` is understood.
        by_row: the form of score-from-offset, for versions whose string does not tell.
        model: another number is another model.
        cached_tokens: read from the prefix cache for every prompt, as the server says.
    """

    def __init__(
        self,
        paths: tuple[str, ...] = ("completions",),
        version: str | None = "0.31.0",
        max_ids: int = 20,
        vocabulary: int = VOCABULARY,
        max_model_len: int = MAX_MODEL_LEN,
    ) -> None:
        self.paths, self.version, self.max_ids, self.vocabulary = paths, version, max_ids, vocabulary
        self.by_row = version is not None and version >= "0.32"
        self.model = self.cached_tokens = 0
        self.paths_seen: list[str] = []
        self.shift = 0.0
        self.cache: set[tuple[int, ...]] | None = None
        self.options = False
        self.fault: Callable[[dict, dict], Reply] = lambda body, reply: (200, reply)
        self.bodies: list[dict] = []
        self.models: Reply = (
            200,
            {"data": [{"id": "fake", "root": "models/fake", "parent": None, "max_model_len": max_model_len}]},
        )
        self.shift_tokenizer = 0
        self.logits = False
        self.processed = False
        self.connections: list[socket.socket] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet a reply: two would wait 40 ms for each other

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.send(*fake.models)
                else:
                    self.send(
                        *(
                            (200, {"version": fake.version or "0.31.0"})
                            if self.path == "/version"
                            else (404, "no such page")
                        )
                    )

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    ids = FakeTokenizer()(body["prompt"])["input_ids"]
                    self.send(200, {"tokens": [i + fake.shift_tokenizer for i in ids]})
                    return
                kind = {"/v1/completions": "completions", "/inference/v1/generate": "generate"}.get(self.path, "batch")
                if kind not in fake.paths:
                    self.send(404, {"detail": "Not Found"})
                    return
                fake.bodies.append(body)
                fake.paths_seen.append(kind)
                try:
                    reply = {"completions": fake.complete, "generate": fake.generate, "batch": fake.batch}[kind](body)
                except ValueError as refusal:
                    self.send(400, {"error": {"message": str(refusal)}})
                    return
                self.send(*fake.fault(body, reply))

            def send(self, status: int, body: Any) -> None:
                if isinstance(body, Wire):
                    self.misbehave(body)
                    return
                if isinstance(body, HalfReply):
                    data, missing, self.close_connection = body.encode(), 500, True
                else:
                    data, missing = (body if isinstance(body, str) else json.dumps(body)).encode(), 0
                self.send_response(status)
                self.send_header("Content-Length", str(len(data) + missing))
                self.end_headers()
                self.wfile.write(data)

            def misbehave(self, how: Wire) -> None:
                self.close_connection = True
                if how is Wire.RESET:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())
                    return
                self.connection.settimeout(PATIENCE_S if how is Wire.SLOW else 0.02)
                if how is not Wire.SLOW:
                    end = b"\r\n\r\n"
                    self.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999" + end)
                started = time.monotonic()
                with contextlib.suppress(OSError):
                    while time.monotonic() < started + PATIENCE_S:
                        try:
                            self.connection.recv(1)
                            return  # the client has hung up
                        except TimeoutError:
                            self.connection.sendall(b" ")

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                fake.connections.append(connection)
                return connection, address

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that hung up early is part of these tests

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """As when a process dies: nobody listens, and open connections are cut."""
        self.http.shutdown()
        self.http.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def logprobs(self, prefix: Sequence[int]) -> tuple[float, ...]:
        return true_logprobs(prefix, self.vocabulary, self.model)

    def complete(self, body: dict) -> dict:
        return {
            "choices": [self.choice(body, i, ids) for i, ids in enumerate(body["prompt"])],
            "system_fingerprint": "s",
            "usage": {"prompt_tokens_details": {"cached_tokens": self.cached_tokens * len(body["prompt"])}},
        }

    def choice(self, body: dict, index: int, ids: list[int]) -> dict:
        rows = None
        if (top := body.get("prompt_logprobs")) is not None:
            rows = [None, *(self.row(ids[:i], ids[i], top) for i in range(1, len(ids)))]
        token_ids, text, ended = true_greedy(tuple(ids), body["max_tokens"])
        logprobs = None
        if "logprob_token_ids" in body:
            if not self.options:
                raise ValueError("extra fields not permitted: logprob_token_ids")
            values = self.logprobs(ids)
            top = {f"token_id:{t}": values[t] for t in {*body["logprob_token_ids"], token_ids[0]}}
            logprobs = {"top_logprobs": [top]}
        if "logit_bias" in body:
            [(biased, _)] = body["logit_bias"].items()
            token_ids = [int(biased)]
            logprobs = {"token_logprobs": [0.0 if self.processed else self.logprobs(ids)[int(biased)]]}
        return {
            "index": index,
            "text": text,
            "token_ids": token_ids,
            "finish_reason": ended,
            "logprobs": logprobs,
            "prompt_logprobs": rows,
            "prompt_token_ids": ids,
        }

    def generate(self, body: dict) -> dict:
        if "token_ids" not in body:
            raise ValueError("Field required: token_ids")
        one = self.one(body["token_ids"], body["sampling_params"])
        if (rows := one.pop("prompt_token_id_logprobs")) is not None:
            rows = encoded(rows)
        usage = {"prompt_tokens_details": {"cached_tokens": one.pop("num_cached_tokens")}}
        return {**one, "prompt_token_id_logprobs": rows, "usage": usage}

    def batch(self, body: dict) -> dict:
        results = []
        for request in body["requests"]:
            try:
                results.append(self.one(request["token_ids"], request["sampling_params"]))
            except ValueError as refusal:
                results.append({"error": str(refusal), "kind": "refused"})
        return {"results": results}

    def one(self, ids: list[int], params: dict) -> dict:
        """One result of /inference/v1/generate or of our batch endpoint."""
        if any(not 0 <= i < self.vocabulary for i in ids):
            raise ValueError("token out of vocabulary")
        choice = self.choice({**params}, 0, ids)
        first = None
        if "logprob_token_ids" in params:
            top = choice["logprobs"]["top_logprobs"][0]
            first = [{key.removeprefix("token_id:"): {"logprob": value, "rank": 1} for key, value in top.items()}]
        return {
            "prompt_token_ids": ids,
            "prompt_logprobs": choice["prompt_logprobs"],
            "prompt_token_id_logprobs": self.offset(ids, params),
            "num_cached_tokens": self.cached_tokens,
            "choices": [{**{k: choice[k] for k in ("token_ids", "text", "finish_reason")}, "logprobs": first}],
        }

    def offset(self, ids: list[int], params: dict) -> list[list[float]] | None:
        wanted = params.get("prompt_logprob_token_ids")
        if wanted is None:
            return None
        by_row = isinstance(wanted[0], list)
        if self.version is None:
            raise ValueError("prompt_logprob_token_ids requires the V2 model runner")
        if by_row != self.by_row:
            raise ValueError("prompt_logprob_token_ids has the wrong form for this version")
        if not by_row and (len(wanted) > self.max_ids or len(set(wanted)) != len(wanted)):
            raise ValueError(f"more than {self.max_ids} ids, or the same id twice")
        if any(not 0 <= i < self.vocabulary for row in wanted for i in (row if by_row else [row])):
            raise ValueError("prompt_logprob_token_ids contain out-of-vocab token ids")
        if self.cache is not None:
            if tuple(ids) in self.cache and not params["skip_reading_prefix_cache"]:
                return None
            self.cache.add(tuple(ids))
        start = params["prompt_logprob_start"]
        rows = []
        for position in range(start, len(ids) - 1):
            values = self.logprobs(ids[: position + 1])
            columns = wanted[position - start] if by_row else wanted
            rows.append([values[i] + self.shift for i in columns])
        return rows

    def row(self, prefix: list[int], token_id: int, top: int) -> dict:
        values = self.logprobs(prefix)
        if self.logits:
            values = [v + 9.0 for v in values]
        ranked = sorted(range(self.vocabulary), key=lambda t: -values[t]) if top else []
        shown = {token_id, *ranked[:top]}
        return {
            str(t): {"logprob": values[t], "rank": sum(v >= values[t] for v in values), "decoded_token": piece(t)}
            for t in shown
        }
