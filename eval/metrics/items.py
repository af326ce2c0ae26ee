"""The estimates of one condition on its items, and of the difference of two."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

Z95 = 1.959963984540054
"""The standard normal's 97.5 % point."""


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of what is known (no None, no NaN); None where nothing is."""
    known = [float(value) for value in values if value is not None and not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion: Wilson's score interval, which stays inside [0, 1] and works near its ends.

    Source: E. B. Wilson, JASA 22 (1927). Raises ValueError for n = 0.
    """
    if n <= 0:
        raise ValueError("a proportion of no items has no interval")
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # The interval holds p; at 0 and 1 its end is p, which rounding must not miss.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over items; for paired differences pass the differences."""
    if not len(values):
        raise ValueError("a mean of no items has no interval")
    rng, data = np.random.default_rng(seed), np.asarray(values, dtype=float)
    # In blocks, so that a thousand items and more do not need draws x items numbers at once.
    means = [data[rng.integers(0, len(data), (100, len(data)))].mean(1) for _ in range(draws // 100)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def summarise(rows: Sequence[dict]) -> dict:
    """{"n", "accuracy", "accuracy_ci", "mean_logprob", "mean_logprob_ci", "unscored"} of one condition's rows.

    A row holds "correct" (bool) and "logprob" (nats, the answer's sum), both None where it could not be scored; such
    rows are counted in "unscored" and are part of no mean.
    """
    scored = [row for row in rows if row["logprob"] is not None]
    if not scored:
        raise ValueError(f"none of {len(rows)} items could be scored: {rows[0]['unscored'] if rows else 'no items'}")
    right = sum(row["correct"] for row in scored)
    logprobs = [row["logprob"] for row in scored]
    return {
        "n": len(scored),
        "accuracy": right / len(scored),
        "accuracy_ci": list(wilson_interval(right, len(scored))),
        "mean_logprob": math.fsum(logprobs) / len(scored),
        "mean_logprob_ci": list(bootstrap_interval(logprobs)),
        "unscored": len(rows) - len(scored),
    }


def paired_proportions_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two proportions on the same n items.

    Args:
        gained: items right in the first condition only; lost: in the second only.

    Source: Agresti and Min, Statistics in Medicine 24 (2005): half an item added to each cell of the table. Unlike a
    bootstrap it does not shrink to nothing where no item changed.
    """
    total, change = n + 2, gained - lost
    half = Z95 * math.sqrt(gained + lost + 1 - change**2 / total) / total
    low, high = change / total - half, change / total + half
    return max(-1.0, min(low, change / n)), min(1.0, max(high, change / n))


def paired_difference(rows: Sequence[dict], others: Sequence[dict], key: str) -> dict:
    """Mean of rows[i][key] - others[i][key] over items scored in both, with its 95 % interval.

    Right/wrong values get `paired_proportions_interval`, others a bootstrap.
    """
    pairs = [(a[key], b[key]) for a, b in zip(rows, others, strict=True) if a[key] is not None and b[key] is not None]
    differences = [float(a) - float(b) for a, b in pairs]
    if not differences:
        raise ValueError("no item was scored in both conditions")
    if all(isinstance(value, bool) for pair in pairs for value in pair):
        ci = paired_proportions_interval(differences.count(1.0), differences.count(-1.0), len(differences))
    else:
        ci = bootstrap_interval(differences)
    return {"n": len(differences), "difference": math.fsum(differences) / len(differences), "ci": list(ci)}
