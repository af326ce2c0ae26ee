"""What the base model is asked: from examples and traces to token ids to scores, and the no-trace baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from context_rl import prompts
from context_rl.tasks import DataError, Example
from scorer.store import ScoreStore
from scorer.tokens import BoundaryError, encode_answer, encode_prefix
from scorer.types import Greedy, Item, Score, Scorer, Unscored


@dataclass(frozen=True)
class Prepared:
    """An example with the token ids that every trace of its group is scored on."""

    example: Example
    answer_ids: tuple[int, ...]


class Questions:
    """Examples made ready for one scorer: text to items, and the no-trace baseline, computed once a question.

    Args:
        examples: from `load_task`, already valid for the task's grader.
        grade: the task's grader.
        chat: use the base model's chat template.
        max_answer_tokens: of the base model's own greedy answer; None is two more than the longest gold answer has.
        store: baselines of earlier runs, opened by the caller for this scorer's fingerprint; None keeps none.

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
    ):
        self.scorer, self.grade, self.chat, self.store = scorer, grade, chat, store
        self.end = (scorer.tokenizer.eos_token or "") if chat else prompts.ANSWER_END
        self.by_id = {example.id: Prepared(example, self._answer_ids(example)) for example in examples}
        longest = max((len(prepared.answer_ids) for prepared in self.by_id.values()), default=1)
        self.greedy = Greedy(max_answer_tokens or longest + 2)
        for prepared in self.by_id.values():
            self._check_fits(prepared)
        self.baselines: dict[str, Score | Unscored] = {}
        self.baselines_from_store = 0

    def _answer_ids(self, example: Example) -> tuple[int, ...]:
        text = prompts.answer_text(example.answer, self.end)
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
        needed = len(self.prefix(example, None)) + self.greedy.max_new_tokens
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
        """What the scorer is asked for a (question, trace); the traces of a question are one group."""
        prepared = self.by_id[example_id]
        return Item(self.prefix(prepared.example, trace), prepared.answer_ids, group=example_id)

    def ask(self, ids: Sequence[str], traces: Sequence[str | None]) -> list[Score | Unscored]:
        """One result a (question, trace); a trace too long for the base model is unscored, never cut."""
        return self._score([self.item(example_id, trace) for example_id, trace in zip(ids, traces, strict=True)])

    def _score(self, items: Sequence[Item]) -> list[Score | Unscored]:
        refused: list[Unscored | None] = []
        for item in items:
            needed = len(item.prefix_ids) + max(len(item.answer_ids), self.greedy.max_new_tokens)
            reason = (
                f"{item.group}: prefix and answer take {needed} tokens, the base model has {self.scorer.max_length}"
            )
            refused.append(Unscored(reason, "too_long") if needed > self.scorer.max_length else None)
        fitting = [item for item, refusal in zip(items, refused, strict=True) if refusal is None]
        scored = iter(self.scorer.score(fitting, self.greedy) if fitting else [])
        return [next(scored) if refusal is None else refusal for refusal in refused]

    def ask_baselines(self, ids: Sequence[str]) -> list[Score | Unscored]:
        """The same without a trace: from memory, else from the store, else from the scorer.

        A baseline that failed is asked again the next time it is needed.
        """
        new = [i for i in dict.fromkeys(ids) if not isinstance(self.baselines.get(i), Score)]
        items = {i: self.item(i, None) for i in new}
        stored = self.store.get(list(items.values()), self.greedy) if self.store and new else {}
        missing = {i: item for i, item in items.items() if item not in stored}
        computed = dict(zip(missing, self._score(list(missing.values())), strict=True))
        if self.store and missing:
            self.store.put(list(missing.values()), list(computed.values()), self.greedy)
        self.baselines |= {i: stored[item] for i, item in items.items() if item in stored} | computed
        self.baselines_from_store += len(new) - len(missing)
        return [self.baselines[i] for i in ids]

    def is_correct(self, example_id: str, score: Score) -> bool:
        """Whether the base model's own answer is right by the task's grader."""
        return self.grade(score.greedy_text or "", self.by_id[example_id].example)
