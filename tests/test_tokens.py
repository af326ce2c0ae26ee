"""From text to the ids that are scored. A failure here means that some other span than the answer is being scored."""

import pytest
import tiny

from scorer.tokens import BoundaryError, encode_answer, encode_prefix

QUESTION = "Question: how many legs are there?\nReasoning: 2 birds have 4 legs.\nAnswer:"


@pytest.fixture(scope="module", params=[*tiny.ARCHITECTURES, "llama 2"])
def tokenizer(request: pytest.FixtureRequest):
    return (
        tiny.metaspace_tokenizer(always_space=True) if request.param == "llama 2" else tiny.tokenizer_of(request.param)
    )


def pieces(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", ["Ġ12", "Ċ"]),
        ("qwen2", ["Ġ", "1", "2", "Ċ"]),
        ("neox", ["▁12", "<0x0A>"]),
    ],
)
def test_the_answer_owns_its_space_and_its_line_end(architecture, expected):
    """Failure: the space has gone to the template, the digits are merged otherwise, or the line end is not scored."""
    tokenizer = tiny.tokenizer_of(architecture)
    assert pieces(tokenizer, encode_answer(tokenizer, "Answer:", " 12\n")) == expected


@pytest.mark.parametrize("answer", [" 5\n", " 52\n", " 1,200\n", " birds have legs\n", " \u00e9\u4e16\n", " 12"])
def test_answer_ids_are_the_joint_encoding_without_the_tail(tokenizer, answer):
    """Failure: ids of a text that stands alone, which SentencePiece tokenizers begin with a space of their own."""
    joint = tokenizer("Answer:" + answer, add_special_tokens=False)["input_ids"]
    tail = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    ids = encode_answer(tokenizer, "Answer:", answer)
    assert [*tail, *ids] == joint
    assert len(ids) == len(joint) - len(tail) > 0


@pytest.mark.parametrize("answer", [" 5\n", " 52\n", " birds have legs\n"])
def test_prefix_and_answer_side_by_side_are_the_tokens_of_the_whole_text(tokenizer, answer):
    """Failure: the base model would read other tokens than it would for the same text in one piece."""
    whole = tokenizer(QUESTION + answer)["input_ids"]
    assert [*encode_prefix(tokenizer, QUESTION), *encode_answer(tokenizer, "Answer:", answer)] == whole


def test_a_space_that_the_tokenizer_adds_to_a_lone_text_is_not_scored():
    """Failure: the answer is encoded by itself, and its first token is a space that the text does not have."""
    tokenizer = tiny.metaspace_tokenizer(always_space=True)
    alone = tokenizer(" 12\n", add_special_tokens=False)["input_ids"]
    assert pieces(tokenizer, alone) == ["▁", "▁12", "<0x0A>"]
    assert pieces(tokenizer, encode_answer(tokenizer, "Answer:", " 12\n")) == ["▁12", "<0x0A>"]


def test_an_ambiguous_boundary_is_refused_with_both_spellings():
    """Failure: tokens of the template are scored as part of the answer, or tokens of the answer are not scored."""
    tokenizer = tiny.merging_tokenizer()
    assert pieces(tokenizer, tokenizer("Answer: 3")["input_ids"]) == ["Answer:Ġ", "3"]
    with pytest.raises(BoundaryError) as caught:
        encode_answer(tokenizer, "Answer:", " 3")
    message = str(caught.value)
    assert "'Answer:' and ' 3'" in message
    assert "['Answer:Ġ', '3']" in message
    assert str(pieces(tokenizer, tokenizer("Answer:")["input_ids"])) in message
    assert "\n" not in message


def test_an_answer_without_tokens_is_refused(tokenizer):
    """Failure: an empty span, whose log-prob of 0 would be the best there is."""
    with pytest.raises(ValueError, match="the answer '' has no tokens"):
        encode_answer(tokenizer, "Answer:", "")


def test_the_prefix_begins_with_bos_where_the_tokenizer_has_one():
    """Failure: the base model reads texts without the BOS that it was trained with."""
    tokenizer = tiny.metaspace_tokenizer()
    ids = encode_prefix(tokenizer, QUESTION)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert list(ids[1:]) == tokenizer(QUESTION, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_prefix_has_no_bos_where_the_tokenizer_has_none(architecture):
    tokenizer = tiny.tokenizer_of(architecture)
    assert list(encode_prefix(tokenizer, QUESTION)) == tokenizer(QUESTION, add_special_tokens=False)["input_ids"]


def test_the_prefix_never_ends_in_an_eos_that_the_tokenizer_appends():
    """Failure: the answer is scored as what follows the end of a text."""
    appending = tiny.metaspace_tokenizer(append_eos=True)
    assert appending(QUESTION)["input_ids"][-1] == appending.eos_token_id
    assert encode_prefix(appending, QUESTION) == encode_prefix(tiny.metaspace_tokenizer(), QUESTION)
    assert encode_answer(appending, "Answer:", " 12\n") == encode_answer(tiny.metaspace_tokenizer(), "Answer:", " 12\n")


def test_an_eos_that_the_text_itself_spells_out_stays():
    """Failure: a chat template's own end of turn is taken away from the prefix."""
    tokenizer = tiny.byte_level_tokenizer(single_digits=True)
    assert encode_prefix(tokenizer, "Answer:" + tiny.EOS)[-1] == tokenizer.eos_token_id


def test_text_from_a_chat_template_gets_no_second_bos():
    """Failure: `<s><s>`, which no chat model has seen."""
    tokenizer = tiny.metaspace_tokenizer()
    ids = encode_prefix(tokenizer, "<s>Question: birds\nAnswer:", special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_ids_are_tuples_so_that_equal_items_are_equal(tokenizer):
    """Failure: items cannot be told to be the same, and every one of a group's equal traces is computed."""
    assert isinstance(encode_prefix(tokenizer, QUESTION), tuple)
    assert isinstance(encode_answer(tokenizer, "Answer:", " 5\n"), tuple)
