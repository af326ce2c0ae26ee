"""All formulas at once: their rewards of a batch of groups, with and without the answer's mentions in the traces."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import yaml

from context_rl.rewards import ARMS, Reward, RewardError, RewardInputs, Spec
from eval.saved_groups import Group

RIGHTNESS = {"binary", "judge_soft", "soft_numeric"}
"""Formulas of the base model's own answer."""


class Arms:
    """All formulas of a bench.

    `maskable` are those that cutting the answer out of the trace can change through the answer's log-probs. `unfit`
    says why a formula does not fit these data; it is left out from then on, and no number of it is kept.
    """

    def __init__(self, specs: Mapping[str, Spec]):
        self.rewards = {name: Reward(spec) for name, spec in specs.items()}
        self.maskable = {name for name, spec in specs.items() if can_be_masked(spec)}
        self.unfit: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        return list(self.rewards)

    def reads_rightness(self, name: str) -> bool:
        """Whether the formula looks at the base model's own answer, so that it ranks right traces first by itself."""
        return not RIGHTNESS.isdisjoint(self.rewards[name].formulas)

    def values(self, groups: Sequence[Group]) -> list[tuple[Group, np.ndarray, np.ndarray | None]]:
        """(group, rewards [A, n], those with the answer's mentions cut out) of the scored traces of one batch.

        NaN where a formula does not fit or masking does not apply; None for masked rewards that were not scored.
        """
        rows = [x for group in groups for x in group.inputs if x is not None]
        sizes = [sum(x is not None for x in group.inputs) for group in groups]
        labels = [place for place, size in enumerate(sizes) for _ in range(size)]
        if not rows:
            return []
        progress = groups[0].progress
        given = np.array([self._called(name, rows, labels, progress) for name in self.names])
        masked = self._masked(rows, labels, progress, given)
        ends = np.cumsum(sizes)[:-1]
        parts = [None] * len(groups) if masked is None else np.split(masked, ends, 1)
        together = zip(groups, np.split(given, ends, 1), parts, strict=True)
        return [part for part, size in zip(together, sizes, strict=True) if size]

    def _masked(
        self, rows: Sequence[RewardInputs], labels: Sequence[int], progress: float, given: np.ndarray
    ) -> np.ndarray | None:
        """[A, rows], as `{"masked": {"of": ...}}` pays them; most traces state no answer and are not paid anew."""
        if any(x.masked_logprobs is None for x in rows):
            return None
        changed = [n for n, x in enumerate(rows) if x.masked_logprobs != x.token_logprobs]
        twins = list(rows)
        for n in changed:
            twins[n] = replace(rows[n], token_logprobs=rows[n].masked_logprobs)
        table = np.full(given.shape, np.nan)
        for place, name in enumerate(self.names):
            if name not in self.maskable or name in self.unfit:
                continue
            if self.rewards[name].state:
                spans = [(list(span), progress) for _, span in groupby(range(len(rows)), key=labels.__getitem__)]
                table[place] = self._held_still(name, [([twins[n] for n in span], at) for span, at in spans])
            elif self.rewards[name].alone:
                table[place] = given[place]
                table[place, changed] = self._called(name, [twins[n] for n in changed], changed, progress)
            else:
                table[place] = self._called(name, twins, labels, progress)
        return table

    def steady(
        self, groups: Sequence[Group], versions: Mapping[str, Sequence[Sequence[RewardInputs | None]]]
    ) -> dict[str, list[np.ndarray]]:
        """Rewards of the groups' traces in several versions: for each version one [A, n] a group, NaN where unscored.

        What moves with the values (a quantile, a running mean) stays where the original traces, version "original",
        left it.
        """
        flat = [(version, g) for version, members in versions.items() for g in range(len(members))]
        rows = [x for version, g in flat for x in versions[version][g]]
        labels = [pair for pair in flat for _ in versions[pair[0]][pair[1]]]
        originals = [x for members in versions["original"] for x in members]
        table = np.full((len(self.rewards), len(rows)), np.nan)
        for place, (name, reward) in enumerate(self.rewards.items()):
            if reward.state:
                of_group = [g for g, members in enumerate(versions["original"]) for _ in members]
                self._called(name, originals, of_group, groups[-1].progress)
                table[place] = self._held_still(name, [(versions[v][g], groups[g].progress) for v, g in flat])
            else:
                table[place] = self._called(name, rows, labels, 0.0)
        ends = np.cumsum([len(versions[version][g]) for version, g in flat])[:-1]
        found: dict[str, list[np.ndarray]] = {version: [] for version in versions}
        for (version, _), part in zip(flat, np.split(table, ends, 1), strict=True):
            found[version].append(part)
        return found

    def _held_still(self, name: str, parts: Sequence[tuple[Sequence[RewardInputs | None], float]]) -> np.ndarray:
        """Rewards of (a group's traces, progress) after one another, each from the state that the formula is in now."""
        reward, values = self.rewards[name], []
        state = reward.state
        for rows, progress in parts:
            values.append(self._called(name, rows, [0] * len(rows), progress))
            reward.state = state
        return np.concatenate(values)

    def _called(
        self, name: str, rows: Sequence[RewardInputs | None], labels: Sequence[Hashable], progress: float
    ) -> np.ndarray:
        """One reward a row; NaN for unscored rows, and everywhere if the formula does not fit."""
        if name not in self.unfit:
            try:
                return np.array(self.rewards[name](rows, labels, progress), dtype=float)
            except RewardError as error:
                self.unfit[name] = f"{error}{culprit(self.rewards[name], rows)}"
        return np.full(len(rows), np.nan)


def culprit(reward: Reward, rows: Sequence[RewardInputs | None]) -> str:
    """The first question that a formula of single traces has no value for."""
    for x in rows if reward.alone else ():
        try:
            if x is not None:
                reward.of(x)
        except RewardError:
            return f" (answer {x.answer!r:.40} to {x.question!r:.60})"
    return ""


def can_be_masked(spec: Spec) -> bool:
    """Whether `{"masked": {"of": spec}}` is a reward."""
    try:
        Reward({"masked": {"of": spec}})
    except RewardError:
        return False
    return True


def arms_of(own: Sequence[str]) -> dict[str, Spec]:
    """The catalogue and the user's own rewards: names, or mappings in JSON or YAML.

    Raises:
        RewardError: one that cannot be built.
    """
    specs: dict[str, Spec] = dict(ARMS)
    for text in own:
        try:
            spec = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RewardError(f"--reward {text!r} is neither a name nor JSON: {str(error).splitlines()[0]}") from None
        Reward(spec)
        specs[f"own: {text}"] = spec
    return specs
