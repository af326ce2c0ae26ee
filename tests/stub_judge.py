"""A judge for tests: an OpenAI-compatible chat endpoint that answers by rule, or fails as it is told to.

    python -m tests.stub_judge --port 8100 [--model judge] [--mode 503] [--dies_after 100]

hard    yes where reply and reference have the same numbers, or, without numbers, the same words
soft    the share of the reference's words that stand in the reply, in tenths

It reads its three fields back out of the prompts of `context_rl.prompts`, so a changed prompt is a failing test.
"""

import argparse
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from context_rl import prompts

FIELDS = ("question", "reference", "reply")


def pattern_of(template: str) -> re.Pattern[str]:
    """What the template's prompts match, with a group for each field."""
    text = re.escape(template)
    for name in FIELDS:
        text = text.replace(re.escape("{" + name + "}"), f"(?P<{name}>.*)")
    return re.compile(text, re.DOTALL)


PATTERNS = {"hard": pattern_of(prompts.JUDGE_HARD), "soft": pattern_of(prompts.JUDGE_SOFT)}


def read_prompt(content: str) -> tuple[str, str, str, str]:
    """(kind, question, reference, reply) of a prompt."""
    for kind, pattern in PATTERNS.items():
        if match := pattern.fullmatch(content):
            return kind, *(match[name] for name in FIELDS)
    raise ValueError(f"no prompt of ours: {content!r:.200}")


def verdict(kind: str, reference: str, reply: str) -> str:
    """What the stub says, by rule."""
    wanted, given = (re.findall(r"\w+", text.lower()) for text in (reference, reply))
    if kind == "soft":
        return str(round(10 * sum(word in given for word in wanted) / len(wanted))) if wanted else "0"
    numbers, others = ([word for word in words if word.isdigit()] for words in (wanted, given))
    return "yes" if (numbers == others if numbers else wanted == given) else "no"


class StubJudge:
    """The server, in threads of this process; a context manager.

    Attributes:
        mode: "ok", a status such as "503", "hang", "drop" (closes the connection), "html" (200, no JSON), "empty" (no
            choices), or another text, which is the reply to everything. A list is worked off, its last one stays.
        dies_after: requests answered before the server drops every other one; None never.
        answer: (kind, question, reference, reply) -> the reply, in place of `verdict`.
        asked: what was asked, in the order of arrival; `headers` and `bodies` go with it.
    """

    def __init__(self, port: int = 0, model: str | None = None, mode: str | list[str] = "ok"):
        self.model, self.mode = model, mode
        self.dies_after: int | None = None
        self.answer: Callable[[str, str, str, str], str] | None = None
        self.finish_reason = "stop"
        self.asked: list[tuple[str, str, str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.released = threading.Event()
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.at_once += 1
                    stub.most_at_once = max(stub.most_at_once, stub.at_once)
                try:
                    stub.serve(self, body)
                finally:
                    with stub.lock:
                        stub.at_once -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients that are killed, or told to go away
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "StubJudge":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        """One request."""
        with self.lock:
            asked = read_prompt(body["messages"][0]["content"])
            self.asked.append(asked)
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            mode = self.mode
            if isinstance(mode, list):
                mode = mode.pop(0) if len(mode) > 1 else mode[0]
            if self.dies_after is not None and len(self.asked) > self.dies_after:
                mode = "drop"
        if mode == "hang":
            self.released.wait(30)
        if mode in ("hang", "drop"):
            handler.close_connection = True
            return
        if handler.path != "/v1/chat/completions" or (self.model and body["model"] != self.model):
            send(handler, 404, {"error": {"message": f"no {handler.path} or no model {body['model']!r}"}})
        elif mode.isdecimal() and len(mode) == 3:
            key = handler.headers.get("Authorization", "")
            send(handler, int(mode), {"error": {"message": f"told to say {mode} to {key!r}"}})
        elif mode == "html":
            send(handler, 200, "<html>a login page</html>")
        elif mode == "empty":
            send(handler, 200, {"choices": []})
        else:
            text = self.answer(*asked) if self.answer else verdict(asked[0], *asked[2:])
            message = {"role": "assistant", "content": text if mode == "ok" else mode}
            choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
            send(handler, 200, {"object": "chat.completion", "model": body["model"], "choices": [choice]})


def send(handler: BaseHTTPRequestHandler, status: int, content: Any) -> None:
    """An answer; a text is sent as HTML, anything else as JSON."""
    data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
    if 300 <= status < 400:
        handler.send_header("Location", "https://elsewhere.example/v1/chat/completions")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--model", help="the only one it has; unset: any")
    parser.add_argument("--mode", default="ok", help="ok | a status | hang | drop | html | empty | a fixed reply")
    parser.add_argument("--dies_after", type=int, help="requests")
    options = parser.parse_args()
    with StubJudge(options.port, options.model, options.mode) as stub:
        stub.dies_after = options.dies_after
        print(f"--judge_url {stub.url} --judge_model {options.model or 'any'}")
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            print(f"{len(stub.asked)} requests")


if __name__ == "__main__":
    main()
