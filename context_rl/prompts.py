"""Every string a model sees, and where a trace ends. Training and evaluation share these functions and nothing else.

Raw text (the default) is one template for both models:

    Question: {question}          <- the context model is prompted up to here ...
    Reasoning: {trace}            <- ... and writes this
    Answer: {answer}              <- the base model scores this, with or without the line above

The space before the answer belongs to the answer and the template ends in "Answer:": with byte-level tokenizers a
trailing space would be glued to the answer's first word and change its tokens in 99.8 % of cases.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

TRACE_PROMPT = "Question: {question}\nReasoning:"
BASE_PREFIX = "Question: {question}\nReasoning: {trace}\nAnswer:"
BASE_PREFIX_NO_TRACE = "Question: {question}\nAnswer:"
ANSWER_TAIL = "Answer:"
ANSWER_END = "\n"

TRACE_INSTRUCTION = (
    "Write the reasoning that leads to the answer of the question below, step by step. Another reader will see your "
    "reasoning and give the answer.\n\nQuestion: {question}"
)
ANSWER_INSTRUCTION = "Question: {question}\n\nGive only the answer."
ANSWER_INSTRUCTION_WITH_TRACE = "Question: {question}\n\nReasoning: {trace}\n\nGive only the answer."

JUDGE_HARD = (
    "Question: {question}\nReference answer: {reference}\nReply: {reply}\n"
    "Does the reply say the same as the reference answer? Answer yes or no."
)
JUDGE_SOFT = (
    "Question: {question}\nReference answer: {reference}\nReply: {reply}\n"
    "How well does the reply agree with the reference answer, from 0 (not at all) to 10 (fully)? "
    "Answer with one number."
)

STOP_STRINGS = ("\nQuestion:", "\nAnswer:")
"""Where a raw-text trace ends besides EOS: past these it would be playing the base model's part of the template."""


def trace_text(question: str) -> str:
    """The context model's prompt as raw text."""
    return TRACE_PROMPT.format(question=question)


def trace_messages(question: str) -> list[dict[str, str]]:
    """The context model's prompt as messages for its chat template."""
    return [{"role": "user", "content": TRACE_INSTRUCTION.format(question=question)}]


def base_prefix(question: str, trace: str | None) -> str:
    """The text the base model reads before the answer. `trace` None is "no help"; an empty trace is still a trace."""
    if trace is None:
        return BASE_PREFIX_NO_TRACE.format(question=question)
    return BASE_PREFIX.format(question=question, trace=trace)


def base_chat_prefix(tokenizer: PreTrainedTokenizerBase, question: str, trace: str | None) -> str:
    """The same through the base model's chat template; its turn begins with the words that end the raw template."""
    if trace is None:
        content = ANSWER_INSTRUCTION.format(question=question)
    else:
        content = ANSWER_INSTRUCTION_WITH_TRACE.format(question=question, trace=trace)
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + ANSWER_TAIL


def judge_messages(kind: str, question: str, reference: str, reply: str) -> list[dict[str, str]]:
    """What a judge is asked about a reply, as messages: `kind` is "hard" (yes or no) or "soft" (a number, 0 to 10)."""
    template = {"hard": JUDGE_HARD, "soft": JUDGE_SOFT}[kind]
    return [{"role": "user", "content": template.format(question=question, reference=reference, reply=reply)}]


def answer_text(answer: str, end: str = ANSWER_END) -> str:
    """The text whose log-prob is the score: the answer with the space before it and the `end` that closes it.

    Without the end, " 5" would also collect the probability of " 52" under a tokenizer that splits digits, and a trace
    that leads to 52 would be paid for the answer 5. In a chat the end is the model's EOS.
    """
    return f" {answer}{end}"


def parse_trace(completion: str, stop_strings: Sequence[str] = STOP_STRINGS) -> str:
    """The trace in a completion's text: up to the first stop string, without white space at either end."""
    ends = [completion.find(stop) for stop in stop_strings]
    end = min((e for e in ends if e >= 0), default=len(completion))
    return completion[:end].strip()
