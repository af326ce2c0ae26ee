"""The user's own questions and answers, from files or the hub."""

import math
from collections.abc import Sequence
from decimal import Decimal

from context_rl.tasks.files import Row, Table
from context_rl.tasks.grading import grade_number_or_text
from context_rl.tasks.sources import read_source
from context_rl.tasks.splits import check, make_task
from context_rl.tasks.types import DataError, Example, Task

QUESTION_COLUMNS = ("question", "query", "problem", "prompt", "instruction", "input")
ANSWER_COLUMNS = ("answer", "target", "output", "response", "completion", "label", "final_answer", "ground_truth")
SOLUTION_COLUMNS = ("solution", "rationale")
"""Recognised names, in any case. The first of each wins over the others; several of the others are an error.

"solution" is the answer only where no answer column is found, otherwise the gold reasoning.
"""


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
    """The task of answering the questions in `data`; numbers are graded as numbers, all else as text.

    Raises:
        DataError: see `read_source`, `find_columns`, `read_answer` and `make_task`.
    """
    if data is None:
        raise DataError(
            "the task 'qa' needs --data: a .jsonl, .json, .csv, .tsv or .parquet file, a folder, or a hub id"
        )
    named = (question_column, answer_column)
    recognised = {*QUESTION_COLUMNS, *ANSWER_COLUMNS, *SOLUTION_COLUMNS}
    source = read_source(data, eval_data, lambda column: column in named or column.strip().casefold() in recognised)
    train = _examples(source.train, *named)
    held_out = None if source.held_out is None else _examples(source.held_out, *named)
    sizes = {"train_size": train_size, "eval_size": eval_size, "seed": seed}
    return make_task("qa", train, held_out, grade_number_or_text, **sizes, notes=source.notes)


def _examples(tables: Sequence[Table], question_column: str | None, answer_column: str | None) -> list[Example]:
    return [
        check(_example(row, columns), grade_number_or_text, row.where)
        for table in tables
        for columns in [find_columns(table, question_column, answer_column)]
        for row in table.rows
    ]


def _example(row: Row, columns: tuple[str, str, str | None]) -> Example:
    question, answer, solution = columns
    reasoning = row.values.get(solution) if solution else None
    return Example(
        row.id,
        read_question(row, question),
        read_answer(row, answer),
        solution=(reasoning.strip() or None) if isinstance(reasoning, str) else None,
    )


def find_columns(table: Table, question: str | None, answer: str | None) -> tuple[str, str, str | None]:
    """(question column, answer column, solution column or None), the first two as named or recognised.

    Raises:
        DataError: a column named is not there, or none or several are recognised.
    """
    question = _find(table, "question", QUESTION_COLUMNS, question)
    if answer is None and not _present(table, ANSWER_COLUMNS):
        answer = _find(table, "answer", SOLUTION_COLUMNS[:1], None)
    else:
        answer = _find(table, "answer", ANSWER_COLUMNS, answer)
    if question == answer:
        raise DataError(f"{table.name}: column {question!r} cannot be both the question and the answer")
    solutions = [c for c in _present(table, SOLUTION_COLUMNS) if c not in (question, answer)]
    return question, answer, solutions[0] if solutions else None


def _present(table: Table, names: Sequence[str]) -> list[str]:
    return [column for name in names for column in table.columns if column.strip().casefold() == name]


def _find(table: Table, part: str, names: Sequence[str], named: str | None) -> str:
    has = f"the columns are {', '.join(map(repr, table.columns))}"
    flag = f"--{part}_column"
    if named is not None:
        if named not in table.columns:
            raise DataError(f"{table.name}: no column {named!r} ({flag}); {has}")
        return named
    found = _present(table, names[:1]) or _present(table, names)
    if not found:
        raise DataError(f"{table.name}: no {part} column recognised; {has}; name it with {flag}")
    if len(found) > 1:
        raise DataError(
            f"{table.name}: {' or '.join(map(repr, found))} could be the {part}; {has}; name it with {flag}"
        )
    return found[0]


def read_question(row: Row, column: str) -> str:
    """The question, without white space at its ends.

    Raises:
        DataError: missing, empty or no text.
    """
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise _bad(
            row, "question", column, f"is {_shown(value)}, not text; name the right column with --question_column"
        )
    return _stripped(row, "question", column, value or "")


def read_answer(row: Row, column: str) -> str:
    """The answer as one line without white space at its ends; JSON and Parquet numbers as one writes them (7.0 as 7).

    Raises:
        DataError: missing, empty, of several lines, or neither text nor a number.
    """
    value = row.values.get(column)
    if isinstance(value, bool):
        raise _bad(
            row, "answer", column, f'is {_shown(value)}; write it as the text to be scored, such as "yes" or "no"'
        )
    if isinstance(value, int | float | Decimal):
        if not math.isfinite(value):
            raise _bad(row, "answer", column, f"is {value}, no number; correct or remove the row")
        whole = value == int(value) and abs(value) < 10**15
        value = str(int(value)) if whole or isinstance(value, int) else str(value)
    if value is not None and not isinstance(value, str):
        hint = "the scored answer is one text or number; write one into the row or name another --answer_column"
        raise _bad(row, "answer", column, f"is {_shown(value)}; {hint}")
    answer = _stripped(row, "answer", column, value or "")
    if len(answer.splitlines()) > 1:
        hint = (
            "for GSM8K's format use --task gsm8k" if "####" in answer else "keep the reasoning in a column 'solution'"
        )
        raise _bad(row, "answer", column, f"has several lines, and the scored answer must be one; {hint}")
    return answer


def _stripped(row: Row, part: str, column: str, text: str) -> str:
    text = text.strip()
    if not text:
        raise _bad(row, part, column, "is empty; fill it in or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad(row, part, column, "holds half a character (a lone surrogate); correct the row") from error
    return text


def _bad(row: Row, part: str, column: str, problem: str) -> DataError:
    return DataError(f"{row.where}: the {part} (column {column!r}) {problem}")


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
