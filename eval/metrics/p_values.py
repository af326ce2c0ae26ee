"""Tests, the correction for many of them, and Student's t."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def mcnemar(gained: int, lost: int, midp: bool = False) -> float:
    """Exact two-sided p-value of McNemar's test: could as many items as changed have changed by the toss of a coin?

    With m = gained + lost, X ~ Binomial(m, 1/2) and x = min(gained, lost) it is min(1, 2 P(X <= x)); mid-p counts half
    of what was seen: 2 P(X <= x) - P(X = x). Without a changed item it is 1.

    Args:
        gained: items right in the first condition only; lost: in the second only.
        midp: the exact test says "better" by chance in less than 5 % of cases, often 3 %; mid-p comes nearer to 5 %.

    Source: McNemar, Psychometrika 12 (1947); Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13 (2013).
    """
    m, x = gained + lost, min(gained, lost)
    if x < 0:
        raise ValueError(f"counts of items cannot be negative: gained {gained}, lost {lost}")
    # In whole numbers, of which Python has as many digits as it takes.
    ways = total = 1
    for i in range(x):
        ways = ways * (m - i) // (i + 1)
        total += ways
    return (2 * total - ways) / 2**m if midp else min(1.0, 2 * total / 2**m)


def sign_flip_p(differences: Sequence[float], seed: int = 0, draws: int = 10_000) -> float:
    """Two-sided p-value of a mean paired difference: the share of sign patterns whose |mean| is as large as that seen.

    Where the two conditions are alike, an item's difference could as well have had the other sign. All patterns are
    gone through where there are at most `draws`; else so many are drawn, and p = (1 + as large) / (1 + draws), which is
    never 0. For differences of -1, 0 and 1 this is `mcnemar`. Of an item's k samples pass the mean: they are one unit.

    Source: Fisher, The Design of Experiments (1935), section 21; Phipson and Smyth, SAGMB 9 (2010) for the two ones.
    """
    if not len(differences):
        raise ValueError("a mean of no items has no p-value")
    data = np.asarray(differences, dtype=float)
    data = data[data != 0]  # a difference of 0 has no sign
    total, patterns = data.sum(), 2 ** len(data)
    # Sums that are equal but for rounding count as equal.
    least = abs(total) - 1e-12 * np.abs(data).sum()
    if patterns <= draws:
        flipped = (np.arange(patterns)[:, None] >> np.arange(len(data))) & 1
        return float((np.abs(total - 2 * (flipped @ data)) >= least).mean())
    rng, block, large = np.random.default_rng(seed), max(1, 1_000_000 // len(data)), 0
    for start in range(0, draws, block):
        flipped = rng.integers(0, 2, (min(block, draws - start), len(data)), dtype=np.int8).astype(float)
        large += int((np.abs(total - 2 * (flipped @ data)) >= least).sum())
    return (1 + large) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, in their order.

    Of a list without any effect, one falls below 5 % in 5 % of cases at most, whatever the length of the list.
    The i-th smallest of m (from 0) becomes max over j <= i of min(1, (m - j) p_j). They need not be independent.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def student_p(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with df > 0 degrees of freedom (inf: the normal distribution).

    It is the incomplete beta function I_x(df / 2, 1 / 2) at x = df / (df + t^2), here by its continued fraction
    (Abramowitz and Stegun, 26.5.8), evaluated as in Lentz, Applied Optics 15 (1976).
    """
    if math.isinf(t) or math.isinf(df):
        return math.erfc(abs(t) / math.sqrt(2))
    x, a, b = df / (df + t * t), df / 2, 0.5
    # Written as I_x(a, b) = 1 - I_(1-x)(b, a) where the fraction converges slowly.
    swapped = x > (a + 1) / (a + b + 2)
    y = t * t / (df + t * t)
    if swapped:
        a, b, x, y = b, a, y, x
    if x == 0:
        return 1.0 if swapped else 0.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = 1 + term / c, 1 / (1 + term * d)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return 1 - front * fraction if swapped else front * fraction


def student_quantile(p: float, df: float) -> float:
    """The point that Student's t stays below with probability 1/2 <= p < 1; bisection of `student_p`."""
    if math.isinf(df):
        return NormalDist().inv_cdf(p)
    low, high = 0.0, 1.0
    while student_p(high, df) > 2 * (1 - p):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, df) > 2 * (1 - p) else (low, middle)
    return (low + high) / 2
