"""Where a trace goes in the harness's prompts: GSM8K's left, HellaSwag's right.

    Question: How many ...?        Reasoning: {trace}
    Reasoning: {trace}             Removing ice from car: Then, the man
    Answer:

The few-shot examples before the document's own part stay as they are.
"""

from collections.abc import Mapping
from typing import Any

from context_rl.tasks.types import DataError


def with_trace(context: str, query: str, trace: str | None) -> str:
    """The prompt with the trace in it; None changes nothing, an empty trace is still a trace.

    If the query ends in a cue line ("Answer:"), the line "Reasoning: {trace}" goes before that line, which is
    `prompts.BASE_PREFIX`; else it goes before the query, for what is scored must follow the query directly.

    Args:
        context: the whole prompt that the harness built.
        query: its end, the document's own part; what stands before it is left as it is.

    Raises:
        DataError: the context does not end with the query.
    """
    if trace is None:
        return context
    if not context.endswith(query):
        raise DataError(f"the prompt does not end with the question, so a trace has no place in it: {context[-80:]!r}")
    before = context[: len(context) - len(query)]
    above, newline, last = query.rpartition("\n")
    if not is_cue(last):
        above, newline, last = "", "", query
    return f"{before}{above}{newline}Reasoning: {trace}\n{last}"


def without_cue(text: str) -> str:
    """The text without its last line where that is a cue such as "Answer:" below something else."""
    above, newline, last = text.rpartition("\n")
    return above if newline and is_cue(last) and above.strip() else text


def is_cue(line: str) -> bool:
    """Whether a line asks for what comes next."""
    return line.rstrip().endswith(":")


def own_part(task: Any, doc: Mapping[str, Any]) -> str:
    """The document's own part of a prompt without an answer, made by the harness's own code."""
    messages = task.build_qa_turn(
        q=task.doc_to_text(doc),
        c=task.doc_to_choice(doc) if task.config.doc_to_choice else None,
        gen_prefix=task.doc_to_prefix(doc),
        tgt_delim=task.config.target_delimiter,
        few_delim="",
    )
    return "".join(message.to_text() for message in messages)
