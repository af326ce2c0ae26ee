"""What vLLM says to one request: pure functions from a reply to a score, or to the reason why there is none.

Nothing is taken on trust. An HTTP 200 can carry another prompt's rows, rows that were never written, or the -9999 that
stands for minus infinity, and a missing log-prob read as 0.0 would be probability 1, the largest reward there is. So
ids are compared at every position, values are checked, and whatever does not fit is `Unscored` with the reason.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from scorer.types import Greedy, Item, Unscored

NEGATIVE_INFINITY = -9999.0
"""What vLLM writes for minus infinity, which JSON lacks."""
ROUNDING = 1e-6
"""Largest positive log-prob that passes for a rounded 0."""
PROBE_TOP = 20
"""Log-probs a position in the start-up check: vLLM's default for `--max-logprobs`."""

Prompt = tuple[int, ...]
Values = tuple[float, ...]


@dataclass(frozen=True)
class Reply:
    """One request's answer in one form, whichever way it came. Nothing in it has been checked.

    Attributes:
        prompt_ids: the tokens that the engine read, as it says.
        prompt_logprobs: a row a prompt token: {str(id): {"logprob", "rank"}}; the first is None, it has no context.
        offset_logprobs: [row][column], see `scorer.vllm.asks.offset_columns`; None where the engine dropped them.
        token_ids, finish_reason: what was generated.
        first_logprobs: at the first generated position, {str(id): log-prob}.
        cached_tokens: of the prompt, read from the prefix cache; None where the engine does not say.
    """

    prompt_ids: Any
    prompt_logprobs: Any = None
    offset_logprobs: Any = None
    token_ids: Any = None
    finish_reason: Any = None
    first_logprobs: Any = None
    cached_tokens: Any = None


class BadReply(Exception):
    """What a reply has in place of what was asked for. `fault` is one of `scorer.types.FAULTS`."""

    def __init__(self, fault: str, reason: str):
        super().__init__(reason)
        self.fault = fault

    def unscored(self, where: str = "") -> Unscored:
        """The same as a result."""
        return Unscored(f"{where}{self}", self.fault)


def check_value(value: object, token_id: int) -> float:
    """`value` as the log-prob of `token_id`: finite, natural logarithm, at most 0.

    Raises:
        BadReply: it cannot be one.
    """
    what = f"log-prob of token id {token_id} is"
    if value in ("-inf", -math.inf) or (isinstance(value, int | float) and value <= NEGATIVE_INFINITY):
        raise BadReply("minus_infinity", f"{what} {value} (minus infinity)")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(min(value, 1.0)):
        raise BadReply("not_a_number", f"{what} {value!r:.80}")
    if value > ROUNDING:
        raise BadReply("impossible", f"{what} {value}, above 0")
    return min(float(value), 0.0)


def token_logprob(row: object, token_id: int) -> float:
    """The log-prob of `token_id` in one row of a reply's `prompt_logprobs`: {str(id): {"logprob", "rank"}}.

    Raises:
        BadReply: the row is for another token, or its value cannot be a log-prob.
    """
    if not isinstance(row, dict):
        raise BadReply("missing", f"no log-prob but {row!r:.80}")
    entry = row.get(str(token_id))
    if not isinstance(entry, dict):
        raise BadReply("ids", f"sent token id {token_id}, got the log-prob of {', '.join(row) or 'nothing'}"[:160])
    value, rank = check_value(entry.get("logprob"), token_id), entry.get("rank")
    # At least `rank` tokens are as likely as this one, so p <= 1 / rank. Rows that were never written break this.
    if not isinstance(rank, int) and value > -ROUNDING:
        raise BadReply("impossible", f"log-prob of token id {token_id} is {value} without a rank")
    if isinstance(rank, int) and (rank < 1 or value > -math.log(rank) + 0.01):
        raise BadReply("impossible", f"log-prob of token id {token_id} is {value}, which its rank {rank} contradicts")
    return value


def answer_logprobs(prompt_logprobs: object, item: Item) -> Values | Unscored:
    """The answer's log-probs in a reply's `prompt_logprobs`: one row a token of prefix + answer; the first is null.

    All rows must name the ids that were sent, not the answer's alone: the traces of a group share their answer, so a
    reply to another trace would fit there.
    """
    prompt = item.prefix_ids + item.answer_ids
    if not isinstance(prompt_logprobs, list):
        return Unscored(f"the reply has no prompt_logprobs but {prompt_logprobs!r:.80}", "missing")
    if len(prompt_logprobs) != len(prompt):
        return Unscored(f"{len(prompt_logprobs)} rows of log-probs for {len(prompt)} tokens", "rows")
    start = len(item.prefix_ids)
    values = []
    for position in range(1, len(prompt)):
        row, token_id = prompt_logprobs[position], prompt[position]
        try:
            if position >= start:
                values.append(token_logprob(row, token_id))
            elif not isinstance(row, dict) or str(token_id) not in row:
                raise BadReply("ids", f"sent token id {token_id}, got {row!r:.80}")
        except BadReply as bad:
            return bad.unscored(f"position {position} of {len(prompt)} (answer from {start}): ")
    return tuple(values)


def offset_logprobs(rows: object, columns: Sequence[Sequence[int]], answer_ids: Sequence[int]) -> Values | Unscored:
    """The answer's log-probs in a reply to score-from-offset: one row a token of the answer.

    Args:
        rows: [row][column] of log-probs, a NumPy array or lists.
        columns: the token ids that the columns of each row stand for.
        answer_ids: the token whose log-prob is wanted in each row.
    """
    if isinstance(rows, np.ndarray):
        if (sound := sound_values(rows, columns, answer_ids)) is not None:
            return sound
        rows = rows.tolist()  # something is wrong: look closely
    if not isinstance(rows, list):
        return Unscored(f"the reply has no scores but {rows!r:.80}", "missing")
    if len(rows) != len(answer_ids):
        return Unscored(f"{len(rows)} rows of log-probs for an answer of {len(answer_ids)} tokens", "rows")
    values = []
    for position, (row, ids, token_id) in enumerate(zip(rows, columns, answer_ids, strict=True)):
        try:
            if not isinstance(row, list) or len(row) != len(ids):
                seen = len(row) if isinstance(row, list) else repr(row)[:80]
                raise BadReply("rows", f"{seen} log-probs where {len(ids)} ids were sent")
            values.append(check_value(row[list(ids).index(token_id)], token_id))
            # Different tokens at one position: their probabilities cannot exceed 1 together.
            check_together(row)
        except BadReply as bad:
            return bad.unscored(f"answer token {position} of {len(answer_ids)}: ")
    return tuple(values)


def sound_values(rows: np.ndarray, columns: Sequence[Sequence[int]], answer_ids: Sequence[int]) -> Values | None:
    """What `offset_logprobs` returns where nothing is wrong, at a tenth of its cost; None otherwise."""
    if rows.ndim != 2 or rows.dtype.kind != "f" or rows.shape != (len(columns), len(columns[0])):
        return None
    chosen = [ids.index(token_id) for ids, token_id in zip(columns, answer_ids, strict=True)]
    picked = rows[np.arange(len(chosen)), chosen]
    totals = np.exp(np.minimum(rows, 1.0)).sum(1)
    # Written so that a NaN fails every comparison.
    if not (np.all(picked <= ROUNDING) and np.all(picked > NEGATIVE_INFINITY) and np.all(totals <= 1.01)):
        return None
    return tuple(np.minimum(picked, 0.0).tolist())


def check_together(values: Iterable[object]) -> None:
    """Different tokens at one position: their probabilities cannot exceed 1 together."""
    known = [max(min(value, 1.0), -1e4) for value in values if isinstance(value, int | float) and value == value]
    if (total := math.fsum(map(math.exp, known))) > 1.01:
        raise BadReply("impossible", f"{len(known)} tokens have probability {total:.3f} together")


def option_logprob(first_logprobs: object, token_id: int) -> Values | Unscored:
    """The log-prob of a one-token answer at the first generated position."""
    if not isinstance(first_logprobs, Mapping) or str(token_id) not in first_logprobs:
        return Unscored(f"no log-prob of the option {token_id} but {first_logprobs!r:.80}", "missing")
    try:
        value = check_value(first_logprobs[str(token_id)], token_id)
        check_together(first_logprobs.values())
        return (value,)
    except BadReply as bad:
        return bad.unscored("option: ")


def greedy_answer(reply: Reply, greedy: Greedy, tokenizer: PreTrainedTokenizerBase) -> str | Unscored:
    """The text of a greedy answer before `greedy.stop`, decoded here from its token ids.

    vLLM's own text is not used: after a prompt that is no valid UTF-8, vLLM 0.31 puts the prompt's text in front of it,
    and would find the stop string there.
    """
    ended, token_ids = reply.finish_reason, reply.token_ids
    if not isinstance(token_ids, list) or not all(type(token_id) is int for token_id in token_ids):
        return Unscored(f"greedy answer: the reply has token ids {token_ids!r:.80}", "garbled")
    if ended not in ("stop", "length"):
        return Unscored(f"greedy answer: ended with {ended!r:.80}", "garbled")
    if ended == "length" and len(token_ids) != greedy.max_new_tokens:
        cut = f"cut at {len(token_ids)} tokens, {greedy.max_new_tokens} were asked for"
        return Unscored(f"greedy answer: {cut}", "rows")
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    if ended == "stop" and greedy.stop not in text and not set(token_ids[-1:]) & set(tokenizer.all_special_ids):
        return Unscored(f"greedy answer: ended before {greedy.stop!r} and before the end of text: {text!r}", "garbled")
    return text.partition(greedy.stop)[0]


def check_prompt(reply: Reply, prompt: Prompt) -> None:
    """Raises BadReply where the engine read other tokens than those sent."""
    if not isinstance(reply.prompt_ids, list) or tuple(reply.prompt_ids) != prompt:
        sent = list(prompt)
        raise BadReply("ids", f"the result is for another prompt: {reply.prompt_ids!r:.80} (sent {sent!r:.80})")


def normalisation_fault(values: Iterable[float], vocabulary: int, top: int = PROBE_TOP) -> str | None:
    """Why the likeliest tokens' values at one position cannot be log-probs; None where they can.

    The `top` largest probabilities sum to at most 1. Each of the others is at most the smallest of them, so with
    `vocabulary` times that one (an upper bound will do) the sum reaches 1. Logits miss this window.
    """
    largest = sorted(values, reverse=True)[:top]
    if not largest or largest[0] > ROUNDING:
        return f"the largest of them is {largest[0] if largest else None}"
    total = sum(map(math.exp, largest))
    if total > 1.01:
        return f"the largest {len(largest)} of them sum up to probability {total:.3f}"
    if total + vocabulary * math.exp(largest[-1]) < 0.99:
        return (
            f"the largest {len(largest)} of them sum up to probability {total:.3g}, which leaves too much for the rest"
        )
    return None
