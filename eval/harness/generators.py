"""The base model's own answers to generation tasks: by the harness's `hf` model in this process, or a vLLM server."""

import copy
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from transformers import PreTrainedTokenizerBase

from eval.harness.tasks import silent
from scorer.local import LocalScorer
from scorer.types import Scorer, ScorerError, Unscored
from scorer.vllm.asks import ATTEMPTS, FINAL, NEUTRAL
from scorer.vllm.client import BACKOFF_S, VllmScorer
from scorer.vllm.http import Replica, RequestFailed


class Prompt(NamedTuple):
    """A prompt as text and as the token ids that the harness makes of it; it leaves room for the answer."""

    text: str
    ids: list[int]


class Generator(Protocol):
    """Greedy answers of the base model."""

    def generate(self, prompts: Sequence[Prompt], until: list[str], max_tokens: int) -> list[str | Unscored]:
        """One answer a prompt, in their order: up to the first of the strings `until`, EOS or `max_tokens` tokens.

        Raises:
            ScorerError: nobody answers at all.
        """
        ...


def open_generator(scorer: Scorer, batch_size: int | str = 16) -> Generator:
    """The generator that goes with a scorer: the same model, not loaded twice.

    Args:
        batch_size: prompts in one batch of a local model, or "auto".

    Raises:
        ScorerError: the back-end only scores.
    """
    if isinstance(scorer, LocalScorer):
        return LocalGenerator(scorer, batch_size)
    if isinstance(scorer, VllmScorer):
        return ServerGenerator(scorer)
    raise ScorerError(f"{type(scorer).__name__} generates no answers for a benchmark; use --scorer local or vllm")


class LocalGenerator:
    """The harness's own `hf` model around the scorer's loaded model: its answers to the last character.

    Its batches are padded, which rounds otherwise than a prompt alone: compare runs of the same batch size.
    """

    def __init__(self, scorer: LocalScorer, batch_size: int | str = 16):
        with silent("lm_eval"):  # it warns that it was given a loaded model, which is the point
            self.model = HFLM(
                pretrained=scorer.model,
                tokenizer=copy.deepcopy(scorer.tokenizer),  # HFLM may give it a padding token
                batch_size=batch_size,
                max_length=scorer.max_length,
            )

    def generate(self, prompts: Sequence[Prompt], until: list[str], max_tokens: int) -> list[str | Unscored]:
        """See `Generator.generate`."""
        kwargs = {"until": until, "max_gen_toks": max_tokens, "do_sample": False, "temperature": 0.0}
        return list(self.model.generate_until([Instance("generate_until", {}, (p.text, kwargs), 0) for p in prompts]))


class Served(Protocol):
    """What is asked of a `VllmScorer`; read anew for each call, because a restart changes address and name."""

    url: str
    served_name: str
    tokenizer: PreTrainedTokenizerBase


class ServerGenerator:
    """POST /v1/completions of a vLLM server, one request a prompt, as token ids.

    A failed request is sent again, `ATTEMPTS` times in all; what then has no answer is `Unscored`. When as many
    requests in a row as run at once get no answer, the rest is not sent.

    Args:
        timeout_s: seconds for one request, until the last byte of its answer.
        concurrency: requests under way at once.
    """

    def __init__(self, server: Served, timeout_s: float = 600.0, concurrency: int = 64):
        self.server, self.timeout_s, self.concurrency = server, timeout_s, concurrency
        self._lock = threading.Lock()
        self._silent = 0  # requests in a row without any answer

    def generate(self, prompts: Sequence[Prompt], until: list[str], max_tokens: int) -> list[str | Unscored]:
        """See `Generator.generate`."""
        tokenizer = self.server.tokenizer
        stops = list(dict.fromkeys([*until, *([tokenizer.eos_token] if tokenizer.eos_token else [])]))
        # Special tokens are no part of the text that a server looks for stop strings in.
        special = [i for text, i in tokenizer.get_added_vocab().items() if text in stops]
        body = {**NEUTRAL, "model": self.server.served_name, "max_tokens": max_tokens, "stop": stops}
        body |= {"stop_token_ids": special, "n": 1}
        replica, self._silent = Replica(self.server.url, self.timeout_s, self.concurrency), 0
        try:
            with ThreadPoolExecutor(self.concurrency, thread_name_prefix="answers") as pool:
                answers = list(
                    pool.map(lambda prompt: self._answer(replica, {**body, "prompt": [prompt.ids]}), prompts)
                )
        finally:
            replica.http.close()
        failed = [a for a in answers if isinstance(a, Unscored) and a.fault in ("timeout", "connection", "not_sent")]
        if prompts and len(failed) == len(answers):
            raise ScorerError(f"no vLLM server answers at {self.server.url}: {failed[0].reason}")
        return answers

    def _answer(self, replica: Replica, body: dict[str, Any]) -> str | Unscored:
        failure = RequestFailed("not_sent", "not sent, because the requests before it got no answer")
        for attempt in range(ATTEMPTS):
            if self._silent >= self.concurrency:
                break
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                text = read_completion(replica.post("/v1/completions", body))
            except RequestFailed as error:
                failure = error
                self._count(error.unanswered)
                if error.fault in FINAL:
                    break
            else:
                self._count(False)
                # The server has cut it there; one that does not know `stop` has not.
                return postprocess_generated_text(text, body["stop"], None)
        return Unscored(str(failure), failure.fault)

    def _count(self, unanswered: bool) -> None:
        with self._lock:
            self._silent = self._silent + 1 if unanswered else 0


def read_completion(reply: object) -> str:
    """The text of a finished completion.

    Raises:
        RequestFailed: the reply is not of that form, or the engine gave up.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    text = choice.get("text") if isinstance(choice, dict) else None
    if not isinstance(text, str):
        raise RequestFailed("garbled", f"the reply has no text of one completion: {reply!r:.120}")
    if choice.get("finish_reason") not in ("stop", "length"):
        raise RequestFailed("server_error", f"the completion ended by {choice.get('finish_reason')!r}")
    return text
