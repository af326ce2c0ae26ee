"""The text that each model sees. A failure means that training and evaluation, or q and the base model, read different
templates, or that a trace carries text over which q should have no say."""

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from context_rl import prompts

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_base_model_reads_this_with_and_without_a_trace():
    """Failure: a template changed, so that stored scores and published numbers are of another text."""
    assert prompts.base_prefix("How many?", "2 + 3 = 5.") == "Question: How many?\nReasoning: 2 + 3 = 5.\nAnswer:"
    assert prompts.base_prefix("How many?", None) == "Question: How many?\nAnswer:"


def test_an_empty_trace_is_not_no_trace():
    """Failure: a policy that writes nothing is scored as if it had not been asked, at the baseline."""
    assert prompts.base_prefix("How many?", "") == "Question: How many?\nReasoning: \nAnswer:"
    assert prompts.base_prefix("How many?", "") != prompts.base_prefix("How many?", None)


@given(st.text(), st.text())
def test_what_q_is_prompted_with_is_how_the_base_models_text_begins(question, trace):
    """Failure: q continues another text than the one its trace is put into."""
    assert prompts.base_prefix(question, trace) == prompts.trace_text(question) + f" {trace}\nAnswer:"


def test_braces_in_a_question_or_a_trace_are_text():
    """Failure: `str.format` is applied to what a user or a model wrote."""
    assert prompts.base_prefix("{trace}?", "{question} {0}") == "Question: {trace}?\nReasoning: {question} {0}\nAnswer:"
    assert prompts.trace_text("{x}") == "Question: {x}\nReasoning:"
    assert "{trace} {x}" in prompts.trace_messages("{trace} {x}")[0]["content"]


@pytest.mark.parametrize("trace", [None, "", "2 + 3 = 5."])
def test_every_prefix_ends_in_the_tail_that_answers_are_encoded_after(trace):
    """Failure: the answer's token ids belong to another boundary than the one they stand at."""
    assert prompts.base_prefix("How many?", trace).endswith("\n" + prompts.ANSWER_TAIL)
    assert not prompts.ANSWER_TAIL.endswith(" ")


def test_the_scored_text_has_the_space_before_and_the_line_end_after_it():
    """Failure: " 5" without its end also collects the probability of " 52"."""
    assert prompts.answer_text("5") == " 5\n"
    assert prompts.answer_text("5", "<|endoftext|>") == " 5<|endoftext|>"
    assert prompts.answer_text("5", "") == " 5"


def test_a_chat_prefix_is_the_models_template_and_ends_in_the_same_tail():
    """Failure: no generation prompt, or answer ids at another boundary than the one they were encoded for."""
    tokenizer = tiny.byte_level_tokenizer(single_digits=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert prompts.base_chat_prefix(tokenizer, "How many?", "{x} = 5.") == (
        "<|user|>Question: How many?\n\nReasoning: {x} = 5.\n\nGive only the answer.<|endoftext|><|assistant|>Answer:"
    )
    without = prompts.base_chat_prefix(tokenizer, "How many?", None)
    assert without == "<|user|>Question: How many?\n\nGive only the answer.<|endoftext|><|assistant|>Answer:"
    assert prompts.base_chat_prefix(tokenizer, "How many?", "") != without


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (" 2 birds have 4 legs.\nAnswer: 4\n", "2 birds have 4 legs."),
        (" 2 birds have 4 legs.\nQuestion: next\nAnswer: 4", "2 birds have 4 legs."),
        (" a\nAnswer: 4\nQuestion: b", "a"),
        (" a\nQuestion: b\nAnswer: 4", "a"),
        (" no end here", "no end here"),
        (" \n two lines\n of it \n", "two lines\n of it"),
        ("\nAnswer: 4", ""),
        ("", ""),
        (" the Answer: 4 is in the line", "the Answer: 4 is in the line"),
        (" a\nAnswers vary", "a\nAnswers vary"),
    ],
)
def test_a_trace_ends_before_the_earliest_stop_string_without_outer_white_space(completion, expected):
    """Failure: the base model reads an answer that q wrote in the base model's own place."""
    assert prompts.parse_trace(completion) == expected


def test_the_earliest_stop_string_wins_whatever_their_order():
    assert prompts.parse_trace("abcdef", ("e", "c")) == "ab"
    assert prompts.parse_trace("abcdef", ("c", "e")) == "ab"


def test_without_stop_strings_only_white_space_goes():
    assert prompts.parse_trace(" a\nAnswer: 4\n", ()) == "a\nAnswer: 4"


@given(st.text(alphabet="abA \n:", max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_a_parsed_trace_holds_no_stop_string_and_parses_to_itself(completion, stops):
    """Failure: traces read back from a file and scored again are other traces."""
    trace = prompts.parse_trace(completion, stops)
    assert not any(stop in trace for stop in stops)
    assert trace == trace.strip()
    assert prompts.parse_trace(trace, stops) == trace
    assert trace in completion
