"""What is found out before the first score: is this the model, are these log-probs, and which route is the fastest that
is right?

The slow exact route (`prompt_logprobs`) is checked first, on its own: log-probs must be normalised and raw. Then every
faster route scores the same items and has to agree with it, twice, because the second time the prefix cache answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scorer.types import Item, ScorerError, Unscored, Usage
from scorer.vllm.asks import Ask, Routes, Send, read, score_ask, score_items
from scorer.vllm.replies import PROBE_TOP, Reply, answer_logprobs, normalisation_fault

PROBE_TEXT = """Question: What is 2 + 3?
Reasoning: 2 birds and 3 cats make 5. They are 5 animals, so the total is 5.
Answer: 5
"""
MAX_IDS = (1024, 64, 20)
"""Numbers of ids tried in one flat request, the largest first; vLLM's own default for --max-logprobs is 20."""
MOST_TOKENS = 1_000_000
"""An upper bound of any model's vocabulary, for the check that log-probs are normalised."""
TOLERANCE = {"float32": 1e-3}
TOLERANCE_ROUNDED = 0.1
"""Largest difference of a token's log-prob between two routes, in nats, for float32 and for 16-bit types: another batch
shape rounds otherwise. A row taken for its neighbour differs by whole nats."""
RAW_FLAG = "start the server with --logprobs-mode raw_logprobs"


@dataclass(frozen=True)
class Probe:
    """What the probe found.

    Attributes:
        routes: how to score from now on.
        exact: log-probs of the probe's items by the slow route, to compare replicas with.
        notes: why faster routes are not used, one line each.
    """

    routes: Routes
    exact: dict[Item, tuple[float, ...]]
    notes: tuple[str, ...]


def probe_items(ids: Sequence[int], max_length: int) -> list[Item]:
    """Items with answers of 1, 2 and 6 tokens; two prefixes of a whole number of cache blocks, one of them shared."""
    ids = list(ids)
    while len(ids) < 72:
        ids += ids
    ids = ids[: min(len(ids), max_length)]
    ends = [length for length in (5, 16, 32, 48, 64) if length + 6 <= len(ids)] or [max(1, len(ids) - 2)]
    items = [Item(tuple(ids[:end]), tuple(ids[end : end + 6])) for end in ends]
    items += [Item(tuple(ids[:end]), tuple(ids[end : end + 1])) for end in ends]
    items += [Item(tuple(ids[:end]), tuple(reversed(ids[end : end + 2]))) for end in ends]
    return list(dict.fromkeys(items))


def check_exact_route(ids: Sequence[int], send: Send, where: str) -> None:
    """Refuses an engine whose prompt log-probs are no log-probs.

    Raises:
        ScorerError: nothing comes back, or it is logits, or it does not fit the tokens sent.
    """
    item = Item(tuple(ids[:1]), tuple(ids[1:]))
    ask = score_ask(item, "prompt_logprobs")
    ask = Ask(ask.kind, ask.prompt, {**ask.params, "prompt_logprobs": PROBE_TOP}, ask.items)
    [(_, reply)] = send([ask], 0)
    if isinstance(reply, Unscored):
        raise ScorerError(f"{where} does not score: {reply.reason}")
    rows = reply.prompt_logprobs
    for row in rows[1:] if isinstance(rows, list) else []:
        values = [entry.get("logprob") for entry in row.values()] if isinstance(row, dict) else []
        fault = normalisation_fault(values, MOST_TOKENS) if values and all_floats(values) else None
        if fault:
            raise ScorerError(f"what {where} reports are no log-probs: {fault}; {RAW_FLAG}")
    scored = read(ask, reply, None, None)[0]
    if isinstance(scored, Unscored):
        raise ScorerError(f"{where} does not score: {scored.reason}")


def choose_routes(
    ids: Sequence[int],
    max_length: int,
    send: Send,
    version: str,
    *,
    dtype: str = "unknown",
    pinned: str | None = None,
) -> Probe:
    """The fastest routes that agree with the exact one on the probe's items.

    Args:
        ids: of `PROBE_TEXT`.
        version: vLLM's, which says which form of score-from-offset to try first.
        dtype: of the model, if known: float32 has to agree more closely.
        pinned: the only route to consider.

    Raises:
        ScorerError: the exact route fails, or the pinned route does not exist or disagrees.
    """
    items = probe_items(ids, max_length)
    exact = scores(items, Routes("prompt_logprobs"), send)
    for item, values in exact.items():
        if isinstance(values, Unscored):
            raise ScorerError(f"the exact route fails on an item of {len(item.prefix_ids)} tokens: {values.reason}")
    tolerance = TOLERANCE.get(dtype, TOLERANCE_ROUNDED)
    notes: list[str] = []

    def works(routes: Routes) -> bool:
        for turn in ("", " with a warm prefix cache"):
            fault = disagreement(exact, scores(items, routes, send), tolerance)
            if fault:
                name = "options" if routes.options else routes.answers
                notes.append(f"{name}{turn}: {fault}")
                return False
        return True

    flat = [Routes("offset_flat", max_ids=most) for most in MAX_IDS if accepts(most, ids, send)][:1]
    flat = flat or [Routes("offset_flat", max_ids=MAX_IDS[-1])]  # refused: the note will say why
    by_row = [Routes("offset_rows", max_ids=MAX_IDS[0])]
    candidates = {True: by_row, False: flat, None: by_row + flat}[takes_rows(version)]
    candidates = [c for c in candidates if pinned in (None, c.answers)]
    best = next((candidate for candidate in candidates if works(candidate)), Routes())
    if pinned not in (None, best.answers):
        raise ScorerError(f"the route {pinned!r} cannot be used here: {'; '.join(notes) or 'it is refused'}")
    options = Routes(best.answers, True, best.max_ids)
    return Probe(options if works(options) else best, exact, tuple(notes))


def scores(items: Sequence[Item], routes: Routes, send: Send) -> dict[Item, Any]:
    """The values of each item by these routes, or why there are none. Nothing is tried twice."""
    results = score_items(items, None, routes, send, Usage())
    return {
        item: result if isinstance(result, Unscored) else result.token_logprobs
        for item, result in zip(items, results, strict=True)
    }


def disagreement(exact: dict[Item, tuple[float, ...]], other: dict[Item, Any], tolerance: float) -> str | None:
    """The first score that is not the exact one's, with both numbers; None where all agree."""
    for item, values in exact.items():
        got = other[item]
        if isinstance(got, Unscored):
            return got.reason
        for position, (a, b) in enumerate(zip(values, got, strict=True)):
            if abs(a - b) > tolerance:
                return (
                    f"log-prob {b:.4f} where prompt_logprobs gives {a:.4f} (answer token {position} after "
                    f"{len(item.prefix_ids)} tokens)"
                )
    return None


def accepts(most: int, ids: Sequence[int], send: Send) -> bool:
    """Whether a flat request may name so many ids."""
    item = Item(tuple(ids[:2]), tuple(ids[2:4]))
    ask = score_ask(item, "offset_flat")
    ask = Ask(ask.kind, ask.prompt, {**ask.params, "prompt_logprob_token_ids": list(range(most))}, ask.items)
    [(_, reply)] = send([ask], 0)
    return isinstance(reply, Reply)


def takes_rows(version: str) -> bool | None:
    """Whether this vLLM takes one list of ids a row (from 0.32 on) or one for all; None: unknown."""
    numbers = version.split("+")[0].split(".")
    try:
        return (int(numbers[0]), int(numbers[1])) >= (0, 32)
    except (ValueError, IndexError):
        return None


def check_raw(
    ids: Sequence[int], send: Send, biased: Callable[[tuple[int, ...], int], float | None], where: str
) -> None:
    """Refuses an engine that reports log-probs after the sampler's settings.

    The lowest log-prob of the probe's text again, as that of a generated token which a bias of 100 makes certain. Raw
    log-probs are taken before the bias. In vLLM 0.31 prompt log-probs are raw in both modes, but a server in the other
    mode is one that somebody runs for sampling, such as a policy's.

    Args:
        biased: the log-prob of a generated token after a prompt under that bias; None where another was generated.
    """
    item = Item(tuple(ids[:1]), tuple(ids[1:]))
    [(_, reply)] = send([score_ask(item, "prompt_logprobs")], 0)
    values = answer_logprobs(reply.prompt_logprobs, item) if isinstance(reply, Reply) else reply
    if isinstance(values, Unscored):
        raise ScorerError(f"{where} does not score: {values.reason}")
    raw = min(values)
    position = 1 + values.index(raw)
    value = biased(tuple(ids[:position]), ids[position])
    if value is not None and raw < -1 and abs(value - raw) > 0.5:
        raise ScorerError(f"{where} reports processed log-probs ({value:.3f} for a raw {raw:.3f}); {RAW_FLAG}")


def all_floats(values: Sequence[object]) -> bool:
    """Whether all of them are floats, none of them NaN."""
    return all(isinstance(value, float) and not math.isnan(value) for value in values)
