"""Scores from a vLLM server over HTTP: token ids go out, checked log-probs come back.

Every item is one prompt (prefix + answer) with `prompt_logprobs=0`, the exact route that every vLLM has: the server
returns one log-prob for every prompt token, and the last len(answer) of them are the score. A greedy answer is a
second request with the prefix alone.

What comes back is checked in `scorer.vllm.replies`. What does not fit, and what did not come back, is `Unscored` with
the reason: no number is ever put in its place.
"""

import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scorer.checks import check_items, weights_digest
from scorer.types import Greedy, Item, Score, ScorerError, Unscored, Usage
from scorer.vllm.replies import (
    PROBE_TOP,
    Choice,
    Prompt,
    answer_logprobs,
    choices_of,
    greedy_answer,
    normalisation_fault,
)
from scorer.vllm.server import ManagedServer, auth_headers, launch

ROUTE = "prompt_logprobs"
ATTEMPTS = 3
"""Times a request is sent at most. Scoring changes nothing on the server, so sending again is safe."""
BACKOFF_S = 0.5
"""Pause before the second attempt, in seconds; it doubles with every further one."""
CONNECT_TIMEOUT_S = 10.0
NEUTRAL = {"temperature": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Greedy decoding without penalties, spelled out: a server fills what is left out from generation_config.json."""
SCORING = {**NEUTRAL, "max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True}

Job = tuple[Mapping[str, Any], Sequence[Prompt]]
"""One request: its parameters and its prompts."""

PROBE_TEXT = "Question: What is 2 + 3?\nReasoning: 2 birds and 3 cats make 5.\nAnswer: 5\n"


class RequestFailed(Exception):
    """A request without a usable answer. `kind`: "timeout", "connection" or "answer" (an error, a refusal, no JSON)."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def chunks(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    """The prompts in runs of `size`, the last one possibly shorter."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


class VllmScorer:
    """Scores with the model that a vLLM server holds. See `scorer.types.Scorer` for what the methods promise.

    Several threads may call `score` at the same time.

    Attributes:
        tokenizer: of the served model; text has to be encoded with it.
        max_length: one token less than the server's max_model_len, because a scoring request generates one token.
        requests: HTTP requests for completions that were sent, repeated ones included.
        retries: those of them that repeated an earlier one.
        failures: items that came back `Unscored`; equal items in one call count once.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        timeout_s: float = 120.0,
        concurrency: int = 8,
        prompts_per_request: int = 16,
        server: ManagedServer | None = None,
    ):
        """Connects and checks that the server scores: its model, its tokenizer, and whether its log-probs are raw.

        Args:
            url: such as http://127.0.0.1:8000, with or without /v1. A server of one's own has to be started with
                `--logprobs-mode raw_logprobs --max-logprobs 64 --generation-config vllm`.
            model: the served name or path; None where the server has one model only.
            tokenizer: None loads it from the path or hub name that the server gives as its model's `root`.
            timeout_s: seconds without a byte from the server after which a request has failed.
            concurrency: requests under way at once.
            prompts_per_request: prompts in one request.
            server: the managed server behind `url`, if there is one; `close` stops it.

        Raises:
            ScorerError: nobody answers at `url`, the model is not served, or the server does not score as it should.
        """
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.timeout_s, self.concurrency, self.prompts_per_request = timeout_s, concurrency, prompts_per_request
        self.requests = self.retries = self.failures = 0
        self._lock = threading.Lock()
        self._server = server
        self._http = httpx.Client(
            base_url=self.url,
            headers=auth_headers(),
            # pool=None: waiting for a connection of our own pool says nothing about the server.
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s), pool=None),
            # vLLM drops connections that were idle for 5 s; we drop them first.
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency, keepalive_expiry=2),
            trust_env=not is_loopback(self.url),
        )
        try:
            card = self._find_model(model)
            self.served_name, self.root = str(card["id"]), str(card.get("root") or card["id"])
            self.max_length = int(card["max_model_len"]) - 1
            self.tokenizer = self._load_tokenizer() if tokenizer is None else tokenizer
            self._version = self._get("/version").get("version")
            if not isinstance(self._version, str):
                raise ScorerError(f"{self.url}/version names no version: is it a vLLM server?")
            self._check_tokenizer()
            self._settings = self._check_logprobs()
        except BaseException:
            self._http.close()
            raise
        self.requests = self.retries = 0

    @property
    def fingerprint(self) -> dict[str, str]:
        """Back-end, model, dtype, vLLM version, route, and vLLM's own hash of the model's and the engine's settings.

        HTTP tells neither the weights nor the dtype: "unknown" where the model is no folder on this machine, and for a
        server given by URL (whose dtype the hash depends on).
        """
        return {
            "backend": "vllm",
            "model": self.root,
            "weights": weights_digest(self.root) or "unknown",
            "dtype": self._server.dtype if self._server else "unknown",
            "vllm": self._version,
            "settings": self._settings,
            "route": ROUTE,
        }

    def score(self, items: Sequence[Item], greedy: Greedy | None = None) -> list[Score | Unscored]:
        """One result an item, in order; equal items and equal prefixes are asked for once.

        Raises:
            ValueError: an item is empty or too long (named by its index); nothing has been sent then.
            ScorerError: no request of this call reached the server, or it no longer serves the model.
        """
        check_items(items, self.max_length, greedy)
        if self._http.is_closed:
            raise ScorerError(f"this scorer ({self.url}) was closed")
        unique = list(dict.fromkeys(items))
        prefixes = list(dict.fromkeys(item.prefix_ids for item in unique)) if greedy else []

        prompts = [item.prefix_ids + item.answer_ids for item in unique]
        jobs: list[Job] = [(SCORING, chunk) for chunk in chunks(prompts, self.prompts_per_request)]
        if greedy:
            generating = {
                **NEUTRAL,
                "max_tokens": greedy.max_new_tokens,
                "stop": [greedy.stop],
                "return_token_ids": True,
            }
            jobs += [(generating, chunk) for chunk in chunks(prefixes, self.prompts_per_request)]
        choices = self._run(jobs)

        results: dict[Item, Score | Unscored] = {}
        for item, choice in zip(unique, choices[: len(unique)], strict=True):
            results[item] = (
                choice if isinstance(choice, Unscored) else answer_logprobs(choice.get("prompt_logprobs"), item)
            )
        if greedy:
            answers = {
                prefix: Unscored(f"greedy answer: {choice.reason}")
                if isinstance(choice, Unscored)
                else greedy_answer(choice, greedy)
                for prefix, choice in zip(prefixes, choices[len(unique) :], strict=True)
            }
            results = {item: with_answer(result, answers[item.prefix_ids]) for item, result in results.items()}
        with self._lock:
            self.failures += sum(isinstance(result, Unscored) for result in results.values())
        return [results[item] for item in items]

    def take_usage(self) -> Usage:
        """See `scorer.types.Scorer.take_usage`."""
        return Usage()

    def close(self) -> None:
        """Closes the connections and stops the managed server, if there is one. Safe to call twice."""
        self._http.close()
        if self._server is not None:
            self._server.close()

    def __enter__(self) -> "VllmScorer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Requests -----------------------------------------------------------------------------------------------------

    def _run(self, jobs: Sequence[Job]) -> list[Choice | Unscored]:
        """The choices for all prompts of all jobs (parameters, prompts), in order; several jobs at once."""
        if not jobs:
            return []
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="vllm-scorer")
        try:
            futures = [pool.submit(self._complete, parameters, prompts) for parameters, prompts in jobs]
            failures = self._watch(futures)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if len(failures) == len(jobs) and all(failure.kind == "connection" for failure in failures):
            raise ScorerError(self._gone(failures[0]))
        choices: list[Choice | Unscored] = []
        for future, (_, prompts) in zip(futures, jobs, strict=True):
            if future.cancelled():
                choices += [Unscored(f"not sent, because the requests before it failed: {failures[-1]}")] * len(prompts)
            else:
                choices += future.result()[0]
        return choices

    def _watch(self, futures: Sequence[Future]) -> list[RequestFailed]:
        """Waits for all requests; returns the failures of those that the server did not answer.

        When a full round of requests in a row went unanswered, the rest is not sent: with a server that hangs, each
        round would take ATTEMPTS times `timeout_s`.
        """
        failures, in_a_row = [], 0
        for future in as_completed(futures):
            if future.cancelled():
                failures.append(failures[-1])
                continue
            _, failure = future.result()
            if failure is None:
                in_a_row = 0
                continue
            failures.append(failure)
            in_a_row += 1
            if in_a_row >= self.concurrency:
                for waiting in futures:
                    waiting.cancel()
        return failures

    def _complete(
        self, parameters: Mapping[str, Any], prompts: Sequence[Prompt]
    ) -> tuple[list[Choice | Unscored], RequestFailed | None]:
        """A choice or an `Unscored` for each prompt, and what went wrong where the server gave no answer at all."""
        try:
            reply = self._post("/v1/completions", {"model": self.served_name, "prompt": list(prompts), **parameters})
        except RequestFailed as failure:
            if failure.kind != "answer":
                return [Unscored(str(failure))] * len(prompts), failure
            if len(prompts) == 1:
                return [Unscored(str(failure))], None
        else:
            return choices_of(reply, prompts), None
        # The server refuses a request for one bad prompt in it. Sent one by one, the others get their score.
        alone = [self._complete(parameters, [prompt]) for prompt in prompts]
        unanswered = [failure for _, failure in alone if failure is not None]
        return [choices[0] for choices, _ in alone], unanswered[0] if len(unanswered) == len(prompts) else None

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of the server's answer; sent again after a failure that may pass.

        Raises:
            RequestFailed: no usable answer after ATTEMPTS attempts, or a refusal.
            ScorerError: the server does not know the model or the caller: no request can succeed.
        """
        failure = RequestFailed("connection", "never sent")
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            with self._lock:
                self.requests += 1
                self.retries += attempt > 0
            try:
                reply = self._http.post(path, json=body)
            except httpx.ConnectTimeout as error:
                failure = RequestFailed("connection", f"no connection: {error}")
            except httpx.TimeoutException:
                failure = RequestFailed("timeout", f"timeout after {self.timeout_s:g} s")
            except httpx.RequestError as error:
                failure = RequestFailed("connection", f"connection lost: {type(error).__name__}: {error}")
            else:
                said = f"HTTP {reply.status_code}: {error_message(reply)}"
                if reply.status_code in (401, 403, 404):
                    raise ScorerError(f"{self.url}{path} refuses every request for {self.served_name!r}: {said}")
                if reply.status_code == 200:
                    try:
                        return reply.json()
                    except ValueError as error:
                        said = f"the reply is no JSON ({error}): {reply.text!r:.80}"
                elif reply.status_code < 500 and reply.status_code != 429:
                    raise RequestFailed("answer", said)
                failure = RequestFailed("answer", said)
        raise RequestFailed(failure.kind, f"{failure} ({ATTEMPTS} attempts)")

    def _get(self, path: str) -> dict[str, Any]:
        """A JSON object from the server, for the checks at the start.

        Raises:
            ScorerError: nobody answers, or something else than a vLLM server does.
        """
        try:
            reply = self._http.get(path)
        except httpx.HTTPError as error:
            raise ScorerError(self._gone(error)) from error
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

    def _gone(self, cause: object) -> str:
        text = f"no vLLM server answers at {self.url} ({cause}); "
        if self._server is None:
            return (
                text
                + "start one there (vllm serve MODEL --logprobs-mode raw_logprobs --max-logprobs 64) or mend the URL"
            )
        code = self._server.exit_code()
        state = "it still runs" if code is None else f"it ended with exit code {code}"
        return f"{text}{state}; last lines of {self._server.log_path}:\n{self._server.log_tail()}"

    # Checks at the start ------------------------------------------------------------------------------------------

    def _find_model(self, model: str | None) -> dict[str, Any]:
        """The card of the served model: {"id", "root", "max_model_len", ...}."""
        cards = self._get("/v1/models").get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise ScorerError(f"{self.url}/v1/models answers, but not with a list of models: {cards!r:.200}")
        served = ", ".join(str(card["id"]) for card in cards) or "nothing"
        found = [card for card in cards if model is None or model in (card["id"], card.get("root"))]
        if not found:
            raise ScorerError(f"{self.url} does not serve {model!r} but {served}")
        if len({card.get("root") for card in found}) > 1:
            raise ScorerError(f"{self.url} serves several models; say which: {served}")
        card = found[0]
        if card.get("parent"):
            raise ScorerError(f"{card['id']!r} is a LoRA adapter: vLLM drops its lm_head, so its scores would be wrong")
        if not isinstance(card.get("max_model_len"), int):
            raise ScorerError(f"{self.url}/v1/models gives no max_model_len for {card['id']!r}: is it a vLLM server?")
        return card

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.root)
        except (OSError, ValueError) as error:
            raise ScorerError(
                f"no tokenizer in {self.root!r}, which {self.url} gives as its model's root: pass tokenizer= ({error})"
            ) from error

    def _check_tokenizer(self) -> None:
        """The server must split a text into the ids that we send: ids of another vocabulary score without an error."""
        ours = self.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        body = {"model": self.served_name, "prompt": PROBE_TEXT, "add_special_tokens": False}
        try:
            reply = self._post("/tokenize", body)
        except RequestFailed as failure:
            raise ScorerError(f"{self.url}/tokenize does not answer: {failure}") from failure
        theirs = reply.get("tokens") if isinstance(reply, dict) else None
        if theirs != list(ours):
            raise ScorerError(
                f"the tokenizer is not that of the model at {self.url}: {PROBE_TEXT[:20]!r}... is {list(ours)[:12]} "
                f"here and {theirs!r:.80} there"
            )

    def _check_logprobs(self) -> str:
        """Scores a short text and refuses a server whose log-probs are logits or went through the sampler's settings.

        Returns:
            The reply's `system_fingerprint`: vLLM's version and a hash of its settings, among them model and dtype.
        """
        flag = "start the server with --logprobs-mode raw_logprobs"
        ids = tuple(self.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])[: self.max_length]
        choice, settings = self._ask_once({**SCORING, "prompt_logprobs": PROBE_TOP}, ids)
        rows = choice.get("prompt_logprobs")
        for row in rows[1:] if isinstance(rows, list) else []:
            values = [entry.get("logprob") for entry in row.values()] if isinstance(row, dict) else []
            # Ten times our vocabulary: models pad theirs, and an upper bound is all that is needed.
            fault = normalisation_fault(values, 10 * len(self.tokenizer)) if values and all_floats(values) else None
            if fault:
                raise ScorerError(f"what {self.url} reports are no log-probs: {fault}; {flag}")
        scored = answer_logprobs(rows, Item(ids[:1], ids[1:]))
        if isinstance(scored, Unscored):
            raise ScorerError(f"{self.url} does not score: {scored.reason}")

        # The lowest of these log-probs again, as that of a generated token which a bias of 100 makes certain. Raw
        # log-probs are taken before the bias. In vLLM 0.31 prompt log-probs are raw in both modes, but a server in the
        # other mode is one that somebody runs for sampling, such as a policy's.
        raw = min(scored.token_logprobs)
        position = 1 + scored.token_logprobs.index(raw)
        token_id = ids[position]
        biased = {**NEUTRAL, "max_tokens": 1, "logprobs": 0, "logit_bias": {str(token_id): 100.0}}
        choice, _ = self._ask_once({**biased, "return_token_ids": True}, ids[:position])
        logprobs = choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(values, list) or len(values) != 1 or not all_floats(values):
            raise ScorerError(f"{self.url} gives no log-prob of a generated token: {logprobs!r:.80}; {flag}")
        if choice.get("token_ids") == [token_id] and raw < -1 and abs(values[0] - raw) > 0.5:
            raise ScorerError(
                f"{self.url} reports processed log-probs ({values[0]:.3f} for a token with a raw {raw:.3f}); {flag}"
            )
        return settings

    def _ask_once(self, parameters: Mapping[str, Any], prompt: Prompt) -> tuple[Choice, str]:
        try:
            reply = self._post("/v1/completions", {"model": self.served_name, "prompt": [prompt], **parameters})
        except RequestFailed as failure:
            raise ScorerError(f"{self.url} does not score: {failure}") from failure
        [choice] = choices_of(reply, [prompt])
        if isinstance(choice, Unscored):
            raise ScorerError(f"{self.url} does not score: {choice.reason}")
        return choice, str(reply.get("system_fingerprint"))


def all_floats(values: Sequence[object]) -> bool:
    """Whether all of them are floats, none of them NaN."""
    return all(isinstance(value, float) and not math.isnan(value) for value in values)


def with_answer(result: Score | Unscored, answer: str | Unscored) -> Score | Unscored:
    """A score with its greedy answer; without one of the two there is neither."""
    if isinstance(result, Unscored):
        return result
    return answer if isinstance(answer, Unscored) else replace(result, greedy_text=answer)


def error_message(reply: httpx.Response) -> str:
    """What the server says about a refused request, at most 300 characters."""
    try:
        return str(reply.json()["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return reply.text[:300]


def is_loopback(url: str) -> bool:
    """Whether the URL names this machine itself, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def open_vllm(
    model: str | Path,
    *,
    log_path: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    timeout_s: float = 120.0,
    concurrency: int = 8,
    prompts_per_request: int = 16,
    **launch_options: Any,
) -> VllmScorer:
    """Starts a server for `model` and returns its scorer; the scorer's `close` stops the server.

    Args:
        launch_options: further arguments of `scorer.vllm.server.launch` (python, dtype, max_model_len, ...).

    Raises:
        ScorerError: the server did not come up, or does not score as it should.
    """
    server = launch(model, log_path=log_path, **launch_options)
    try:
        return VllmScorer(
            server.url,
            server.served_name,
            tokenizer,
            timeout_s=timeout_s,
            concurrency=concurrency,
            prompts_per_request=prompts_per_request,
            server=server,
        )
    except BaseException:
        server.close()
        raise
