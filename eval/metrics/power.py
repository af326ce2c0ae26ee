"""What an experiment of this size could have shown, and the words for what it did."""

import math
from statistics import NormalDist

from eval.metrics.p_values import student_quantile


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
