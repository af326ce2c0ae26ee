"""A task with its documents, and what q is asked about each of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2.meta import find_undeclared_variables
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import env

from context_rl.tasks.gsm8k import CALCULATOR
from context_rl.tasks.types import DataError
from eval.harness.placing import without_cue

Doc = Mapping[str, Any]


@dataclass(frozen=True)
class LoadedTask:
    """A task of the harness with the documents it is evaluated on.

    Attributes:
        name: as the harness calls it; with a document's number the key of a trace.
        split: the documents', such as "test".
        task: the harness's own object.
        docs: the first `limit` documents, as the task's process_docs returns them; a document's id is its number.
    """

    name: str
    split: str
    task: ConfigurableTask = field(repr=False)
    docs: list[Doc] = field(repr=False)


@dataclass(frozen=True)
class Question:
    """What q is asked, and what is known about the answer.

    Attributes:
        question: without few-shot examples, cue or options.
        answer: the right one as text; `solution` the reasoning to it, where the data has one.
    """

    doc_id: int
    question: str
    answer: str
    solution: str | None = None


def questions(task: LoadedTask) -> list[Question]:
    """One question a document, in their order.

    GSM8K: the question, the final number, the worked solution without its last line and calculator marks. HellaSwag:
    the context, the right ending. Any other task: its doc_to_text without a cue line at the end ("Answer:") and without
    "Question:" before it, which the trace prompt brings itself; its target, or the right option.

    Raises:
        DataError: a document without its label.
    """
    return [question(task, doc_id, doc) for doc_id, doc in enumerate(task.docs)]


def question(task: LoadedTask, doc_id: int, doc: Doc) -> Question:
    where = f"{task.name}/{task.split}/{doc_id}"
    missing = sorted(name for name in target_fields(task.task.config.doc_to_target, doc) if doc.get(name, "") is None)
    if missing and "None" in str(task.task.doc_to_target(doc)):
        raise DataError(f"{where}: the document has no {' and no '.join(missing)}, which its label is made of")
    if task.name.startswith("gsm8k") and {"question", "answer"} <= doc.keys():
        return gsm8k_question(where, doc_id, doc)
    answer = right_answer(task.task, where, doc)
    if task.name == "hellaswag":
        return Question(doc_id, doc["query"], answer)
    text = str(task.task.doc_to_text(doc))
    return Question(doc_id, without_cue(text).strip().removeprefix("Question:").strip(), answer)


def target_fields(template: object, doc: Doc) -> Iterator[str]:
    """The document's fields that the label is made of. The harness prints a missing one as the answer "None"."""
    if isinstance(template, str):
        yield from [template] if template in doc else find_undeclared_variables(env.parse(template))


def gsm8k_question(where: str, doc_id: int, doc: Doc) -> Question:
    rationale, mark, number = doc["answer"].rpartition("####")
    number = number.replace(",", "").strip()
    if not mark or not number:
        raise DataError(f"{where}: the answer has no number after '####': {doc['answer']!r:.80}")
    return Question(doc_id, doc["question"], number, CALCULATOR.sub("", rationale).strip())


def right_answer(task: ConfigurableTask, where: str, doc: Doc) -> str:
    """The target as text. For a label that names no option the harness only warns, and counts the answer as wrong."""
    target = task.doc_to_target(doc)
    first = target[0] if isinstance(target, list) and target else target
    if task.OUTPUT_TYPE == "multiple_choice":
        options = task.doc_to_choice(doc)
        for gold in target if isinstance(target, list) else [target]:
            if not (gold in options if isinstance(gold, str) else isinstance(gold, int) and 0 <= gold < len(options)):
                raise DataError(f"{where}: label {gold!r} is none of the {len(options)} options")
    if isinstance(first, int) and task.config.doc_to_choice is not None:
        first = task.doc_to_choice(doc)[first]
    if not isinstance(first, str | int | float) or not str(first).strip():
        raise DataError(f"{where}: the document has no label, but {target!r}")
    return str(first).strip()
