"""Spoilt versions of a trace: what a reward should pay less for. Pure functions of text and a seed.

shuffled    the trace of another question: right in form, of no use
truncated   its first half of words
perturbed   every number changed a little; where there is none, a tenth of the words left out
empty       nothing
"""

import random
import re
from collections.abc import Sequence

VARIANTS = ("shuffled", "truncated", "perturbed", "empty")

NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?")
"""1,200 and 1,200.5 are one number each; "1,2,3" is three."""

DIGITS_CHANGED = 18
"""Of a longer number only the last digits change: a trace may hold thousands of digits, which `int` refuses."""


def truncated(trace: str) -> str:
    """The first half of the words (rounded down), with the white space between them."""
    words = list(re.finditer(r"\S+", trace))
    half = len(words) // 2
    return trace[: words[half - 1].end()] if half else ""


def perturbed(trace: str, seed: int = 0) -> str:
    """Every number moved up or down by at most a tenth (at least by one in its last place), none below 0.

    A trace without numbers loses a tenth of its words, at least one. The same trace and seed give the same text.
    """
    rng = random.Random(f"{seed}/{trace}")
    if NUMBER.search(trace):
        return NUMBER.sub(lambda match: moved(match.group(), rng), trace)
    words = re.findall(r"\S+\s*", trace)
    lost = set(rng.sample(range(len(words)), max(1, len(words) // 10))) if words else set()
    return "".join(word for place, word in enumerate(words) if place not in lost).strip()


def moved(number: str, rng: random.Random) -> str:
    """Another number near this one, written as it was: commas, decimal places, leading zeros."""
    whole, point, decimals = number.replace(",", "").partition(".")
    digits = whole + decimals
    head, tail = digits[:-DIGITS_CHANGED], digits[-DIGITS_CHANGED:]
    value = int(tail)
    change = rng.randint(1, max(1, value // 10)) * rng.choice((-1, 1))
    if value + change < 0 or (head and value + change >= 10 ** len(tail)):
        change = -change
    keep_width = head or point or tail.startswith("0")
    new = head + str(value + change).zfill(len(tail) if keep_width else 1)
    whole, decimals = (new[: -len(decimals)], new[-len(decimals) :]) if point else (new, "")
    return (f"{int(whole):,}" if "," in number and not head else whole) + point + decimals


def shuffled(ids: Sequence[str], seed: int = 0) -> list[int | None]:
    """For each row the place of a row of another question, drawn at random; None where there is no other question.

    Args:
        ids: the question of each row.
    """
    rng = random.Random(f"{seed}/{len(ids)}")
    order = sorted(range(len(ids)), key=lambda place: ids[place])
    spans: dict[str, tuple[int, int]] = {}
    for at, place in enumerate(order):
        first, count = spans.get(ids[place], (at, 0))
        spans[ids[place]] = (first, count + 1)
    sources: list[int | None] = []
    for question in ids:
        first, count = spans[question]
        if count == len(ids):
            sources.append(None)
            continue
        drawn = rng.randrange(len(ids) - count)
        sources.append(order[drawn if drawn < first else drawn + count])
    return sources
