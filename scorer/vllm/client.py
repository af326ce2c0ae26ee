"""The scorer behind one or several vLLM servers: found, checked, asked, and restarted once if it was ours."""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scorer.checks import check_items, first_line, revision, weights_digest
from scorer.types import Greedy, Item, Score, ScorerError, Unscored, Usage
from scorer.vllm.asks import ATTEMPTS, NEUTRAL, Ask, Routes, score_items
from scorer.vllm.http import PATHS, Replica, RequestFailed, Servers, transport_for
from scorer.vllm.probe import (
    PROBE_TEXT,
    RAW_FLAG,
    Probe,
    all_floats,
    check_exact_route,
    check_raw,
    choose_routes,
    disagreement,
)
from scorer.vllm.replies import Reply
from scorer.vllm.server import ManagedServer, launch

BACKOFF_S = 0.5
"""Pause before the second attempt, in seconds; it doubles with every further one, up to BACKOFF_MOST_S."""
BACKOFF_MOST_S = 8.0
RESTART_TIMEOUT_S = 600.0


class VllmScorer:
    """Scores with the model that vLLM servers hold. See `scorer.types.Scorer` for what the methods promise.

    Several threads may call `score` at the same time.

    Attributes:
        tokenizer: of the served model; text has to be encoded with it.
        max_length: one token less than the server's max_model_len, because a scoring request generates one token.
        routes: how answers are scored, see `scorer.vllm.probe`; `notes` say why not by a faster way.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        timeout_s: float = 120.0,
        concurrency: int = 16,
        prompts_per_request: int = 32,
        route: str | None = None,
        transport: str | None = None,
        server: ManagedServer | None = None,
    ):
        """Connects and checks that the servers score: model, tokenizer, raw log-probs, the fastest exact route.

        Args:
            url: such as http://127.0.0.1:8000, with or without /v1; several are replicas of one model. A server of
                one's own has to be started with `--logprobs-mode raw_logprobs --max-logprobs 1024 --generation-config
                vllm --enable-scale-out`.
            model: the served name or path; None where a server has one model only.
            tokenizer: None loads it from the path or hub name that the server gives as its model's `root`.
            timeout_s: seconds for one request, until the last byte of its answer.
            concurrency: requests under way at once.
            prompts_per_request: prompts in one request, where a server takes several.
            route: "offset_flat", "offset_rows" or "prompt_logprobs" to allow that one only.
            transport: "batch", "generate" or "completions" to use that one and, for what it cannot carry, the last.
            server: the managed server behind `url`, if there is one; `close` stops it.

        Raises:
            ScorerError: nobody answers at `url`, the model is not served, or the server does not score as it should.
        """
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ScorerError("no URL of a vLLM server was given")
        self._usage, self._lock = Usage(), threading.Lock()
        self._server, self._generation = server, server.generation if server else 0
        self._servers = Servers(
            [Replica(one, timeout_s, concurrency) for one in urls], concurrency, prompts_per_request
        )
        self._closed, self._transport = False, transport
        try:
            cards = [self._find_model(replica, model) for replica in self._servers.replicas]
            self.root = str(cards[0].get("root") or cards[0]["id"])
            self.max_length = min(int(card["max_model_len"]) for card in cards) - 1
            self.tokenizer = self._load_tokenizer() if tokenizer is None else tokenizer
            self._versions = [self._version(replica) for replica in self._servers.replicas]
            probes = [
                self._examine(replica, version, route)
                for replica, version in zip(self._servers.replicas, self._versions, strict=True)
            ]
            self.routes, self.notes = common_routes(probes), probes[0].notes
            for replica, probe in zip(self._servers.replicas, probes, strict=True):
                fault = disagreement(probes[0].exact, dict(probe.exact), 0.1)
                if fault:
                    raise ScorerError(f"{replica.url} holds another model than {self.url}: {fault}")
        except BaseException:
            self._servers.close()
            raise

    @property
    def url(self) -> str:
        """The first server's address."""
        return self._servers.replicas[0].url

    @property
    def server_log(self) -> Path | None:
        """The launched server's output; None for servers given by URL."""
        return self._server.log_path if self._server else None

    @property
    def transport(self) -> str:
        """How answers travel to the first server: "batch", "generate" or "completions"."""
        kind = "prompt_logprobs" if self.routes.answers == "prompt_logprobs" else "offset"
        return str(transport_for(Ask(kind, (), {}), self._servers.replicas[0].transports))

    @property
    def served_name(self) -> str:
        """The model's name in requests to the first server."""
        return self._servers.replicas[0].served_name

    @property
    def fingerprint(self) -> dict[str, str]:
        """Back-end, model, dtype, vLLM version, route, and vLLM's own hash of the model's and the engine's settings.

        HTTP tells neither the weights nor the dtype, so of a server given by URL both are "unknown": a folder of the
        same name on this machine may hold other weights, or new ones.
        """
        weights = (weights_digest(self.root) or revision(self.root)) if self._server else None
        return {
            "backend": "vllm",
            "model": self.root,
            "weights": weights or "unknown",
            "dtype": self._server.dtype if self._server else "unknown",
            "vllm": ", ".join(sorted(set(self._versions))),
            "settings": self._settings,
            "route": self.routes.answers,
        }

    def score(self, items: Sequence[Item], greedy: Greedy | None = None) -> list[Score | Unscored]:
        """One result an item, in order; equal items and equal prefixes are asked for once.

        Raises:
            ValueError: an item is empty or too long (named by its index); nothing has been sent then.
            ScorerError: no request of this call reached a server, or it no longer serves the model.
        """
        check_items(items, self.max_length, greedy)
        if self._closed:
            raise ScorerError(f"this scorer ({self.url}) was closed")
        began, usage, reached = time.perf_counter(), Usage(), False

        def send(asks: Sequence[Ask], attempt: int) -> Iterable[tuple[int, Reply | Unscored]]:
            nonlocal reached
            replies, nobody = self._servers.send(asks, attempt, usage)
            if nobody and self._restarted():
                replies, nobody = self._servers.send(asks, attempt, usage)
            reached |= not nobody
            if not reached and attempt + 1 >= ATTEMPTS:
                causes = [reply for reply in replies if isinstance(reply, Unscored)]
                if all(cause.fault in ("connection", "not_sent") for cause in causes):
                    raise ScorerError(self._gone(causes[0].reason))
            return enumerate(replies)

        results = score_items(items, greedy, self.routes, send, usage, self.tokenizer, self._pause)
        usage.seconds = time.perf_counter() - began
        with self._lock:
            self._usage.add(usage)
        return results

    def take_usage(self) -> Usage:
        """See `scorer.types.Scorer.take_usage`."""
        with self._lock:
            taken, self._usage = self._usage, Usage()
        return taken

    def close(self) -> None:
        """Closes the connections and stops the managed server, if there is one. Safe to call twice."""
        self._closed = True
        self._servers.close()
        if self._server is not None:
            self._server.close()

    def __enter__(self) -> "VllmScorer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # When something fails -----------------------------------------------------------------------------------------

    def _pause(self, attempt: int) -> None:
        time.sleep(min(BACKOFF_S * 2 ** (attempt - 1), BACKOFF_MOST_S))

    def _restarted(self) -> bool:
        """Whether our own server, which did not answer, is up again; the second time it dies is an error.

        A restarted server loads the same weights with the same flags, so its scores are those of the first.
        """
        if self._server is None or not self._server.restart_once(self._generation, RESTART_TIMEOUT_S):
            return False
        with self._lock:
            self._generation = self._server.generation
            [old] = self._servers.replicas
            if old.url != self._server.url:
                new = Replica(self._server.url, old.timeout_s, self._servers.concurrency)
                new.served_name, new.transports = self._server.served_name, old.transports
                self._servers.replicas = [new]
                old.http.close()
        return True

    def _gone(self, cause: object, replica: Replica | None = None) -> str:
        text = f"no vLLM server answers at {(replica or self._servers.replicas[0]).url} ({cause}); "
        if self._server is None:
            return text + "start one there (vllm serve MODEL --logprobs-mode raw_logprobs) or mend the URL"
        code = self._server.exit_code()
        state = "it still runs" if code is None else f"it ended with exit code {code}"
        return f"{text}{state}; last lines of {self._server.log_path}:\n{self._server.log_tail()}"

    # Checks at the start ------------------------------------------------------------------------------------------

    def _get(self, replica: Replica, path: str) -> dict[str, Any]:
        try:
            return replica.get(path)
        except RequestFailed as failure:
            raise ScorerError(self._gone(failure, replica)) from failure

    def _find_model(self, replica: Replica, model: str | None) -> dict[str, Any]:
        """The card of the served model: {"id", "root", "max_model_len", ...}."""
        url = replica.url
        cards = self._get(replica, "/v1/models").get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise ScorerError(f"{url}/v1/models answers, but not with a list of models: {cards!r:.200}")
        served = ", ".join(str(card["id"]) for card in cards) or "nothing"
        found = [card for card in cards if model is None or model in (card["id"], card.get("root"))]
        if not found:
            raise ScorerError(f"{url} does not serve {model!r} but {served}")
        if len({card.get("root") for card in found}) > 1:
            raise ScorerError(f"{url} serves several models; say which: {served}")
        card = found[0]
        if card.get("parent"):
            raise ScorerError(f"{card['id']!r} is a LoRA adapter: vLLM drops its lm_head, so its scores would be wrong")
        if not isinstance(card.get("max_model_len"), int):
            raise ScorerError(f"{url}/v1/models gives no max_model_len for {card['id']!r}: is it a vLLM server?")
        replica.served_name = str(card["id"])
        return card

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.root)
        except (OSError, ValueError) as error:
            raise ScorerError(
                f"no tokenizer in {self.root!r}, which {self.url} gives as its model's root: pass tokenizer= "
                f"({first_line(error)})"
            ) from error

    def _version(self, replica: Replica) -> str:
        version = self._get(replica, "/version").get("version")
        if not isinstance(version, str):
            raise ScorerError(f"{replica.url}/version names no version: is it a vLLM server?")
        return version

    def _examine(self, replica: Replica, version: str, route: str | None) -> Probe:
        """Checks one server and finds its transports and routes."""
        self._check_tokenizer(replica)
        ids = tuple(self.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])[: self.max_length]
        alone = Servers([replica], self._servers.concurrency, self._servers.prompts_per_request)

        def send(asks: Sequence[Ask], attempt: int) -> Iterable[tuple[int, Reply | Unscored]]:
            return enumerate(alone.send(asks, attempt, Usage())[0])

        check_exact_route(ids, send, replica.url)
        self._settings = self._check_raw(replica, ids, send)
        replica.transports = self._transports(replica)
        dtype = self._server.dtype if self._server else "unknown"
        return choose_routes(ids, self.max_length, send, version, dtype=dtype, pinned=route)

    def _transports(self, replica: Replica) -> tuple[str, ...]:
        """The ways in which requests can be sent: a path that exists refuses an empty request in its own words."""
        found = []
        for transport in ("batch", "generate"):
            try:
                replica.post(PATHS[transport], {"model": replica.served_name, "requests": []})
            except ScorerError:
                continue  # no such path
            except RequestFailed as failure:
                if failure.fault != "refused":
                    continue
            found.append(transport)
        # The exact route, which every other one is held against, needs completions in any case.
        return (*(name for name in found if self._transport in (None, name)), "completions")

    def _check_tokenizer(self, replica: Replica) -> None:
        """The server must split a text into the ids that we send: ids of another vocabulary score without an error."""
        ours = self.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        body = {"model": replica.served_name, "prompt": PROBE_TEXT, "add_special_tokens": False}
        try:
            reply = replica.post("/tokenize", body)
        except RequestFailed as failure:
            raise ScorerError(f"{replica.url}/tokenize does not answer: {failure}") from failure
        theirs = reply.get("tokens") if isinstance(reply, dict) else None
        if theirs != list(ours):
            raise ScorerError(
                f"the tokenizer is not that of the model at {replica.url}: {PROBE_TEXT[:20]!r}... is {list(ours)[:12]} "
                f"here and {theirs!r:.80} there"
            )

    def _check_raw(self, replica: Replica, ids: Sequence[int], send: Any) -> str:
        """Refuses processed log-probs; returns the reply's `system_fingerprint`, vLLM's hash of its settings."""
        settings = ""

        def biased(prompt: tuple[int, ...], token_id: int) -> float | None:
            nonlocal settings
            bias = {"max_tokens": 1, "logprobs": 0, "logit_bias": {str(token_id): 100.0}, "return_token_ids": True}
            body = {"model": replica.served_name, "prompt": [prompt], **NEUTRAL, **bias}
            try:
                reply = replica.post(PATHS["completions"], body)
            except RequestFailed as failure:
                raise ScorerError(f"{replica.url} does not score: {failure}") from failure
            settings = str(reply.get("system_fingerprint"))
            choice: Mapping[str, Any] = (reply.get("choices") or [{}])[0]
            logprobs = choice.get("logprobs")
            values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
            if not isinstance(values, list) or len(values) != 1 or not all_floats(values):
                raise ScorerError(f"{replica.url} gives no log-prob of a generated token: {logprobs!r:.80}; {RAW_FLAG}")
            return values[0] if choice.get("token_ids") == [token_id] else None

        check_raw(ids, send, biased, replica.url)
        return settings


def common_routes(probes: Sequence[Probe]) -> Routes:
    """The routes that all replicas have."""
    answers = {probe.routes.answers for probe in probes}
    return Routes(
        answers.pop() if len(answers) == 1 else "prompt_logprobs",
        all(probe.routes.options for probe in probes),
        min(probe.routes.max_ids for probe in probes),
    )


def open_vllm(
    model: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    timeout_s: float = 120.0,
    concurrency: int = 16,
    prompts_per_request: int = 32,
    route: str | None = None,
    transport: str | None = None,
    **launch_options: Any,
) -> VllmScorer:
    """Starts a server for `model` and returns its scorer; the scorer's `close` stops the server.

    Args:
        launch_options: further arguments of `scorer.vllm.server.launch` (python, dtype, log_path, ...).

    Raises:
        ScorerError: the server did not come up, or does not score as it should.
    """
    server = launch(model, **launch_options)
    try:
        return VllmScorer(
            server.url,
            server.served_name,
            tokenizer,
            timeout_s=timeout_s,
            concurrency=concurrency,
            prompts_per_request=prompts_per_request,
            route=route,
            transport=transport,
            server=server,
        )
    except BaseException:
        server.close()
        raise
