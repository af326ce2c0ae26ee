"""What a vLLM server's reply says: pure functions from JSON to a score, or to the reason why there is none.

Nothing is taken on trust. An HTTP 200 can carry another prompt's rows, rows that were never written, or the -9999 that
stands for minus infinity, and a missing log-prob read as 0.0 would be probability 1, the largest reward there is. So
ids are compared at every position, values are checked, and whatever does not fit is `Unscored` with the reason.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from scorer.types import Greedy, Item, Score, Unscored

NEGATIVE_INFINITY = -9999.0
"""What vLLM writes for minus infinity, which JSON lacks."""
ROUNDING = 1e-6
"""Largest positive log-prob that passes for a rounded 0."""

Prompt = tuple[int, ...]
Choice = dict[str, Any]
"""One prompt's part of a reply: {"index", "prompt_token_ids", "prompt_logprobs", "text", "token_ids", ...}."""

PROBE_TOP = 20
"""Log-probs a position in the start-up check: vLLM's default for `--max-logprobs`."""


class BadReply(Exception):
    """What a server's reply has in place of what was asked for. Becomes an `Unscored`."""


def token_logprob(row: object, token_id: int) -> float:
    """The log-prob of `token_id` in one row of a reply's `prompt_logprobs`: {str(id): {"logprob", "rank"}}.

    Returns:
        A finite value <= 0, natural logarithm.

    Raises:
        BadReply: the row is for another token, or its value cannot be a log-prob.
    """
    if not isinstance(row, dict):
        raise BadReply(f"no log-prob but {row!r:.80}")
    entry = row.get(str(token_id))
    if not isinstance(entry, dict):
        raise BadReply(f"sent token id {token_id}, got the log-prob of {', '.join(row) or 'nothing'}"[:160])
    value, rank = entry.get("logprob"), entry.get("rank")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadReply(f"log-prob of token id {token_id} is {value!r:.80}")
    if value <= NEGATIVE_INFINITY:
        raise BadReply(f"log-prob of token id {token_id} is {value} (minus infinity)")
    if value > ROUNDING:
        raise BadReply(f"log-prob of token id {token_id} is {value}, above 0")
    # At least `rank` tokens are as likely as this one, so p <= 1 / rank. Rows that were never written break this.
    if isinstance(rank, int) and (rank < 1 or value > -math.log(rank) + 0.01):
        raise BadReply(f"log-prob of token id {token_id} is {value}, which its rank {rank} contradicts")
    return min(float(value), 0.0)


def answer_logprobs(prompt_logprobs: object, item: Item) -> Score | Unscored:
    """The score in a reply's `prompt_logprobs`: one row a token of prefix + answer; the first is null (no context).

    All rows must name the ids that were sent, not the answer's alone: the traces of a group share their answer, so a
    reply to another trace would fit there.
    """
    prompt = item.prefix_ids + item.answer_ids
    if not isinstance(prompt_logprobs, list):
        return Unscored(f"the reply has no prompt_logprobs but {prompt_logprobs!r:.80}")
    if len(prompt_logprobs) != len(prompt):
        return Unscored(f"{len(prompt_logprobs)} rows of log-probs for {len(prompt)} tokens")
    start = len(item.prefix_ids)
    values = []
    for position in range(1, len(prompt)):
        row, token_id = prompt_logprobs[position], prompt[position]
        try:
            if position >= start:
                values.append(token_logprob(row, token_id))
            elif not isinstance(row, dict) or str(token_id) not in row:
                raise BadReply(f"sent token id {token_id}, got {row!r:.80}")
        except BadReply as bad:
            return Unscored(f"position {position} of {len(prompt)} (answer from {start}): {bad}")
    return Score(tuple(values))


def greedy_answer(choice: Choice, greedy: Greedy) -> str | Unscored:
    """The text of a greedy answer before `greedy.stop`, from one choice of a reply."""
    text, ended, token_ids = choice.get("text"), choice.get("finish_reason"), choice.get("token_ids")
    if not isinstance(text, str) or not isinstance(token_ids, list):
        return Unscored(f"greedy answer: the reply has text {text!r:.80} and token ids {token_ids!r:.80}")
    if ended not in ("stop", "length"):
        return Unscored(f"greedy answer: ended with {ended!r:.80}")
    if ended == "length" and len(token_ids) != greedy.max_new_tokens:
        return Unscored(f"greedy answer: cut at {len(token_ids)} tokens, {greedy.max_new_tokens} were asked for")
    return text.partition(greedy.stop)[0]


def choices_of(reply: object, prompts: Sequence[Prompt]) -> list[Choice | Unscored]:
    """One choice of a /v1/completions reply for each prompt, found by its `index` and checked by its prompt's ids."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list):
        return [Unscored(f"the reply has no choices: {reply!r:.120}")] * len(prompts)
    by_index: dict[int, list[Choice]] = {}
    for choice in choices:
        if isinstance(choice, dict) and isinstance(choice.get("index"), int):
            by_index.setdefault(choice["index"], []).append(choice)
    results: list[Choice | Unscored] = []
    for index, prompt in enumerate(prompts):
        found = by_index.get(index, [])
        if len(found) != 1:
            results.append(Unscored(f"{len(found)} results for prompt {index} of {len(prompts)} in one request"))
        elif found[0].get("prompt_token_ids") != list(prompt):
            seen = found[0].get("prompt_token_ids")
            results.append(Unscored(f"the result is for another prompt: {seen!r:.80} (sent {list(prompt)!r:.80})"))
        else:
            results.append(found[0])
    return results


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
