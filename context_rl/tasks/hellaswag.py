"""HellaSwag: which of four endings goes on from the context? The scored answer is the text of the right one.

Context and endings are prepared as lm-evaluation-harness prepares them (its task `hellaswag`, version 1.0), so that
accuracies can be compared with published ones. The data is Zellers et al., 2019, https://arxiv.org/abs/1905.07830.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from context_rl.tasks import qa
from context_rl.tasks.files import Row, Table
from context_rl.tasks.grading import normalise, same_text
from context_rl.tasks.sources import read_source
from context_rl.tasks.splits import check, make_task
from context_rl.tasks.types import DataError, Example, Task

HUB_ID = "Rowan/hellaswag"
COLUMNS = frozenset({"ctx_a", "ctx_b", "ctx", "activity_label", "endings", "label"})
TAG = re.compile(r"\[.*?\]")
"""What WikiHow's layout has left in the text: [header], [title], [step], [substeps]."""


def load(
    data: str | None,
    eval_data: str | None,
    question_column: str | None,
    answer_column: str | None,
    *,
    task_options: dict[str, Any] | None,
    train_size: int | None,
    eval_size: int | None,
    seed: int,
) -> Task:
    """HellaSwag from the hub, or from `data`: a folder with train and validation files, or one file.

    Held out is the validation split, because the public test split has no labels. Training questions that are held out
    are found by their text, activity label included: where only one of two files has the labels, none would be found.

    Args:
        task_options: {"show_endings": true} lists the endings in the context model's prompt (`Example.prompt`), by
            default they are not shown. The base model is never shown the list.

    Raises:
        DataError: columns or options that there are not, or a row as `example` describes; else as for `read_source`
            and `make_task`.
    """
    columns = {"--question_column": question_column, "--answer_column": answer_column}
    named = [flag for flag, column in columns.items() if column is not None]
    if named:
        raise DataError(f"the columns of the task 'hellaswag' are fixed; leave {', '.join(named)} out")
    show_endings = _show_endings(task_options or {})
    source = read_source(data or HUB_ID, eval_data, lambda c: c in COLUMNS, prefer=("validation", "test"))
    train = _examples(source.train, "train", show_endings)
    held_out = None if source.held_out is None else _examples(source.held_out, "validation", show_endings)
    sizes = {"train_size": train_size, "eval_size": eval_size, "seed": seed}
    return make_task("hellaswag", train, held_out, grade, **sizes, notes=source.notes)


def _show_endings(options: dict[str, Any]) -> bool:
    wrong = sorted(set(options) - {"show_endings"})
    if wrong:
        raise DataError(f"the task 'hellaswag' has no option {', '.join(map(repr, wrong))}; it has show_endings")
    show = options.get("show_endings", False)
    if not isinstance(show, bool):
        raise DataError(f"the option show_endings of the task 'hellaswag' is true or false, not {show!r}")
    return show


def grade(text: str, example: Example) -> bool:
    """Whether an answer line is the right ending after `normalise`; it is no other then, as `example` sees to."""
    return same_text(example.answer, text)


def _examples(tables: Sequence[Table], split: str, show_endings: bool) -> list[Example]:
    """Ids count the rows of a split from 0, as the hub does: a local copy gives the same ones."""
    for table in tables:
        _check_columns(table)
    rows = [row for table in tables for row in table.rows]
    examples = [(row, example(row, f"hellaswag/{split}/{n}", show_endings)) for n, row in enumerate(rows)]
    return [check(e, grade, row.where) for row, e in examples]


def _check_columns(table: Table) -> None:
    missing = [column for column in ("endings", "label") if column not in table.columns]
    if not {"ctx_a", "ctx_b"} <= set(table.columns) and "ctx" not in table.columns:
        missing.append("ctx")
    if missing:
        has = ", ".join(map(repr, table.columns))
        raise DataError(
            f"{table.name}: no column {' or '.join(map(repr, missing))}; the columns are {has}, and the task "
            "'hellaswag' needs endings, label, and ctx_a with ctx_b or else ctx"
        )


def example(row: Row, example_id: str, show_endings: bool) -> Example:
    """A row of HellaSwag.

    Raises:
        DataError: no context, endings that are not a list of at least two one-line texts that the grader can tell
            apart, or a label that is the number of none of them. No such row is left out quietly: of the public data,
            all 10,042 validation rows and 1,000 of the training rows were looked through, and none is like that.
    """
    question, choices = _question(row), _endings(row)
    label = _label(row, len(choices))
    prompt = _with_endings(question, choices) if show_endings else None
    return Example(example_id, question, choices[label], choices=choices, label=label, prompt=prompt)


def tidy(text: str) -> str:
    """The harness's preprocessing: " [title]" ends a sentence, other tags go, and then one of each two spaces.

    The white space at the ends goes last of all. The harness takes it off first and so keeps the space behind a leading
    tag; here the space before an answer belongs to the template.
    """
    text = TAG.sub("", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _question(row: Row) -> str:
    """The harness's query "activity label: ctx_a Ctx_b", without "activity label: " where the label is empty.

    Reduced copies of the data have `ctx` only. Where ctx_b begins in it cannot be told, so nothing is capitalised.
    """
    columns = ("ctx_a", "ctx_b") if row.values.get("ctx_a") is not None else ("ctx",)
    first, *second = [_text(row, column) for column in columns]
    context = " ".join([first, *(part.capitalize() for part in second)])
    activity = _text(row, "activity_label") if row.values.get("activity_label") else ""
    # A label alone is no question: without a context the text stays empty, and is refused.
    labelled = activity.strip() and tidy(context)
    text = tidy(f"{activity}: {context}" if labelled else context)
    return qa.read_question(replace(row, values={columns[0]: text}), columns[0])


def _text(row: Row, column: str) -> str:
    text = row.values.get(column)
    if not isinstance(text, str):
        raise DataError(f"{row.where}: column {column!r} is {_shown(text)}, not text; correct or remove the row")
    return text


def _endings(row: Row) -> tuple[str, ...]:
    endings = row.values.get("endings")
    if not isinstance(endings, list) or not 2 <= len(endings) <= len(ascii_uppercase):
        raise DataError(
            f"{row.where}: column 'endings' is {_shown(endings)}, not a list of 2 to {len(ascii_uppercase)} texts; "
            "correct the row, and use .jsonl or .parquet for lists"
        )
    texts = tuple(_ending(row, f"endings[{n}]", ending) for n, ending in enumerate(endings))
    first: dict[str, int] = {}
    for n, text in enumerate(texts):
        same = first.setdefault(normalise(text), n)
        if same != n:
            raise DataError(
                f"{row.where}: endings[{same}] and endings[{n}] are the same to the grader ({_shown(text)}); correct "
                "or remove the row"
            )
    return texts


def _ending(row: Row, name: str, ending: object) -> str:
    if not isinstance(ending, str):
        raise DataError(f"{row.where}: {name} is {_shown(ending)}, not text; correct or remove the row")
    text = tidy(ending)
    if len(text.splitlines()) > 1:
        raise DataError(f"{row.where}: {name} has several lines, and an ending is scored as one; correct the row")
    return qa.read_answer(replace(row, values={name: text}), name)


def _label(row: Row, endings: int) -> int:
    """The number of the right ending, from 0: an int, or its digits as the hub has it."""
    label = row.values.get("label")
    if label is None or label == "":
        raise DataError(
            f"{row.where}: no label says which ending is right, as in the public test split; name train and "
            "validation data"
        )
    digits = str(label).strip() if isinstance(label, int | str) else ""
    if not re.fullmatch(r"[0-9]{1,3}", digits) or int(digits) >= endings:
        raise DataError(
            f"{row.where}: the label is {_shown(label)}, not a whole number from 0 to {endings - 1}; correct the row"
        )
    return int(digits)


def _with_endings(question: str, endings: Sequence[str]) -> str:
    """The question and a line an ending, in the order of the data: in HellaSwag each place is right equally often."""
    listed = [f"{letter}) {ending}" for letter, ending in zip(ascii_uppercase, endings, strict=False)]
    return "\n".join([question, *listed])


def _shown(value: object) -> str:
    """A value of a row for an error message: missing, or its type and the beginning of what it is."""
    if value is None:
        return "missing"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
