"""The numbers of an evaluation, each with its uncertainty. Pure functions of per-item values.

An item is a held-out question. Differences are paired: this condition's value minus the other's on the same item.

items.py      one condition, and the difference of two
p_values.py   tests and their correction
seeds.py      several runs
power.py      what could have been shown, and the words for what was
"""

from eval.metrics.items import (
    bootstrap_interval,
    mean_of,
    paired_difference,
    paired_proportions_interval,
    summarise,
    wilson_interval,
)
from eval.metrics.p_values import holm, mcnemar, sign_flip_p, student_p, student_quantile
from eval.metrics.power import smallest_effect, smallest_mean_effect, verdict
from eval.metrics.seeds import SeedsMean, interquartile_mean, interquartile_mean_interval, seeds_mean

__all__ = [
    "SeedsMean",
    "bootstrap_interval",
    "holm",
    "interquartile_mean",
    "interquartile_mean_interval",
    "mcnemar",
    "mean_of",
    "paired_difference",
    "paired_proportions_interval",
    "seeds_mean",
    "sign_flip_p",
    "smallest_effect",
    "smallest_mean_effect",
    "student_p",
    "student_quantile",
    "summarise",
    "verdict",
    "wilson_interval",
]
