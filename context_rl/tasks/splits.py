"""Which questions are trained on and which are held out: by their text, never by a seed or a place in a file."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from context_rl.tasks.types import DataError, Example, Task

HELD_OUT_SHARE = 0.2
"""Share of the distinct questions held out where the data has no test split."""

MOST_HELD_OUT = 2000


def question_key(question: str) -> str:
    """What makes two questions the same: their words, whatever the case and the white space."""
    return " ".join(question.split()).casefold()


def text_position(question: str) -> float:
    """A fixed place in [0, 1) for a question: the same in every run, seed and machine."""
    digest = hashlib.sha256(question_key(question).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_off(name: str, examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(train, held out) of rows without a test split; rows with the same question stay together.

    Raises:
        DataError: fewer than two distinct questions.
    """
    keys = sorted({question_key(e.question) for e in examples}, key=lambda key: (text_position(key), key))
    if len(keys) < 2:
        raise DataError(f"{name}: one distinct question cannot be split; add questions, or give --eval_data")
    held_out = set(keys[: min(max(1, round(len(keys) * HELD_OUT_SHARE)), MOST_HELD_OUT)])
    return (
        [e for e in examples if question_key(e.question) not in held_out],
        [e for e in examples if question_key(e.question) in held_out],
    )


def check(example: Example, grade: Callable[[str, Example], bool], where: str) -> Example:
    """The example itself, if the task's grader takes its gold answer for right.

    Raises:
        DataError: it does not, so no answer to this question could ever be graded.
    """
    if not grade(example.answer, example):
        raise DataError(
            f"{where}: the gold answer {example.answer!r} is wrong by the task's own grader; correct the row"
        )
    return example


def make_task(
    name: str,
    train: list[Example],
    held_out: list[Example] | None,
    grade: Callable[[str, Example], bool],
    *,
    train_size: int | None,
    eval_size: int | None,
    seed: int,
    notes: Sequence[str] = (),
) -> Task:
    """Part, clean and cut rows that have been read.

    Where `held_out` is None a part of `train` becomes it. Training rows whose question is held out are left out and
    counted in a note: the held-out part stays what it is, since numbers are compared on it. The first `train_size` rows
    in the seed's order and the first `eval_size` in the fixed order are used, or all if there are fewer.

    Raises:
        DataError: nothing is left to train on.
    """
    notes = list(notes)
    if held_out is None:
        total = len(train)
        train, held_out = split_off(name, train)
        notes.append(f"no test split: {len(held_out)} of {total} rows are held out, chosen by the question's text")
    held_out_keys = {question_key(e.question) for e in held_out}
    clean = [e for e in train if question_key(e.question) not in held_out_keys]
    if len(clean) < len(train):
        notes.append(f"left {len(train) - len(clean)} training rows out: their questions are held out for evaluation")
    if not clean:
        raise DataError(f"{name}: every training question is also held out; give other rows with --data or --eval_data")
    train_ids = {e.id for e in train}
    if any(e.id in train_ids for e in held_out):  # files of the same name in two folders
        held_out = [replace(e, id=f"held_out/{e.id}") for e in held_out]
    random.Random(seed).shuffle(clean)
    held_out = sorted(held_out, key=lambda e: text_position(e.question))
    return finish(Task(name, clean[:train_size], held_out[:eval_size], grade, tuple(notes)), train_size, eval_size)


def finish(task: Task, train_size: int | None, eval_size: int | None) -> Task:
    """The task with a note for each part that is smaller than asked for."""
    asked = (("training", train_size, len(task.train)), ("held-out", eval_size, len(task.held_out)))
    short = [
        f"{there} {part} questions, not {size}: there are no more" for part, size, there in asked if there < (size or 0)
    ]
    task = replace(task, notes=(*task.notes, *short))
    return task
