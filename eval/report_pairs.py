"""Every arm against every other on the same held-out questions and seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from eval.metrics import holm, mcnemar, paired_proportions_interval, seeds_mean, smallest_effect, smallest_mean_effect
from eval.report_arms import Arm
from eval.report_rules import ALPHA, Pair
from eval.report_runs import Run


@dataclass(frozen=True)
class Compared:
    """Arm a minus arm b on the same held-out questions and seeds; without a difference, `words` says why."""

    a: str
    b: str
    decoding: str
    seeds: int
    items: int
    difference: float | None
    ci: tuple[float, float] | None
    p: float | None
    error: float | None
    df: float
    points: bool
    p_holm: float | None = None
    smallest: float | None = None
    shown: bool = False
    words: str = ""


def matrix(found: Sequence[Run], key: str, decoding: str, condition: str = "trained") -> tuple[list[str], np.ndarray]:
    """(Items, values[run, item]); NaN where a run lacks the item. Every run must have such rows."""
    tables = [run.rows[condition, decoding] for run in found]
    items = list(dict.fromkeys(item for rows in tables for item in rows.ids))
    place = {item: n for n, item in enumerate(items)}
    values = np.full((len(tables), len(items)), np.nan)
    for n, rows in enumerate(tables):
        values[n, [place[item] for item in rows.ids]] = getattr(rows, key)
    return items, values


def with_rows(found: Sequence[Run], *wanted: tuple[str, str]) -> list[Run]:
    """Runs that have those held-out rows, at least one of them scored."""
    return [r for r in found if all(w in r.rows and not np.isnan(r.rows[w].correct).all() for w in wanted)]


def compare_arms(arms: Sequence[Arm], decoding: str) -> list[Compared]:
    """Every pair on the same items and seeds, p-values adjusted over all pairs of two seeds and more.

    As `eval.comparisons.compare_seeds`, with arrays in place of rows: 800 pairs would take minutes there.
    """
    tables = {arm.name: {run.seed: run for run in with_rows(arm.finished, ("trained", decoding))} for arm in arms}
    found = [compared(a.name, b.name, tables[a.name], tables[b.name], decoding) for a, b in combinations(arms, 2)]
    judged = [n for n, c in enumerate(found) if c.p is not None and c.seeds >= 2]
    for n, p in zip(judged, holm([found[n].p for n in judged]), strict=True):
        found[n] = judge(found[n], p, len(judged))
    return found


def compared(a: str, b: str, left: Mapping[Any, Run], right: Mapping[Any, Run], decoding: str) -> Compared:
    """One pair, not yet adjusted for there being others."""
    seeds = [seed for seed in left if seed in right]
    nothing = Compared(a, b, decoding, len(seeds), 0, None, None, None, None, math.inf, True)
    if not left or not right:
        return replace(nothing, words="no held-out rows")
    if not seeds:
        return replace(nothing, words="no seed in common")
    items, mine = matrix([left[seed] for seed in seeds], "correct", decoding)
    others, theirs = matrix([right[seed] for seed in seeds], "correct", decoding)
    place = {item: n for n, item in enumerate(others)}
    shared = [n for n, item in enumerate(items) if item in place]
    d = mine[:, shared] - theirs[:, [place[items[n]] for n in shared]]
    if not len(shared) or np.isnan(d).all(1).any():
        return replace(nothing, words="no question in common")
    n = int((~np.isnan(d)).any(0).sum())
    if len(seeds) == 1 or n < 2:
        known = d[0][~np.isnan(d[0])]
        gained, lost = int((known > 0).sum()), int((known < 0).sum())
        ci = paired_proportions_interval(gained, lost, len(known))
        words, p = "one seed: says nothing about others", mcnemar(gained, lost)
        return Compared(a, b, decoding, 1, n, float(known.mean()), ci, p, None, math.inf, True, words=words)
    estimate = seeds_mean(d)
    ci, error = estimate.ci, estimate.error
    if error == 0:  # nothing varies: not [0, 0], but what so many items may still hide
        change = round(float(np.nansum(d[0])))
        ci = paired_proportions_interval(max(change, 0), max(-change, 0), n)
        p = mcnemar(max(change, 0), max(-change, 0))
        return Compared(a, b, decoding, len(seeds), n, estimate.mean, ci, p, None, math.inf, True)
    return Compared(a, b, decoding, len(seeds), n, estimate.mean, ci, estimate.p, error, estimate.df, True)


def judge(c: Compared, p_holm: float, pairs: int) -> Compared:
    """With the adjusted p-value, the smallest difference that would have been seen (80 % power), and words."""
    alpha = ALPHA / pairs
    if c.error is None:
        smallest = smallest_effect(c.items, 0, alpha=alpha)
    else:
        smallest = smallest_mean_effect(c.error, c.df, alpha=alpha)
    smallest = None if smallest is None or smallest > 1 else smallest
    shown = p_holm < ALPHA and not c.ci[0] <= 0 <= c.ci[1]
    if shown:
        words = f"{c.a if c.difference > 0 else c.b} is better"
    else:
        words = f"not separable with {c.seeds} seeds"
        words += "" if smallest is None else f" ({100 * smallest:.1f} points would have been seen)"
    return replace(c, p_holm=p_holm, smallest=smallest, shown=shown, words=words)


def pairs_of(comparisons: Sequence[Compared]) -> list[Pair]:
    return [
        Pair(c.a, c.b, c.difference, c.ci, c.p_holm, c.smallest, c.shown) for c in comparisons if c.p_holm is not None
    ]
