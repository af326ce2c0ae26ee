"""A small server in this process that answers like vLLM, or wrongly on request.

The fake model has 16 tokens and a log-prob anyone can compute again (`true_logprobs`), so every number can be checked.
"""

import base64
import contextlib
import io
import json
import math
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from scorer.types import Item

VOCABULARY = 16
NEWLINE = 10
MAX_MODEL_LEN = 64


def true_logprobs(prefix: list[int]) -> list[float]:
    """The fake model: log-softmax of small integers that depend on the last token and on the prefix's sum."""
    logits = [((5 * t + 7 * prefix[-1] + sum(prefix)) % 13) / 2 for t in range(VOCABULARY)]
    norm = math.log(sum(math.exp(x) for x in logits))
    return [x - norm for x in logits]


def true_score(item: Item) -> tuple[float, ...]:
    ids = [*item.prefix_ids, *item.answer_ids]
    return tuple(true_logprobs(ids[:i])[ids[i]] for i in range(len(item.prefix_ids), len(ids)))


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
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) % VOCABULARY for char in text[:40]]}

    all_special_ids = (0,)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(piece, ids))

    def __len__(self) -> int:
        return VOCABULARY


class HalfReply(str):
    """The beginning of a body; the connection is closed after it."""


Reply = tuple[int, Any]
"""HTTP status, and the body: a JSON value, or text as it is."""


class FakeVllm:
    """An HTTP server that scores with `true_logprobs`.

    Args:
        paths: of "completions", "generate" and "batch", those that exist (as without or with our plugin).
        version: decides which form of score-from-offset is understood; None for neither, as on the V1 runner.
        max_ids: the server's --max-logprobs.

    Attributes:
        fault: (request body, right reply) -> what is sent in its place, for all requests that score.
        bodies: the scoring requests that came in; `paths_seen` where to.
        shift: added to every log-prob that score-from-offset returns: a route that is wrong.
        cache: a set makes a prompt that was scored once lose its scores to a cache hit, as in vLLM 0.31.
        options: whether `logprob_token_ids` is understood.
    """

    def __init__(
        self, paths: tuple[str, ...] = ("completions",), version: str | None = "0.31.0", max_ids: int = 20
    ) -> None:
        self.paths, self.version, self.max_ids = paths, version, max_ids
        self.paths_seen: list[str] = []
        self.shift = 0.0
        self.cache: set[tuple[int, ...]] | None = None
        self.options = False
        self.fault: Callable[[dict, dict], Reply] = lambda body, reply: (200, reply)
        self.bodies: list[dict] = []
        self.models: Reply = (
            200,
            {"data": [{"id": "fake", "root": "models/fake", "parent": None, "max_model_len": MAX_MODEL_LEN}]},
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
                if isinstance(body, HalfReply):
                    data, missing, self.close_connection = body.encode(), 500, True
                else:
                    data, missing = (body if isinstance(body, str) else json.dumps(body)).encode(), 0
                self.send_response(status)
                self.send_header("Content-Length", str(len(data) + missing))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

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

    def complete(self, body: dict) -> dict:
        return {
            "choices": [self.choice(body, i, ids) for i, ids in enumerate(body["prompt"])],
            "system_fingerprint": "s",
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
            values = true_logprobs(ids)
            top = {f"token_id:{t}": values[t] for t in {*body["logprob_token_ids"], token_ids[0]}}
            logprobs = {"top_logprobs": [top]}
        if "logit_bias" in body:
            [(biased, _)] = body["logit_bias"].items()
            token_ids = [int(biased)]
            logprobs = {"token_logprobs": [0.0 if self.processed else true_logprobs(ids)[int(biased)]]}
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
            file = io.BytesIO()
            np.save(file, np.array(rows, dtype=np.float64))
            rows = base64.b64encode(file.getvalue()).decode()
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
        if any(not 0 <= i < VOCABULARY for i in ids):
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
            "num_cached_tokens": 0,
            "choices": [{**{k: choice[k] for k in ("token_ids", "text", "finish_reason")}, "logprobs": first}],
        }

    def offset(self, ids: list[int], params: dict) -> list[list[float]] | None:
        wanted = params.get("prompt_logprob_token_ids")
        if wanted is None:
            return None
        by_row = isinstance(wanted[0], list)
        if self.version is None:
            raise ValueError("prompt_logprob_token_ids requires the V2 model runner")
        if by_row != (self.version >= "0.32"):
            raise ValueError("prompt_logprob_token_ids has the wrong form for this version")
        if not by_row and (len(wanted) > self.max_ids or len(set(wanted)) != len(wanted)):
            raise ValueError(f"more than {self.max_ids} ids, or the same id twice")
        if any(not 0 <= i < VOCABULARY for row in wanted for i in (row if by_row else [row])):
            raise ValueError("prompt_logprob_token_ids contain out-of-vocab token ids")
        if self.cache is not None:
            if tuple(ids) in self.cache and not params["skip_reading_prefix_cache"]:
                return None
            self.cache.add(tuple(ids))
        start = params["prompt_logprob_start"]
        rows = []
        for position in range(start, len(ids) - 1):
            values = true_logprobs(ids[: position + 1])
            columns = wanted[position - start] if by_row else wanted
            rows.append([values[i] + self.shift for i in columns])
        return rows

    def row(self, prefix: list[int], token_id: int, top: int) -> dict:
        values = true_logprobs(prefix)
        if self.logits:
            values = [v + 9.0 for v in values]
        ranked = sorted(range(VOCABULARY), key=lambda t: -values[t])
        shown = {token_id, *ranked[:top]}
        return {
            str(t): {"logprob": values[t], "rank": sum(v >= values[t] for v in values), "decoded_token": piece(t)}
            for t in shown
        }
