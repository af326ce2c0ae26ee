"""Every string a model sees, and where a trace ends. Training and evaluation share these functions and nothing else.

Raw text (the default) is one template for both models:

    Question: {question}          <- the context model is prompted up to here ...
    Reasoning: {trace}            <- ... and writes this
    Answer: {answer}              <- the base model scores this, with or without the line above

The space before the answer belongs to the answer and the template ends in "Answer:": with byte-level tokenizers a
trailing space would be glued to the answer's first word and change its tokens in 99.8 % of cases.
"""

from collections.abc import Sequence

TRACE_PROMPT = "Question: {question}\nReasoning:"
BASE_PREFIX = "Question: {question}\nReasoning: {trace}\nAnswer:"
BASE_PREFIX_NO_TRACE = "Question: {question}\nAnswer:"
ANSWER_END = "\n"

STOP_STRINGS = ("\nQuestion:", "\nAnswer:")
"""Where a raw-text trace ends besides EOS: past these it would be playing the base model's part of the template."""


def base_prefix(question: str, trace: str | None) -> str:
    """The text the base model reads before the answer. `trace` None is "no help"; an empty trace is still a trace."""
    if trace is None:
        return BASE_PREFIX_NO_TRACE.format(question=question)
    return BASE_PREFIX.format(question=question, trace=trace)


def answer_text(answer: str) -> str:
    """The text whose log-prob is the score.

    It includes the end of the line. Without it, " 5" would also collect the probability of " 52" under a tokenizer
    that splits digits, and a trace that leads to 52 would be paid for the answer 5.
    """
    return f" {answer}{ANSWER_END}"


def parse_trace(completion: str, stop_strings: Sequence[str] = STOP_STRINGS) -> str:
    """The trace in a completion's text: up to the first stop string, without white space at either end."""
    ends = [completion.find(stop) for stop in stop_strings]
    end = min((e for e in ends if e >= 0), default=len(completion))
    return completion[:end].strip()
