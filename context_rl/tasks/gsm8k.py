"""GSM8K: grade-school word problems. Only the number after #### is scored; the solution before it is kept apart."""

import re
from collections.abc import Sequence
from dataclasses import replace

from context_rl.tasks import qa
from context_rl.tasks.files import Row, Table
from context_rl.tasks.grading import grade_number
from context_rl.tasks.sources import read_source
from context_rl.tasks.splits import check, make_task
from context_rl.tasks.types import DataError, Example, Task

HUB_ID = "openai/gsm8k:main"
CALCULATOR = re.compile(r"<<[^>]*>>")
"""Annotations such as <<48/2=24>>, which no reader of the solution needs."""


def load(
    data: str | None,
    eval_data: str | None,
    question_column: str | None,
    answer_column: str | None,
    *,
    train_size: int | None,
    eval_size: int | None,
    seed: int,
) -> Task:
    """GSM8K from the hub, or from `data`: a folder with train and test files, or one file.

    Raises:
        DataError: a row without ####, or without a number after it; else as for `qa.load`.
    """
    columns = (question_column or "question", answer_column or "answer")
    source = read_source(data or HUB_ID, eval_data, lambda column: column in columns)
    train = _examples(source.train, "train", columns)
    held_out = None if source.held_out is None else _examples(source.held_out, "test", columns)
    sizes = {"train_size": train_size, "eval_size": eval_size, "seed": seed}
    return make_task("gsm8k", train, held_out, grade_number, **sizes, notes=source.notes)


def _examples(tables: Sequence[Table], split: str, columns: tuple[str, str]) -> list[Example]:
    """Ids count the rows of a split from 0, as the hub does: a local copy gives the same ones."""
    for table in tables:
        qa.find_columns(table, *columns)
    rows = [row for table in tables for row in table.rows]
    examples = [(row, replace(example(row, *columns), id=f"gsm8k/{split}/{n}")) for n, row in enumerate(rows)]
    return [check(e, grade_number, row.where) for row, e in examples]


def example(row: Row, question: str, answer: str) -> Example:
    """A row of GSM8K: "rationale #### 1,234" becomes the answer "1234" and the solution "rationale"."""
    text = row.values.get(answer)
    rationale, mark, number = text.rpartition("####") if isinstance(text, str) else ("", "", "")
    if not mark:
        raise DataError(
            f"{row.where}: no '####' before the final number in column {answer!r}; add it, or use --task qa"
        )
    number = number.replace(",", "").strip()
    scored = qa.read_answer(replace(row, values={answer: number}), answer)
    return Example(
        row.id, qa.read_question(row, question), scored, solution=CALCULATOR.sub("", rationale).strip() or None
    )
