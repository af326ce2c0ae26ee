"""The numbers of an evaluation, each with its uncertainty. Pure functions of per-item values.

An item is a held-out question. Differences are paired: this condition's value minus the other's on the same item.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

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


# --- p-values ---


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


# --- several runs ---


class SeedsMean(NamedTuple):
    """A mean over seeds, its standard error and the degrees of freedom of that error."""

    mean: float
    error: float
    df: float

    @property
    def ci(self) -> tuple[float, float]:
        """95 % interval: mean -+ t error."""
        half = student_quantile(0.975, self.df) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """Two-sided p-value of "the mean is 0"."""
        if self.error == 0:
            return float(self.mean == 0)
        return student_p(self.mean / self.error, self.df)


def seeds_mean(values: Sequence[Sequence[float]] | np.ndarray) -> SeedsMean:
    """Mean over seeds of the mean over items, uncertain because other seeds AND other items could have been drawn.

    A column is one item in all seeds, so what makes an item hard is counted once and not once a seed. With S seeds, I
    items, y = mean + seed + item + rest and d = y - the seed's mean:

        V_seed = variance of the seeds' means / S                  V_item = variance of mean_s d / I
        V_rest = variance of the rest / (S I)                      error^2 = V_item + max(0, V_seed - V_rest)

    which is the two-way analysis of variance with random rows and columns: V_seed and V_item both hold V_rest. The
    interval is Student's t with Satterthwaite's degrees of freedom, error^4 / sum V^2 / df_V: about S - 1 where seeds
    differ, I - 1 where they do not. Measured coverage with 200 items: 94 to 97 % with 5 and 10 seeds, 93 to 97 % with
    3, 88 to 97 % with 2. The percentiles of a bootstrap that draws both seeds and items anew cover 84 to 99 % with 5
    seeds: too little where seeds differ, whose spread such draws take for known, too much where they do not, as they
    count V_rest three times.

    Args:
        values: [seed, item]; NaN where a seed lacks an item. Every seed counts the same, whatever it lacks. Items that
            few seeds share make the interval too wide, not too narrow.

    Source: Satterthwaite, Biometrics Bulletin 2 (1946); Owen, Annals of Applied Statistics 1 (2007), for the bootstrap.
    Raises ValueError for fewer than two seeds or items, and for a seed without items.
    """
    y = np.asarray(values, dtype=float)
    known = ~np.isnan(y)
    y, known = y[:, known.any(0)], known[:, known.any(0)]
    seeds, items = y.shape
    if seeds < 2 or items < 2:
        raise ValueError(f"{seeds} seeds and {items} items: the spread of seeds and of items takes two each")
    if not known.any(1).all():
        raise ValueError(f"seed number {int(known.any(1).argmin())} (from 0) has no items")
    weights = known / (seeds * known.sum(1, keepdims=True))
    means = np.where(known, y, 0).sum(1) / known.sum(1)
    d = np.where(known, y - means[:, None], 0)
    rest = np.where(known, d - d.sum(0) / known.sum(0), 0)
    df_rest = int(known.sum()) - items - seeds + 1
    v_seed = float(means.var(ddof=1)) / seeds
    v_item = float(((weights * d).sum(0) ** 2).sum()) * items / (items - 1)
    v_rest = float(((weights * rest) ** 2).sum()) * int(known.sum()) / df_rest if df_rest > 0 else 0.0
    mean, variance = float(means.mean()), v_item + max(0.0, v_seed - v_rest)
    if v_seed <= v_rest or variance == 0:
        return SeedsMean(mean, math.sqrt(variance), items - 1)
    parts = v_seed**2 / (seeds - 1) + v_item**2 / (items - 1) + v_rest**2 / max(1, df_rest)
    return SeedsMean(mean, math.sqrt(variance), max(1.0, min(variance**2 / parts, seeds + items - 2)))


def interquartile_mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half: of n values the floor(n / 4) smallest and as many largest are left out.

    Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021.
    """
    data = np.sort(np.asarray(values, dtype=float).ravel())
    if not len(data):
        raise ValueError("a mean of no runs has no value")
    return float(data[len(data) // 4 : len(data) - len(data) // 4].mean())


def interquartile_mean_interval(
    scores: Sequence[Sequence[float]], seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the `interquartile_mean` of all scores; scores[task] holds one number a run.

    Stratified bootstrap: each task's runs are drawn anew among themselves. Tasks are not drawn: they are those that
    were chosen; nor are items, so the interval says what other runs would give on the same items. Measured coverage: 90
    to 92 % with 5 runs a task, 93 to 94 % with 10, on 1 to 20 tasks; too narrow, as percentiles of few runs are.

    Source: Agarwal et al. 2021 (rliable).
    """
    tasks = [np.asarray(runs, dtype=float) for runs in scores]
    if not tasks or not all(len(runs) for runs in tasks):
        raise ValueError("a mean of no runs has no interval")
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([runs[rng.integers(0, len(runs), (draws, len(runs)))] for runs in tasks], axis=1)
    cut = drawn.shape[1] // 4
    low, high = np.percentile(np.sort(drawn, 1)[:, cut : drawn.shape[1] - cut].mean(1), [2.5, 97.5])
    return float(low), float(high)


# --- what could have been shown, and the words for what was ---


def smallest_effect(n: int, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest difference in accuracy that n paired items show with this power; None where not even 1 is enough.

    With z_a, z_b the normal points of 1 - alpha / 2 and of the power, it solves

        e sqrt(n) = z_a sqrt(d) + z_b sqrt(d - e^2),        d = max(discordant, e)

    because an effect of e changes at least a share e of the items. For one that is small beside d this is the usual
    (z_a + z_b) sqrt(d / n). The power is that of McNemar's test by mid-p or by interval (80 to 82 % in simulations of
    200 to 10,042 items, 5 to 20 % discordant); by the exact p-value it is 77 to 79 %.

    Args:
        discordant: share of items right in exactly one of the two conditions, 0 to 1.

    Source: Connor, Biometrics 43 (1987); Miettinen, Biometrics 24 (1968).
    """
    if n <= 0 or not 0 <= discordant <= 1:
        raise ValueError(f"{n} items with a share of {discordant} discordant")
    z_a, z_b = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)

    def missing(e: float) -> float:
        d = max(discordant, e)
        return z_a * math.sqrt(d) + z_b * math.sqrt(d - e * e) - e * math.sqrt(n)

    if missing(1.0) > 0:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if missing(middle) > 0 else (low, middle)
    return high


def smallest_mean_effect(error: float, df: float = math.inf, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest mean difference shown with this power where its standard error is this: (t_a + t_b) error.

    Source: Bloom, Evaluation Review 19 (1995).
    """
    return (student_quantile(1 - alpha / 2, df) + student_quantile(power, df)) * error


def verdict(
    difference: float,
    ci: tuple[float, float],
    p_adjusted: float,
    smallest: float | None,
    *,
    points: bool = True,
    alpha: float = 0.05,
) -> str:
    """ "better", "worse" or "no difference shown (3.5 points would have been)".

    A difference is shown where both the interval leaves 0 out and the adjusted p-value is below alpha. That none is
    shown does not say that there is none.

    Args:
        smallest: what would have been shown with 80 % power; None where that is not known.
        points: values are shares, and `smallest` is said in percentage points; else it is said as it is.
    """
    if p_adjusted < alpha and not ci[0] <= 0 <= ci[1]:
        return "better" if difference > 0 else "worse"
    if smallest is None:
        return "no difference shown"
    return f"no difference shown ({f'{100 * smallest:.1f} points' if points else f'{smallest:.2g}'} would have been)"
