"""Dialogues: the context model reads one up to the last turn, the scored answer is the reply that follows.

Without `data` they are made here (`context_rl.tasks.leg_talk`). Rows of `data` hold the messages in one column, as
[{"role": "user", "content": ...}, ...] or ShareGPT's [{"from": "human", "value": ...}, ...]; the last message is the
assistant's, and is the reference reply. Replies are free text: that another one says the same is for a judge to say
(`--grader judge`); without one it has to be the same text after normalisation.
"""

from collections.abc import Sequence

from context_rl.tasks import leg_talk, symbolic
from context_rl.tasks.files import Row, Table
from context_rl.tasks.grading import grade_number_or_text
from context_rl.tasks.sources import read_source
from context_rl.tasks.splits import check, finish, make_task
from context_rl.tasks.types import DataError, Example, Task

MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
ROLES = {
    "user": "User", "human": "User",
    "assistant": "Assistant", "gpt": "Assistant", "bot": "Assistant", "model": "Assistant",
    "system": "System",
}  # fmt: skip
"""A message's role -> how it is written in the question."""

ROWS_NAMED = 3


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
    """Dialogues from files, or made here.

    Args:
        question_column: the column of the messages; recognised if None.

    Raises:
        DataError: no column of messages, a row that is no dialogue; else as for `qa.load`.
    """
    if answer_column is not None:
        raise DataError("the task 'dialogue' scores the last message; leave --answer_column out, or use --task qa")
    if data is None:
        return made_here(train_size=train_size, eval_size=eval_size, seed=seed)
    source = read_source(data, eval_data, lambda column: column == question_column or is_known(column))
    joined: list[str] = []
    train = read_tables(source.train, question_column, joined)
    held_out = None if source.held_out is None else read_tables(source.held_out, question_column, joined)
    notes = list(source.notes)
    if joined:
        named = ", ".join(joined[:ROWS_NAMED]) + (", ..." if len(joined) > ROWS_NAMED else "")
        notes.append(f"the lines of {len(joined)} replies are joined by spaces, for the scored answer is one ({named})")
    sizes = {"train_size": train_size, "eval_size": eval_size, "seed": seed}
    return make_task("dialogue", train, held_out, grade_number_or_text, **sizes, notes=notes)


def made_here(*, train_size: int | None, eval_size: int | None, seed: int) -> Task:
    """Dialogues about legs, graded by what the replies say; the held-out ones are the same for every seed."""
    if train_size is None or eval_size is None:
        raise DataError("the made-up dialogues have no end; give --train_questions and --eval_questions, or --data")
    train = leg_talk.examples(seed, train_size, False, f"dialogue/train/{seed}")
    held_out = leg_talk.examples(symbolic.HELD_OUT_STREAM, eval_size, True, "dialogue/test")
    return finish(Task("dialogue", train, held_out, leg_talk.same_facts), train_size, eval_size)


def is_known(column: str) -> bool:
    return column.strip().casefold() in MESSAGE_COLUMNS


def read_tables(tables: Sequence[Table], column: str | None, joined: list[str]) -> list[Example]:
    """The dialogues of all tables; ids of those whose reply had several lines are added to `joined`."""
    found = [(table, find_column(table, column)) for table in tables]
    examples = ((row, read_row(row, messages, joined)) for table, messages in found for row in table.rows)
    return [check(example, grade_number_or_text, row.where) for row, example in examples]


def find_column(table: Table, named: str | None) -> str:
    """The column of the messages.

    Raises:
        DataError: the one that was named is not there, or none or several are recognised.
    """
    found = [c for c in table.columns if (c == named if named is not None else is_known(c))]
    if len(found) == 1:
        return found[0]
    has = f"the columns are {', '.join(map(repr, table.columns))}"
    if named is not None:
        raise DataError(f"{table.name}: no column {named!r} (--question_column); {has}")
    what = f"{' or '.join(map(repr, found))} could be the messages" if found else "no column of messages recognised"
    hint = "name it with --question_column" + ("" if found else ", or use --task qa for questions and answers")
    raise DataError(f"{table.name}: {what}; {has}; {hint}")


def read_row(row: Row, column: str, joined: list[str]) -> Example:
    """The dialogue of a row: all messages but the last as the question, the last one as the answer.

    Raises:
        DataError: no list of messages, an unknown role, an empty message, or a last one that is not the assistant's.
    """
    messages = row.values.get(column)
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{row.where}: column {column!r} must hold a list of at least two messages; correct the row")
    turns = [read_message(row, number, message) for number, message in enumerate(messages, 1)]
    if turns[-1][0] != "Assistant":
        raise DataError(
            f"{row.where}: the last message is the {turns[-1][0].lower()}'s; it must be the assistant's, whose reply "
            "is the scored answer; correct or remove the row"
        )
    lines = [line.strip() for line in turns[-1][1].splitlines() if line.strip()]
    if len(lines) > 1:
        joined.append(row.id)
    return Example(row.id, "\n".join(f"{role}: {text}" for role, text in turns[:-1]), " ".join(lines))


def read_message(row: Row, number: int, message: object) -> tuple[str, str]:
    """(Role as it is written, text) of one message."""
    where = f"{row.where}, message {number}"
    if not isinstance(message, dict):
        raise DataError(f'{where}: must be an object such as {{"role": "user", "content": "..."}}; correct the row')
    # A Parquet column of both formats has all four keys in every message, half of them empty.
    role, text = (
        next((message[key] for key in keys if message.get(key) is not None), None)
        for keys in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise DataError(f"{where}: the role is {role!r}; it can be {', '.join(ROLES)}; correct or remove the row")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: has no text; fill it in or remove the row")
    return ROLES[role.lower()], text.strip()
