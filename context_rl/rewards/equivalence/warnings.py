"""One reward by itself: what of it GRPO does not see, and what drowns the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from context_rl.rewards.advantages import std
from context_rl.rewards.compose import Reward, Spec
from context_rl.rewards.equivalence.data import Seen, best_factor, rms, seen
from context_rl.rewards.equivalence.specs import named, nested
from context_rl.rewards.formulas import FORMULAS
from context_rl.rewards.inputs import RewardInputs

NO_SPREAD = 1e-6
"""A standard deviation beside which TRL's 1e-4 leaves a hundredth of a normal advantage."""
NEARLY_ALL = 0.99
WIDE = 10.0
"""A range beside which the differences between most traces are small; those of right and wrong ones are about 1."""


def vanishing_parts(
    reward: Reward, rows: Sequence[RewardInputs | None], group_size: int, scale: str = "group", below: float = 0.02
) -> list[str]:
    """Warnings: thresholds that all reach or none, groups without spread, terms of a hybrid that change nothing.

    Args:
        reward: a run's; it is built anew here, so that its memory stays as it is.
        rows: groups of `group_size` one after the other, None where unscored.
        below: a term changes nothing if without it the advantages are, up to one factor, the same to this share of
            their root mean square.
    """
    groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
    rows = [x for group in groups if any(group) for x in group]
    if not rows:
        return []
    whole = seen(reward.spec, rows, group_size, scale)
    warnings = [_lame_threshold(spec, rows, group_size) for spec in nested(reward.spec)]
    share = np.mean([std(list(group)) <= NO_SPREAD for group in whole.rewards])
    if share > 0.5:
        warnings.append(
            f"{reward.name} has no spread in {share:.0%} of the groups (a std up to {NO_SPREAD:g}): little to learn"
        )
    name, given = named(reward.spec)
    if name == "hybrid" and whole.advantages.any():
        warnings += [_lame_term(term, given, whole, rows, scale, below) for term in given if term != "clip"]
    return [warning for warning in warnings if warning]


def _lame_threshold(spec: Spec, rows: Sequence[RewardInputs | None], group_size: int) -> str | None:
    """The warning for a threshold that nearly all traces reach, or none, or for tiers of which one step is in use."""
    name, given = named(spec)
    if name not in ("threshold", "sigmoid_threshold", "tiers"):
        return None
    paid = seen(spec, rows, group_size, "none").rewards / (Reward(spec).high or 1.0)
    paid = paid[~np.isnan(paid)]
    what, full, nothing = f"{name} of {named(given['of'])[0]}", np.mean(paid > 0.99), np.mean(paid < 0.01)
    if full >= NEARLY_ALL or nothing >= NEARLY_ALL:
        return f"{what} pays {'everyone' if full > nothing else 'nobody'}: {max(full, nothing):.0%} of the traces"
    if name == "tiers" and len(given["at"]) > 1 and full + nothing >= NEARLY_ALL:
        return f"{what} pays all or nothing: the steps between lie too close together for these traces"
    return None


def _lame_term(
    term: str, hybrid: Mapping[str, Any], whole: Seen, rows: Sequence[RewardInputs | None], scale: str, below: float
) -> str | None:
    """The warning for a term without which the hybrid's advantages are the same up to one factor."""
    rest = {name: weight for name, weight in hybrid.items() if name != term}
    if not rest.keys() - {"clip"}:
        return None
    size = whole.rewards.shape[1]
    without = seen({"hybrid": rest}, rows, size, scale).advantages
    factor, _ = best_factor(without, whole.advantages)
    if factor <= 0 or rms(whole.advantages - factor * without) >= below * rms(whole.advantages):
        return None
    bare = {name: weight for name, weight in hybrid.items() if name != "clip"}
    own, total = (rms(seen({"hybrid": h}, rows, size, "none").advantages) for h in ({term: hybrid[term]}, bare))
    if own < below * total:
        return f"{term} hardly counts: its spread within the groups is {own / total:.1g} of the whole hybrid's"
    return f"{term} moves in step with the other terms: to GRPO it doubles (or halves) what they say and adds nothing"


def outweighing(reward: Reward, scale: str) -> list[str]:
    """The warning for a reward of wide range that nothing divides by its group's std, unless it is one's own function.

    Without it the perplexities, whole, did not learn the tiny models' task (docs/ablations.md).
    """
    wide = reward.high - reward.low > WIDE and set(reward.formulas) <= FORMULAS.keys()
    if scale == "group" or not wide:
        return []
    return [
        f"{reward.name} ranges from {reward.low:g} to {reward.high:g}, and with --scale_rewards {scale} a few hopeless "
        "traces outweigh all others of a batch; use group, clip it, or take one that is bounded, such as probability"
    ]
