"""Is one condition better than another? Rows of per-item results, matched, to differences that a sceptic can check.

A row is a dict with "id", "correct" (bool), "logprob" (nats), both None where it could not be scored, and "sample"
where an item was sampled more than once. What is counted is the item: its samples are averaged first, so that 4 samples
of 100 questions are 100 observations and not 400.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from eval.metrics import (
    bootstrap_interval,
    holm,
    mcnemar,
    paired_proportions_interval,
    seeds_mean,
    sign_flip_p,
    smallest_effect,
    smallest_mean_effect,
    verdict,
)

Row = Mapping[str, Any]

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """One condition against the reference.

    Attributes:
        n_items: items with at least one pair that was scored on both sides; n_pairs: such pairs.
        unscored: pairs left out because a side could not be scored; where they are many, the rest is a selection.
        unmatched: rows of either side without a partner.
        difference: mean over items of the condition minus the reference; an item counts once, however many of its
            samples were scored. Over several seeds the mean of the seeds' means.
        ci: its 95 % interval, not adjusted for the number of comparisons.
        p: two-sided; p_holm: adjusted for the comparisons of the same call.
        smallest: the smallest difference that would have been shown with 80 % power at the spread seen and at 5 % over
            the number of comparisons, the strictest step of Holm's; None where these items could not have shown any, or
            show no spread to tell it from.
        words: see `verdict`.
        test: where p and ci come from.
        seeds: number of training runs.
    """

    condition: str
    reference: str
    key: str
    n_items: int
    n_pairs: int
    unscored: int
    unmatched: int
    difference: float
    ci: tuple[float, float]
    p: float
    p_holm: float
    smallest: float | None
    words: str
    test: str
    seeds: int = 1


class Paired(NamedTuple):
    """The differences of two conditions: of each item, by pair; and what is not among them."""

    by_item: dict[str, list[float]]
    right_or_wrong: bool
    unscored: int
    unmatched: int

    @property
    def n_pairs(self) -> int:
        return sum(map(len, self.by_item.values()))

    def item_means(self) -> dict[str, float]:
        return {item: math.fsum(pairs) / len(pairs) for item, pairs in self.by_item.items()}


def rows_by_item(name: str, rows: Sequence[Row]) -> dict[str, dict[Any, Row]]:
    """Item -> sample -> row; a row without a sample has the sample None."""
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        samples = found.setdefault(row["id"], {})
        if row.get("sample") in samples:
            raise ValueError(f"condition {name!r} has item {row['id']!r}, sample {row.get('sample')!r} twice")
        samples[row.get("sample")] = row
    return found


def value_of(name: str, row: Row, key: str) -> bool | float | None:
    if key not in row:
        raise ValueError(f"condition {name!r}, item {row['id']!r} has no {key!r}")
    value = row[key]
    if value is not None and not math.isfinite(value):
        raise ValueError(f"condition {name!r}, item {row['id']!r}: {key} is {value}, which has no mean")
    return value


def pair(name: str, rows: Sequence[Row], other_name: str, others: Sequence[Row], key: str) -> Paired:
    """Rows matched by item and sample; a side with one row for every item is matched to each sample of the other.

    Raises ValueError for an item's sample that comes twice, values that are not finite, and where nothing is left.
    """
    left, right = rows_by_item(name, rows), rows_by_item(other_name, others)
    one_each = any(all(len(samples) == 1 for samples in side.values()) for side in (left, right))
    by_item: dict[str, list[float]] = {}
    right_or_wrong, unscored = True, 0
    unmatched = sum(len(samples) for item, samples in right.items() if item not in left)
    for item, samples in left.items():
        partners = right.get(item, {})
        if not partners:
            unmatched += len(samples)
            continue
        if one_each:
            pairs = list(product(samples.values(), partners.values()))
        else:
            pairs = [(samples[sample], partners[sample]) for sample in samples if sample in partners]
            unmatched += len(samples) + len(partners) - 2 * len(pairs)
        for row, partner in pairs:
            value, reference = value_of(name, row, key), value_of(other_name, partner, key)
            if value is None or reference is None:
                unscored += 1
                continue
            right_or_wrong &= isinstance(value, bool | np.bool_) and isinstance(reference, bool | np.bool_)
            by_item.setdefault(item, []).append(float(value) - float(reference))
    if not by_item:
        why = f"all {unscored} pairs have an unscored side" if unscored else "no item and sample is in both"
        raise ValueError(f"{name!r} and {other_name!r} have nothing to compare: {why}")
    return Paired(by_item, right_or_wrong, unscored, unmatched)


def conditions_beside(reference: str, conditions: Mapping[str, Any]) -> list[str]:
    if reference not in conditions:
        raise ValueError(f"no condition {reference!r} to compare with; there are {', '.join(map(repr, conditions))}")
    return [name for name in conditions if name != reference]


def smallest_of(error: float, df: float, alpha: float, right_or_wrong: bool) -> float | None:
    """`smallest_mean_effect`; None where the error is 0, which says nothing, and for more than all items."""
    smallest = smallest_mean_effect(error, df, alpha=alpha)
    return None if smallest == 0 or (right_or_wrong and smallest > 1) else smallest


def judged(comparisons: Sequence[tuple[Comparison, bool]]) -> list[Comparison]:
    """With p-values adjusted for their number, and words; beside each, whether it is of right and wrong."""
    adjusted = holm([c.p for c, _ in comparisons])
    return [
        replace(c, p_holm=p, words=verdict(c.difference, c.ci, p, c.smallest, points=points, alpha=ALPHA))
        for (c, points), p in zip(comparisons, adjusted, strict=True)
    ]


def compare(
    rows_by_condition: Mapping[str, Sequence[Row]], reference: str, key: str = "correct", *, seed: int = 0
) -> list[Comparison]:
    """Every condition against the reference on the same items, p-values adjusted over the list.

    - Right or wrong, one pair an item: McNemar's exact p, Agresti and Min's interval.
    - Right or wrong, k samples an item: sign flips and bootstrap of the items' means, so that samples of an item stay
      together. Where no item changed, the interval of 0 of n changed: a bootstrap would say [0, 0].
    - Any other number: sign flips and bootstrap likewise. With fewer than about 20 items the bootstrap is too narrow.

    Args:
        key: what is compared; rows where it is None are left out, with their partners.
        seed: of the sign flips and the bootstrap, not of a training run; for several runs there is `compare_seeds`.

    Raises ValueError for a reference that is not there, and see `pair`.
    """
    others, found = conditions_beside(reference, rows_by_condition), []
    alpha = ALPHA / max(1, len(others))
    for name in others:
        paired = pair(name, rows_by_condition[name], reference, rows_by_condition[reference], key)
        d = np.array(list(paired.item_means().values()))
        n, once = len(d), paired.n_pairs == len(d)
        if paired.right_or_wrong and (once or not d.any()):
            gained, lost = int((d > 0).sum()), int((d < 0).sum())
            p, ci, test = mcnemar(gained, lost), paired_proportions_interval(gained, lost, n), "McNemar, Agresti-Min"
            smallest = smallest_effect(n, (gained + lost) / n, alpha=alpha)
        else:
            p, ci, test = sign_flip_p(d, seed), bootstrap_interval(d, seed), "sign flips and bootstrap of items"
            error = float(d.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
            smallest = smallest_of(error, math.inf, alpha, paired.right_or_wrong)
        difference = math.fsum(d) / n
        counts = (n, paired.n_pairs, paired.unscored, paired.unmatched)
        comparison = Comparison(name, reference, key, *counts, difference, ci, p, math.nan, smallest, "", test)
        found.append((comparison, paired.right_or_wrong))
    return judged(found)


def compare_seeds(
    rows_by_seed: Mapping[Hashable, Mapping[str, Sequence[Row]]], reference: str, key: str = "correct"
) -> list[Comparison]:
    """Every condition against the reference over several training runs: would other seeds on other items agree?

    Within a run as in `compare`; the items' differences of all runs then go to `seeds_mean`, which says what is taken
    as drawn at random. A reference that does not depend on the run, such as "none", stands in each run's mapping.

    Raises ValueError for fewer than two runs, for a run that lacks a condition, and see `pair`.
    """
    if len(rows_by_seed) < 2:
        raise ValueError(f"{len(rows_by_seed)} run says nothing about other seeds; compare() is for one run")
    first = next(iter(rows_by_seed))
    others, found = conditions_beside(reference, rows_by_seed[first]), []
    for run, conditions in rows_by_seed.items():
        if set(conditions) != set(rows_by_seed[first]):
            odd = ", ".join(sorted(set(conditions) ^ set(rows_by_seed[first])))
            raise ValueError(f"seeds {first!r} and {run!r} do not have the same conditions: {odd}")
    for name in others:
        runs = [pair(name, rows[name], reference, rows[reference], key) for rows in rows_by_seed.values()]
        items = list(dict.fromkeys(item for paired in runs for item in paired.by_item))
        means = [paired.item_means() for paired in runs]
        values = np.array([[of_run.get(item, math.nan) for item in items] for of_run in means])
        estimate, right_or_wrong = seeds_mean(values), all(paired.right_or_wrong for paired in runs)
        ci, alpha = estimate.ci, ALPHA / len(others)
        smallest = smallest_of(estimate.error, estimate.df, alpha, right_or_wrong)
        if right_or_wrong and not np.nan_to_num(values).any():
            # No item changed in any run: not [0, 0], but what 0 of n changed may still hide.
            ci, smallest = paired_proportions_interval(0, 0, len(items)), smallest_effect(len(items), 0, alpha=alpha)
        counts = [sum(getattr(paired, name) for paired in runs) for name in ("n_pairs", "unscored", "unmatched")]
        comparison = Comparison(
            *(name, reference, key, len(items), *counts, estimate.mean, ci, estimate.p, math.nan, smallest, ""),
            test=f"t over seeds and items, df {estimate.df:.1f}",
            seeds=len(runs),
        )
        found.append((comparison, right_or_wrong))
    return judged(found)
