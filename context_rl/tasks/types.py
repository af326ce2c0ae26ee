"""What a task is made of, and the one error its data can raise."""

from collections.abc import Callable
from dataclasses import dataclass


class DataError(ValueError):
    """A task or its data cannot be used; the message is one line that says where, what is wrong and what to do."""


@dataclass(frozen=True)
class Example:
    """One question with its known answer.

    Attributes:
        id: unique within the task and the same in every run, e.g. "gsm8k/test/17", "my.jsonl:12".
        answer: the scored span: one line, not empty, no white space at its ends.
        solution: gold reasoning where the data has one; never shown to the context model and never scored.
        choices: the endings of a multiple-choice question, of which number `label` is right.
        entry: what the task's own grader needs besides the answer (reasoning-gym).
        prompt: what the context model is asked, where that differs from `question` (a list of the endings below it);
            None where it does not. The base model always reads `question`.
    """

    id: str
    question: str
    answer: str
    solution: str | None = None
    choices: tuple[str, ...] = ()
    label: int | None = None
    entry: dict | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Task:
    """Examples to train on, examples to evaluate on, and what counts as a right answer.

    Attributes:
        train: in the order that the seed gives.
        held_out: in an order that no seed changes; none of its questions stands in `train`.
        grade: (the base model's answer line, the example) -> is it right?
        notes: what was decided on the way and a reader of the results should know, e.g. how many rows were left out.
    """

    name: str
    train: list[Example]
    held_out: list[Example]
    grade: Callable[[str, Example], bool]
    notes: tuple[str, ...] = ()
