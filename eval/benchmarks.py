"""What is evaluated on: our own tasks, and those of lm-evaluation-harness, behind one small interface.

A benchmark has questions, and says for one trace a question (or none) what a base model makes of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any, Protocol

from tqdm import tqdm

from context_rl.judge import Judge, Judging
from context_rl.questions import Questions, Reading
from context_rl.tasks import FILE_TASKS, DataError, Task, load_task
from scorer.types import Scorer

Row = dict[str, Any]
BLOCK = 250
"""Questions scored in one call, between two steps of the progress bar."""


@dataclass(frozen=True)
class Question:
    """What a context model is asked, and what is known of it.

    Attributes:
        prompt: what q reads, where that differs from `question` (see `Example.prompt`).
        solution: gold reasoning where the data has one.
    """

    id: str
    question: str
    answer: str
    solution: str | None = None
    prompt: str | None = None


class Benchmark(Protocol):
    """See the module."""

    name: str
    questions: list[Question]
    notes: list[str]
    aggregated: dict[str, dict[str, Any]]
    """The benchmark's own numbers, by the description of a call of `rows`."""

    def rows(self, scorer: Scorer, traces: Sequence[str | None], description: str) -> list[Row]:
        """One row a question, in order: "id", "question", "answer", "trace", "token_logprobs", "answer_tokens",
        "logprob" (nats), "base_answer", "correct", "metrics" (the benchmark's own), "unscored" (the reason, or None).
        """


class OwnBenchmark:
    """The held-out questions of one of our tasks, read as in training; `judge` grades in the task's place."""

    def __init__(
        self, task: Task, *, chat: bool = False, max_answer_tokens: int | None = None, judge: Judge | None = None
    ):
        self.task, self.chat, self.max_answer_tokens = task, chat, max_answer_tokens
        self.judging = Judging(judge) if judge is not None else None
        self.name, self.notes, self.aggregated = task.name, list(task.notes), {}
        self.questions = [Question(e.id, e.question, e.answer, e.solution, e.prompt) for e in task.held_out]

    def rows(self, scorer: Scorer, traces: Sequence[str | None], description: str) -> list[Row]:
        """See `Benchmark.rows`."""
        held_out = self.task.held_out
        questions = Questions(
            held_out,
            self.task.grade,
            scorer,
            chat=self.chat,
            max_answer_tokens=self.max_answer_tokens,
            judging=self.judging,
        )
        tokens = {
            i: [scorer.tokenizer.decode([token]) for token in prepared.answer_ids]
            for i, prepared in questions.by_id.items()
        }
        rows: list[Row] = []
        for start in tqdm(range(0, len(held_out), BLOCK), desc=description, unit="block", leave=False):
            part, chosen = held_out[start : start + BLOCK], traces[start : start + BLOCK]
            for example, trace, reading in zip(part, chosen, questions.read([e.id for e in part], chosen), strict=True):
                said = isinstance(reading, Reading)
                rows.append(
                    {
                        "id": example.id,
                        "question": example.question,
                        "answer": example.answer,
                        "trace": trace,
                        "answer_tokens": tokens[example.id],
                        "token_logprobs": list(reading.score.token_logprobs) if said else None,
                        "logprob": fsum(reading.score.token_logprobs) if said else None,
                        "base_answer": reading.answer if said else None,
                        "correct": reading.correct if said else None,
                        "metrics": {},
                        "unscored": None if said else reading.reason,
                    }
                )
        return rows


class HarnessBenchmark:
    """A task of lm-evaluation-harness: its prompts, filters and metrics, with q's trace put before the answer."""

    def __init__(self, name: str, *, data: str | None, limit: int | None, fewshot: int | None = None):
        from eval import harness  # slow to import, and only needed here

        self.harness = harness
        self.task = harness.load_task(name, data=data, limit=limit, fewshot=fewshot)
        self.name, self.notes = name, []
        self.found = harness.questions(self.task)
        self.questions = [
            Question(f"{self.task.name}/{q.doc_id}", q.question, q.answer, q.solution) for q in self.found
        ]
        self.aggregated: dict[str, dict[str, Any]] = {}

    def rows(self, scorer: Scorer, traces: Sequence[str | None], description: str) -> list[Row]:
        """See `Benchmark.rows`; the harness's own table of them is in `aggregated[description]`."""
        harness = self.harness
        given = {(self.task.name, q.doc_id): trace for q, trace in zip(self.found, traces, strict=True)}
        generates = self.task.task.OUTPUT_TYPE == "generate_until"
        model = harness.HelpedModel(scorer, harness.open_generator(scorer) if generates else None, given)
        print(description)
        evaluated = harness.evaluate(self.task, model)
        self.aggregated[description] = evaluated.metrics
        rows = {row["doc_id"]: row for row in evaluated.rows}
        return [
            {
                "question": q.question,
                "answer": q.answer,
                "trace": trace,
                "answer_tokens": None,
                "token_logprobs": None,
                **rows[q.doc_id],
            }
            for q, trace in zip(self.found, traces, strict=True)
        ]


def load_benchmark(
    task: str,
    *,
    data: str | None,
    eval_data: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None,
    fewshot: int | None = None,
    chat: bool = False,
    max_answer_tokens: int | None = None,
    task_options: dict[str, Any] | None = None,
    judge: Judge | None = None,
) -> Benchmark:
    """Our own tasks have the held-out questions of a run; `gsm8k`, `hellaswag` and all other names are the harness's.

    Args:
        judge: of the answers to one of ours.

    Raises:
        DataError: no such task, data that cannot be used, or a judge of what the harness grades.
    """
    ours = task == "symbolic" or task.startswith("rg:") or (task in FILE_TASKS and task not in ("gsm8k", "hellaswag"))
    if not ours and judge is not None:
        raise DataError(f"{task} is graded by lm-evaluation-harness, which asks no judge; add --grader task")
    if not ours:
        return HarnessBenchmark(task, data=eval_data or data, limit=limit, fewshot=fewshot)
    loaded = load_task(
        task,
        data=data,
        eval_data=eval_data,
        question_column=question_column,
        answer_column=answer_column,
        train_size=0,
        eval_size=limit or 1000,
        seed=0,  # it chooses training questions, of which there are none
        task_options=task_options,
    )
    return OwnBenchmark(loaded, chat=chat, max_answer_tokens=max_answer_tokens, judge=judge)
