"""What the base model is asked: from examples and traces to token ids to scores, and the no-trace baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum

from context_rl import prompts
from context_rl.judge import Judging
from context_rl.rewards import Option, logged_values
from context_rl.rewards.safeguards import mask_answer
from context_rl.tasks import DataError, Example
from context_rl.traces import AssessedTrace, inputs_of, options_of
from scorer.store import ScoreStore
from scorer.tokens import BoundaryError, encode_answer, encode_prefix
from scorer.types import Greedy, Item, Score, Scorer, Unscored


@dataclass(frozen=True)
class Prepared:
    """An example with the token ids that every trace of its group is scored on."""

    example: Example
    answer_ids: tuple[int, ...]
    option_ids: tuple[tuple[int, ...], ...] = ()
    """Of a multiple-choice question: of each option, the right one among them."""


@dataclass(frozen=True)
class Reading:
    """What the base model made of one question and trace.

    Attributes:
        score: of the right answer.
        answer: its own: greedy, or of a multiple-choice question the option that is likeliest per character.
        correct: is that right by the task's grader, or by the judge? None where the judge was not asked.
        options: of a multiple-choice question.
    """

    score: Score
    answer: str
    correct: bool | None
    options: tuple[Option, ...] = ()


class Questions:
    """Examples made ready for one scorer: text to items, and the no-trace baseline, computed once a question.

    Args:
        examples: from `load_task`, already valid for the task's grader.
        grade: the task's grader.
        chat: use the base model's chat template.
        max_answer_tokens: of the base model's own greedy answer; None is two more than the longest gold answer has.
        store: baselines of earlier runs, opened by the caller for this scorer's fingerprint; None keeps none.
        masked: score traces that state the answer once more with its mentions cut out.
        judging: what a judge says of the base model's answers, opened by the caller; None without one.

    `baselines_from_store` counts the baselines that were read there instead of computed.

    Raises:
        DataError: naming the row, where an answer's token boundary is ambiguous or the question alone does not fit.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        grade: Callable[[str, Example], bool],
        scorer: Scorer,
        *,
        chat: bool = False,
        max_answer_tokens: int | None = None,
        store: ScoreStore | None = None,
        masked: bool = True,
        judging: Judging | None = None,
    ):
        self.scorer, self.grade, self.chat, self.store, self.masked = scorer, grade, chat, store, masked
        self.end = (scorer.tokenizer.eos_token or "") if chat else prompts.ANSWER_END
        self.by_id = {example.id: self._prepared(example) for example in examples}
        longest = max((len(prepared.answer_ids) for prepared in self.by_id.values()), default=1)
        self.greedy = Greedy(max_answer_tokens or longest + 2)
        for prepared in self.by_id.values():
            self._check_fits(prepared)
        self.baselines: dict[str, Score | Unscored] = {}
        self.baselines_from_store = 0
        self.judging = judging or Judging(None, grades=False)

    def _prepared(self, example: Example) -> Prepared:
        options = tuple(self._answer_ids(example, choice) for choice in example.choices)
        return Prepared(example, self._answer_ids(example, example.answer), options)

    def _answer_ids(self, example: Example, answer: str) -> tuple[int, ...]:
        text = prompts.answer_text(answer, self.end)
        try:
            return encode_answer(self.scorer.tokenizer, prompts.ANSWER_TAIL, text)
        except BoundaryError as error:
            raise DataError(f"{example.id}: {error}; reword the answer or use another base model") from error

    def _check_fits(self, prepared: Prepared) -> None:
        example, answer = prepared.example, len(prepared.answer_ids)
        if answer > self.greedy.max_new_tokens:
            raise DataError(
                f"{example.id}: the answer takes {answer} tokens, so the base model could never give it within "
                f"--max_answer_tokens {self.greedy.max_new_tokens}; raise that, or leave it unset"
            )
        longest = max((len(ids) for ids in prepared.option_ids), default=self.greedy.max_new_tokens)
        needed = len(self.prefix(example, None)) + longest
        if needed > self.scorer.max_length:
            raise DataError(
                f"{example.id}: the prompt does not fit: question and answer take {needed} tokens, the base model has "
                f"{self.scorer.max_length}; drop the row or use a base model with a longer context"
            )

    def prefix(self, example: Example, trace: str | None) -> tuple[int, ...]:
        """Token ids of what the base model reads before the answer."""
        if self.chat:
            text = prompts.base_chat_prefix(self.scorer.tokenizer, example.question, trace)
            return encode_prefix(self.scorer.tokenizer, text, special_tokens=False)
        return encode_prefix(self.scorer.tokenizer, prompts.base_prefix(example.question, trace))

    def item(self, example_id: str, trace: str | None) -> Item:
        """What the scorer is asked for the right answer to a (question, trace); a question's traces are one group."""
        prepared = self.by_id[example_id]
        return Item(self.prefix(prepared.example, trace), prepared.answer_ids, group=example_id)

    def ask(self, ids: Sequence[str], traces: Sequence[str | None]) -> list[Score | Unscored]:
        """The right answer's score a (question, trace); a trace too long for the base model is unscored, never cut."""
        return self._score([self.item(*pair) for pair in zip(ids, traces, strict=True)], self.greedy)

    def _score(self, items: Sequence[Item], greedy: Greedy | None) -> list[Score | Unscored]:
        refused: list[Unscored | None] = []
        for item in items:
            needed = len(item.prefix_ids) + max(len(item.answer_ids), greedy.max_new_tokens if greedy else 0)
            reason = (
                f"{item.group}: prefix and answer take {needed} tokens, the base model has {self.scorer.max_length}"
            )
            refused.append(Unscored(reason, "too_long") if needed > self.scorer.max_length else None)
        fitting = [item for item, refusal in zip(items, refused, strict=True) if refusal is None]
        scored = iter(self.scorer.score(fitting, greedy) if fitting else [])
        return [next(scored) if refusal is None else refusal for refusal in refused]

    def read(
        self, ids: Sequence[str], traces: Sequence[str | None], training: bool = False
    ) -> list[Reading | Unscored]:
        """What the base model makes of each (question, trace): score, answer, right or wrong, options.

        A multiple-choice question costs one score an option, and no generation: its answer is the likeliest option.

        Args:
            training: the traces are sampled ones: a judge is asked what the reward needs, and may fail.

        Raises:
            JudgeError: the judge cannot work at all.
        """
        open_ended = [n for n, i in enumerate(ids) if not self.by_id[i].option_ids]
        scores = self.ask([ids[n] for n in open_ended], [traces[n] for n in open_ended])
        said = [n for n, score in zip(open_ended, scores, strict=True) if isinstance(score, Score)]
        readings = dict(zip(open_ended, scores, strict=True))
        texts = [readings[n].greedy_text or "" for n in said]
        examples = [self.by_id[ids[n]].example for n in said]
        right = (
            self.judging.right(examples, texts, training) if self.judging.grades else map(self.grade, texts, examples)
        )
        for n, text, correct in zip(said, texts, right, strict=True):
            readings[n] = correct if isinstance(correct, Unscored) else Reading(readings[n], text, correct)
        items: list[Item] = []
        choice = [n for n, i in enumerate(ids) if self.by_id[i].option_ids]
        for n in choice:
            prefix = self.prefix(self.by_id[ids[n]].example, traces[n])
            items += [Item(prefix, option, group=ids[n]) for option in self.by_id[ids[n]].option_ids]
        scores = iter(self._score(items, None) if items else [])
        for n in choice:
            readings[n] = chosen(self.by_id[ids[n]].example, [next(scores) for _ in self.by_id[ids[n]].option_ids])
        return [readings[n] for n in range(len(ids))]

    def ask_baselines(self, ids: Sequence[str]) -> list[Score | Unscored]:
        """The right answer's score without a trace: from memory, else from the store, else from the scorer.

        A baseline that failed is asked again the next time it is needed.
        """
        new = [i for i in dict.fromkeys(ids) if not isinstance(self.baselines.get(i), Score)]
        items = {i: self.item(i, None) for i in new}
        stored = self.store.get(list(items.values()), None) if self.store and new else {}
        missing = {i: item for i, item in items.items() if item not in stored}
        computed = dict(zip(missing, self._score(list(missing.values()), None), strict=True))
        if self.store and missing:
            self.store.put(list(missing.values()), list(computed.values()), None)
        self.baselines |= {i: stored[item] for i, item in items.items() if item in stored} | computed
        self.baselines_from_store += len(new) - len(missing)
        return [self.baselines[i] for i in ids]

    def ask_masked(self, ids: Sequence[str], traces: Sequence[str]) -> list[tuple[float, ...] | Unscored | None]:
        """The answer's log-probs with its mentions cut out of the trace; None for a trace that has none to cut."""
        masked = [mask_answer(trace, self.by_id[i].example.answer) for i, trace in zip(ids, traces, strict=True)]
        changed = [n for n, (a, b) in enumerate(zip(masked, traces, strict=True)) if a != b]
        scores = dict(zip(changed, self._score([self.item(ids[n], masked[n]) for n in changed], None), strict=True))
        found = [scores.get(n) for n in range(len(ids))]
        return [score.token_logprobs if isinstance(score, Score) else score for score in found]

    def assess(
        self,
        ids: Sequence[str],
        traces: Sequence[str],
        tokens: Sequence[int] | None = None,
        finished: Sequence[bool] | None = None,
    ) -> list[AssessedTrace]:
        """All that a reward may look at, of each trace, and every logged reward of it; or the reason why there is none.

        Args:
            tokens: lengths in the context model's tokens; None counts words.
            finished: whether q ended the trace by itself; None takes that for granted.
        """
        tokens = [len(trace.split()) for trace in traces] if tokens is None else tokens
        finished = [True] * len(traces) if finished is None else finished
        baselines = self.ask_baselines(ids)
        readings = self.read(ids, traces, training=True)
        scored = [n for n, reading in enumerate(readings) if isinstance(reading, Reading)]
        examples, texts = [self.by_id[ids[n]].example for n in scored], [readings[n].answer for n in scored]
        judged = dict(zip(scored, self.judging.score(examples, texts), strict=True))
        masks: list[tuple[float, ...] | Unscored | None] = [None] * len(traces)
        if self.masked:
            for n, mask in zip(
                scored, self.ask_masked([ids[n] for n in scored], [traces[n] for n in scored]), strict=True
            ):
                masks[n] = mask
        return [
            self._assessed(*row, judged.get(n))
            for n, row in enumerate(zip(ids, traces, tokens, finished, readings, baselines, masks, strict=True))
        ]

    def _assessed(
        self,
        example_id: str,
        trace: str,
        tokens: int,
        finished: bool,
        reading: Reading | Unscored,
        baseline: Score | Unscored,
        masked: tuple[float, ...] | Unscored | None,
        judged: float | Unscored | None = None,
    ) -> AssessedTrace:
        for result in (reading, baseline, masked, judged):
            if isinstance(result, Unscored):
                return AssessedTrace(example_id, trace, tokens, finished, unscored=result.reason)
        example, logprobs = self.by_id[example_id].example, reading.score.token_logprobs
        inputs = inputs_of(
            example,
            trace=trace,
            tokens=tokens,
            finished=finished,
            base_answer=reading.answer,
            correct=reading.correct,
            logprobs=logprobs,
            baseline=baseline.token_logprobs,
            masked=(masked or logprobs) if self.masked else None,
            options=reading.options,
            judged=judged,
        )
        return AssessedTrace(example_id, trace, tokens, finished, reading.answer, inputs, logged_values(inputs))


def chosen(example: Example, scores: Sequence[Score | Unscored]) -> Reading | Unscored:
    """What the base model chooses: the option with the largest log-prob per character (lm-eval's acc_norm)."""
    for score in scores:
        if isinstance(score, Unscored):
            return score
    options = options_of(example, [fsum(score.token_logprobs) for score in scores])
    best = max(range(len(options)), key=lambda n: options[n].logprob / options[n].characters)
    return Reading(scores[example.label], example.choices[best], best == example.label, options)
