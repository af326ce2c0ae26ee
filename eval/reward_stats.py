"""Does a reward rank the traces of a question as it should? Sums over groups that stream, and intervals from them.

A group is the traces of one question in one generation batch: all that GRPO compares. Every statistic is one of groups,
kept as sums over the groups of a cluster of questions; intervals come from drawing clusters anew. So memory grows with
formulas x clusters and not with rows, and groups of one question, which are alike, do not count as many.

Shapes: A formulas, n traces of a group, K clusters.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from context_rl.rewards.advantages import ZERO_STD, has_no_spread, spread_squares

CLUSTERS = 1000
"""Questions are their own clusters up to this many; more are hashed into so many."""

DRAWS = 1000
"""Bootstrap draws."""

Sums = Mapping[str, np.ndarray]


# --- of one group ---


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis; ties share the mean of theirs."""
    left, right = values[..., :, None], values[..., None, :]
    return (left > right).sum(-1) + ((left == right).sum(-1) + 1) / 2


def rank_correlation(ranks: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rho from two arrays of ranks, [A, n] and [A, n] or [n]; and where it is known, [A] (bool).

    It is 0 where one of the two does not vary (a constant says nothing) and unknown where neither does.
    """
    x = ranks - ranks.mean(-1, keepdims=True)
    y = np.broadcast_to(others - others.mean(-1, keepdims=True), x.shape)
    sizes = (x * x).sum(-1), (y * y).sum(-1)
    both = np.sqrt(sizes[0] * sizes[1])
    rho = np.divide((x * y).sum(-1), both, out=np.zeros_like(both), where=both != 0)
    return np.where(np.isnan(both), np.nan, np.clip(rho, -1, 1)), (sizes[0] > 0) | (sizes[1] > 0)


def auc(ranks: np.ndarray, right: np.ndarray) -> np.ndarray:
    """P(a right trace gets more than a wrong one), ties half, from ranks [A, n] and right or wrong [n]. Needs both.

    Mann and Whitney's U over its maximum.
    """
    positives = int(right.sum())
    return (ranks[:, right].sum(-1) - positives * (positives + 1) / 2) / (positives * (len(right) - positives))


# --- sums over groups, and estimates from them ---


@dataclass(frozen=True)
class Estimate:
    """One number with its 95 % interval.

    Attributes:
        value: None where there is nothing to compute it from.
        ci: None for fewer than two questions; with fewer than about 20 it is too narrow.
        groups: that went into it.
    """

    value: float | None
    ci: tuple[float, float] | None
    groups: int

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "ci": None if self.ci is None else list(self.ci), "groups": self.groups}


class ClusterSums:
    """Sums over groups: for each field an array [K, A]."""

    def __init__(self, arms: Sequence[str], clusters: int):
        self.arms, self.clusters = list(arms), clusters
        self.sums: dict[str, np.ndarray] = {}

    def add(self, cluster: int, **values: np.ndarray | float) -> None:
        """Adds one group's values, [A] or one for all arms, to the fields of these names."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = np.zeros((self.clusters, len(self.arms)))
            self.sums[name][cluster] += value

    def estimates(
        self, statistic: Callable[[Sums], np.ndarray], fields: Sequence[str], groups: str, seed: int = 0
    ) -> dict[str, Estimate]:
        """The statistic of the sums, for each arm, with a percentile interval from clusters drawn with replacement.

        Args:
            statistic: of sums [..., A], to [..., A]; `fields` are the sums it uses.
            groups: the field that counts the groups; clusters without any are not drawn from.
        """
        if groups not in self.sums:
            return {name: Estimate(None, None, 0) for name in self.arms}
        counts = np.nan_to_num(self.sums[groups])
        used = counts.max(1) > 0
        parts = {name: self.sums[name][used] for name in fields}
        clusters = int(used.sum())
        weights = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), DRAWS)
        with np.errstate(all="ignore"):
            value = statistic({name: part.sum(0) for name, part in parts.items()})
            draws = statistic({name: weights.astype(float) @ part for name, part in parts.items()})
        found: dict[str, Estimate] = {}
        for place, name in enumerate(self.arms):
            if not np.isfinite(value[place]):
                found[name] = Estimate(None, None, int(counts[:, place].sum()))
                continue
            known = draws[:, place][np.isfinite(draws[:, place])]
            low, high = np.percentile(known, [2.5, 97.5]) if clusters > 1 and len(known) else (np.nan, np.nan)
            interval = (float(low), float(high)) if np.isfinite(low) else None
            found[name] = Estimate(float(value[place]), interval, int(counts[:, place].sum()))
        return found


def ratio(above: str, below: str) -> Callable[[Sums], np.ndarray]:
    """Sum of `above` over sum of `below`: a mean over groups."""
    return lambda sums: sums[above] / sums[below]


def standardised(sums: Sums) -> np.ndarray:
    """Mean difference a trace, in units of the pooled within-group std of the original rewards."""
    std = np.sqrt(sums["square"] / sums["dof"])
    return np.where(std > ZERO_STD, sums["difference"] / sums["rows"] / std, np.nan)


STANDARDISED = ("difference", "rows", "square", "dof")


class GroupStatistics:
    """How each formula ranks the traces of a group: by correctness, by length, by leaks, or not at all."""

    def __init__(self, arms: Sequence[str], clusters: int):
        self.table = ClusterSums(arms, clusters)

    def add(
        self,
        cluster: int,
        values: np.ndarray,
        correct: Sequence[bool | None],
        tokens: Sequence[int],
        masked: np.ndarray | None = None,
    ) -> None:
        """One group of scored traces; one of fewer than two has nothing to compare and is passed over.

        Args:
            values: rewards [A, n]; NaN in the rows of formulas that do not fit.
            correct: with a None in it the group is ranked by nothing that needs right and wrong.
            tokens: lengths of the traces.
            masked: rewards [A, n] with the answer's mentions cut out of the traces; NaN where that does not apply.
        """
        if values.shape[1] < 2:
            return
        right, lengths = np.asarray(correct, dtype=bool), np.asarray(tokens, dtype=float)
        mixed = None not in correct and right.any() and not right.all()
        ranks = average_ranks(values)
        unknown = np.where(np.isnan(values).any(1), np.nan, 0.0)
        self.table.add(cluster, groups=1 + unknown, no_spread=has_no_spread(values) + unknown)
        if mixed:
            rho, _ = rank_correlation(ranks, average_ranks(right.astype(float)))
            self.table.add(cluster, mixed=1 + unknown, auc=auc(ranks, right) + unknown, rank=rho + unknown)
        if lengths.min() != lengths.max():
            rho, _ = rank_correlation(ranks, average_ranks(lengths))
            self.table.add(cluster, of_lengths=1 + unknown, length=rho + unknown)
        if masked is None:
            return
        unknown = np.where(np.isnan(masked).any(1), np.nan, unknown)
        self.table.add(
            cluster,
            masked=1 + unknown,
            rows=values.shape[1] + unknown,
            dof=values.shape[1] - 1,
            difference=(values - masked).sum(1),
            square=spread_squares(values),
        )
        if mixed:
            self.table.add(cluster, masked_mixed=1 + unknown, masked_auc=auc(average_ranks(masked), right) + unknown)

    def results(self) -> dict[str, dict[str, Estimate]]:
        """For each formula: auc, rank, no_spread, length, masking, masked_auc."""
        mean_of = {
            "auc": ("auc", "mixed"),
            "rank": ("rank", "mixed"),
            "no_spread": ("no_spread", "groups"),
            "length": ("length", "of_lengths"),
            "masked_auc": ("masked_auc", "masked_mixed"),
        }
        found = {name: self.table.estimates(ratio(*pair), pair, pair[1]) for name, pair in mean_of.items()}
        found["masking"] = self.table.estimates(standardised, STANDARDISED, "masked")
        return {arm: {name: estimates[arm] for name, estimates in found.items()} for arm in self.table.arms}


class DropStatistics:
    """How much less each formula pays for one spoilt version of the traces."""

    def __init__(self, arms: Sequence[str], clusters: int):
        self.table = ClusterSums(arms, clusters)

    def add(self, cluster: int, values: np.ndarray, spoilt: np.ndarray) -> None:
        """The rewards of one group and those of its spoilt traces, both [A, n]."""
        if values.shape[1]:
            self.table.add(
                cluster,
                groups=1 + np.where(np.isnan(values).any(1), np.nan, 0.0),
                rows=values.shape[1],
                dof=values.shape[1] - 1,
                difference=(values - spoilt).sum(1),
                square=spread_squares(values),
            )

    def results(self) -> dict[str, Estimate]:
        """The drop of each formula, see `standardised`; None where the original rewards have no spread."""
        return self.table.estimates(standardised, STANDARDISED, "groups")


class AgreementStatistics:
    """How alike two base models make a formula rank the traces of a group."""

    def __init__(self, arms: Sequence[str], clusters: int):
        self.table = ClusterSums(arms, clusters)

    def add(self, cluster: int, values: np.ndarray, others: np.ndarray) -> None:
        """The rewards of one group by the one and by the other, both [A, n]."""
        if values.shape[1] > 1:
            rho, known = rank_correlation(average_ranks(values), average_ranks(others))
            unfit = np.where(np.isnan(values).any(1) | np.isnan(others).any(1), np.nan, 0.0)
            self.table.add(cluster, groups=known + unfit, rho=np.where(known, rho, 0.0) + unfit)

    def results(self) -> dict[str, Estimate]:
        """Mean of Spearman's rho within groups where either varies."""
        return self.table.estimates(ratio("rho", "groups"), ("rho", "groups"), "groups")


def cluster_of(questions: Iterable[str]) -> tuple[Callable[[str], int], int]:
    """(question -> its cluster, number of clusters): one a question, or `CLUSTERS` by hash where there are more."""
    places: dict[str, int] = {}
    for question in questions:
        places[question] = len(places)
        if len(places) > CLUSTERS:
            return lambda question: zlib.crc32(question.encode()) % CLUSTERS, CLUSTERS
    return places.__getitem__, max(1, len(places))
