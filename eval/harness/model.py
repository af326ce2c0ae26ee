"""The pair (trace, base model) as one model of the harness: a trace is put into each prompt, then p_base answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from context_rl.tasks.types import DataError
from eval.harness.generators import Generator, Prompt
from eval.harness.placing import own_part, with_trace
from eval.harness.questions import LoadedTask
from eval.harness.tasks import ROLLING, check_greedy
from scorer.types import Greedy, Item, Score, Scorer, ScorerError, Unscored

Answer = tuple[float, bool] | str
"""What the harness wants of one request: (log-likelihood in nats, whether greedy decoding says the same), or a text."""
Key = tuple[str, int]
"""Task and number of the document."""

NEVER_SAID = "\uffff"
"""A stop string for a greedy answer that is as long as the continuation it is compared with."""
REQUESTS_A_CALL = 2_000


@dataclass(frozen=True)
class Asked:
    """What the model has to know of a task besides its requests.

    Attributes:
        queries: each document's own part of the prompt.
        greedy: whether a metric reads if a continuation is the greedy one.
    """

    queries: Sequence[str]
    greedy: bool


class HelpedModel(TemplateLM):
    """p_base with a trace in each prompt.

    Text becomes tokens as in the harness's `hf` model with its defaults: spaces at the end of a prompt move to the
    continuation, the pair is encoded together and split, the tokenizer decides about its BOS, an empty prompt is BOS or
    else EOS. Prompts that are too long are never truncated.

    Args:
        scorer: answers log-likelihoods; its tokenizer and `max_length` hold for generation too.
        generator: answers generation tasks; None where there is none to answer.
        traces: (task, number of the document) -> trace, or None for no help; each document needs an entry. None
            instead of a mapping: no document gets help.
    """

    def __init__(
        self, scorer: Scorer, generator: Generator | None = None, traces: Mapping[Key, str | None] | None = None
    ):
        super().__init__()
        self.scorer, self.generator, self.traces = scorer, generator, traces
        self.tokenizer = scorer.tokenizer
        self.tasks: dict[str, Asked] = {}
        self.add_bos_token = self.custom_prefix_token_id = None  # the defaults of the methods below

    # The harness's own methods, so that nothing about tokens can differ from its `hf` model.
    tok_encode = HFLM.tok_encode
    eot_token_id = HFLM.eot_token_id
    prefix_token_id = HFLM.prefix_token_id

    def prepare(self, task: LoadedTask) -> None:
        """Tells the model which part of each prompt is the document's own. `evaluate` does it."""
        harness = task.task
        self.tasks[task.name] = Asked(
            [own_part(harness, doc) for doc in task.docs],
            # For an option of a multiple choice the harness reads it in this metric only, or in code of the task's own.
            harness.OUTPUT_TYPE == "loglikelihood"
            or "exact_match" in harness._metric_fn_list
            or callable(harness.config.process_results),
        )

    def answers(self, requests: Sequence[Instance]) -> list[Answer | Unscored]:
        """One answer a request, in their order; `Unscored` where the prompt is too long or the score failed.

        Raises:
            DataError: a document without an entry in `traces`, or a request that has no place for a trace.
            ScorerError: the base model is gone.
        """
        found: dict[int, Answer | Unscored] = {}
        kinds = {
            ("loglikelihood", True): lambda some: self._loglikelihoods(some, greedy=True),
            ("loglikelihood", False): lambda some: self._loglikelihoods(some, greedy=False),
            ("generate_until", True): self._generations,
        }
        sorts: dict[tuple[str, bool], list[int]] = {}
        for position, request in enumerate(requests):
            greedy = request.request_type != "loglikelihood" or self._reads_greedy(request)
            sorts.setdefault((request.request_type, greedy), []).append(position)
        for kind, positions in sorts.items():
            if kind not in kinds:
                raise DataError(f"requests of kind {kind[0]!r}: {ROLLING}")
            answered = kinds[kind]([requests[position] for position in positions])
            found |= zip(positions, answered, strict=True)
        return [found[position] for position in range(len(requests))]

    # What the harness calls. `evaluate` asks `answers` itself, because here a failure can only be an error.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return answered(self.answers(requests))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return answered(self.answers(requests))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise DataError(ROLLING)

    # Prompts --------------------------------------------------------------------------------------------------------

    def prompt(self, request: Instance) -> str:
        """What the base model reads."""
        context, key = request.args[0], (request.task_name, request.doc_id)
        if self.traces is None:
            return context
        if key not in self.traces:
            raise DataError(f"no trace, and no None, for document {key[1]} of task {key[0]!r}")
        trace = self.traces[key]
        if trace is None:
            return context
        if key[0] not in self.tasks:
            raise DataError(f"traces of task {key[0]!r} have no place yet: call prepare(task) first, or use evaluate")
        query = self.tasks[key[0]].queries[key[1]]
        if not context and query:
            return context  # an option on its own, for what the harness calls mutual information
        return with_trace(context, query, trace)

    def _reads_greedy(self, request: Instance) -> bool:
        asked = self.tasks.get(request.task_name)
        return asked is None or asked.greedy

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Prefix and answer ids, as in the harness's `loglikelihood`."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    # Log-likelihoods ------------------------------------------------------------------------------------------------

    def _loglikelihoods(self, requests: Sequence[Instance], greedy: bool) -> list[tuple[float, bool] | Unscored]:
        asked = []
        for request in requests:
            context, continuation = self.prompt(request), request.args[1]
            asked.append(((context, continuation), *self.encode(context, continuation)))
        return self._loglikelihood_tokens(asked, greedy=greedy)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *, greedy: bool = True, **_: Any
    ) -> list[tuple[float, bool] | Unscored]:
        """With `greedy` False the second value is False throughout and nobody may read it."""
        found: dict[int, tuple[float, bool] | Unscored] = {}
        calls: dict[int, list[int]] = {}
        for position, (_, prefix, answer) in enumerate(requests):
            if not answer:
                found[position] = Unscored("the continuation has no tokens")
            elif (reason := self._too_long(len(prefix), len(answer))) is not None:
                found[position] = reason
            else:  # a greedy answer must have as many tokens as the continuation, and a call has one length
                calls.setdefault(len(answer) if greedy else 0, []).append(position)
        for length, positions in calls.items():
            for start in range(0, len(positions), REQUESTS_A_CALL):
                part = positions[start : start + REQUESTS_A_CALL]
                items = [Item(tuple(requests[i][1]), tuple(requests[i][2]), requests[i][0][0]) for i in part]
                scores = self.scorer.score(items, Greedy(length, NEVER_SAID) if greedy else None)
                found |= {i: self._read(*pair) for i, *pair in zip(part, items, scores, strict=True)}
        return [found[position] for position in range(len(requests))]

    def _read(self, item: Item, score: Score | Unscored) -> tuple[float, bool] | Unscored:
        if isinstance(score, Unscored):
            return score
        said = score.greedy_text
        return math.fsum(score.token_logprobs), said is not None and said in self._spellings(item)

    def _spellings(self, item: Item) -> tuple[str, str]:
        """The continuation's text by itself, and behind its prompt: SentencePiece drops a space before the first."""
        decode = self.tokenizer.decode
        whole = decode([*item.prefix_ids, *item.answer_ids], skip_special_tokens=True)
        before = decode(list(item.prefix_ids), skip_special_tokens=True)
        return decode(list(item.answer_ids), skip_special_tokens=True), whole[len(before) :]

    def _too_long(self, prompt: int, answer: int) -> Unscored | None:
        if prompt + answer <= self.scorer.max_length:
            return None
        return Unscored(
            f"too long: {prompt} tokens of prompt and {answer} for the answer, the model takes "
            f"{self.scorer.max_length}; nothing was truncated",
            "too_long",
        )

    # Generation -----------------------------------------------------------------------------------------------------

    def _generations(self, requests: Sequence[Instance]) -> list[str | Unscored]:
        if self.generator is None:
            raise DataError(f"task {requests[0].task_name!r} wants generated answers: give the model a generator")
        found: dict[int, str | Unscored] = {}
        calls: dict[tuple[tuple[str, ...], int], list[tuple[int, Prompt]]] = {}
        for position, request in enumerate(requests):
            check_greedy(str(request.task_name), request.args[1])
            kwargs = normalize_gen_kwargs(request.args[1], DEFAULT_MAX_GEN_TOKS)
            text = self.prompt(request)
            prompt = Prompt(text, self.tok_encode(text))
            reason = self._too_long(len(prompt.ids), kwargs["max_gen_toks"])
            if reason is not None:
                found[position] = reason
            else:
                calls.setdefault((tuple(kwargs["until"]), kwargs["max_gen_toks"]), []).append((position, prompt))
        for (until, max_tokens), asked in calls.items():
            positions, prompts = zip(*asked, strict=True)
            found |= zip(positions, self.generator.generate(prompts, list(until), max_tokens), strict=True)
        return [found[position] for position in range(len(requests))]


def answered(answers: Sequence[Answer | Unscored]) -> list[Any]:
    """The answers, for a caller that knows no failures.

    Raises:
        ScorerError: one is missing; the message says how many, and why the first.
    """
    failed = [answer for answer in answers if isinstance(answer, Unscored)]
    if failed:
        raise ScorerError(f"{len(failed)} of {len(answers)} requests have no answer, the first: {failed[0].reason}")
    return list(answers)
