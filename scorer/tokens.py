"""From text to the token ids that are scored. Ids are concatenated, never re-tokenised as one text after decoding."""

from transformers import PreTrainedTokenizerBase


class BoundaryError(ValueError):
    """The prefix and the answer merge into other tokens when they stand side by side."""


def encode_prefix(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = True) -> tuple[int, ...]:
    """Ids of the text before the answer, with the tokenizer's BOS if it has one (`special_tokens`), never its EOS.

    Args:
        special_tokens: False for text from a chat template, which spells its special tokens out.
    """
    ids = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    if special_tokens and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return tuple(ids)


def encode_answer(tokenizer: PreTrainedTokenizerBase, tail: str, answer: str) -> tuple[int, ...]:
    """Ids of `answer` as it stands after `tail`, the fixed text that ends every prefix (such as "Answer:").

    Encoded once per answer, so every trace of a group is scored on the same ids. Encoding the pair and cutting the
    tail off also serves SentencePiece tokenizers, which put a space of their own before a text that stands alone.

    Raises:
        BoundaryError: the tail's own tokens change when the answer follows; both spellings are in the message.
        ValueError: the answer has no tokens.
    """
    alone = tokenizer(tail, add_special_tokens=False)["input_ids"]
    joint = tokenizer(tail + answer, add_special_tokens=False)["input_ids"]
    if joint[: len(alone)] != alone:
        shown = tokenizer.convert_ids_to_tokens(joint)[: len(alone) + 2]
        raise BoundaryError(
            f"ambiguous token boundary between {tail!r} and {answer!r}: together they are {shown}, "
            f"but {tail!r} alone is {tokenizer.convert_ids_to_tokens(alone)}"
        )
    if len(joint) == len(alone):
        raise ValueError(f"the answer {answer!r} has no tokens")
    return tuple(joint[len(alone) :])
