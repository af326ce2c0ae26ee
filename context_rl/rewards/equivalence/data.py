"""On data: the advantages that two rewards give to the same sampled traces."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from context_rl.rewards.advantages import grpo_advantages, std
from context_rl.rewards.compose import Reward, Spec
from context_rl.rewards.equivalence.verdicts import Verdict
from context_rl.rewards.inputs import RewardInputs

EPSILON = 1e-4
"""What TRL adds to every standard deviation."""
LITTLE = 0.1


@dataclass(frozen=True)
class Seen:
    """One reward of the data, and what GRPO makes of it; arrays [groups, traces of a group].

    Attributes:
        rewards: NaN where unscored.
        advantages: 0 where unscored.
        z: the advantages without TRL's 1e-4; 0 without spread.
        slack, slack_z: what the last bits of the rewards can do to `advantages` and `z`.
        alone: the rewards hang neither on the group nor on the step.
    """

    rewards: np.ndarray
    advantages: np.ndarray
    z: np.ndarray
    slack: np.ndarray
    slack_z: np.ndarray
    alone: bool


def seen(spec: Spec, rows: Sequence[RewardInputs | None], group_size: int, scale: str) -> Seen:
    """A reward, built anew, of groups of `group_size` one after the other, as at the first step."""
    reward = Reward(spec)
    flat = reward(rows, [place // group_size for place in range(len(rows))])
    rewards, advantages = (
        np.array(values, float).reshape(-1, group_size) for values in (flat, grpo_advantages(flat, group_size, scale))
    )
    spreads = {"group": [std(list(group)) for group in rewards], "batch": std(list(rewards.flat)), "none": 1.0}[scale]
    s = np.broadcast_to(np.reshape(spreads, (-1, 1)), (len(rewards), 1))
    with_epsilon = s + (0.0 if scale == "none" else EPSILON)
    bits = 64 * np.finfo(float).eps * np.nan_to_num(abs(rewards)).max(1, keepdims=True)
    inverse = np.divide(1.0, s, out=np.zeros(s.shape), where=s > 0)
    z = advantages * with_epsilon * inverse
    return Seen(rewards, advantages, z, bits / with_epsilon, bits * inverse, reward.alone)


def on_data(one: Spec, other: Spec, rows: Sequence[RewardInputs | None], group_size: int, scale: str) -> Verdict:
    """What the advantages of these rows say: one batch, groups one after the other, None where unscored.

    Raises:
        RewardError: one of them is no reward, or does not fit the data.
    """
    return compared(*(seen(spec, rows, group_size, scale) for spec in (one, other)), scale)


def compared(one: Seen, other: Seen, scale: str) -> Verdict:
    """The closest verdict that two rewards of the same traces allow."""
    a, b, slack = one.advantages, other.advantages, one.slack + other.slack
    gap, size = abs(a - b), float(max(abs(a).max(), abs(b).max()))
    slack = slack + 1e-9 * size
    same_z = scale != "none" and bool((abs(one.z - other.z) <= 1e-9 * size + one.slack_z + other.slack_z).all())
    factor, correlation = best_factor(a, b)
    if (gap <= slack).all():
        kind, what = "identical", "the same advantages" if size else "no trace has an advantage under either"
    elif same_z and rms(gap) <= LITTLE * max(rms(a), rms(b)):
        kind, what = "epsilon", "the same advantages but for TRL's 1e-4"
    elif factor > 0 and (abs(b - factor * a) <= slack * max(1.0, factor)).all():
        kind, what = "factor", "the same advantages up to one factor"
    elif _ranked_alike(one, other):
        kind, what = "order", "other advantages, the same ranking in every group"
    else:
        kind, what = "different", "other advantages"
    if same_z and kind in ("factor", "order"):
        what += ", for spreads are so small that TRL's 1e-4 counts"
    clash = (((a > slack) & (b < -slack)) | ((a < -slack) & (b > slack))).any(1).mean()
    start = "" if one.alone and other.alone else "; as at the first step"
    figures = f"correlation {correlation:.4f}, best common factor {factor:.4g}, signs differ in {clash:.0%} of groups"
    return Verdict(kind, f"{what} ({a.size} traces: {figures}{start})", float(gap.max()))


def best_factor(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The f for which f * a is closest to b, and the correlation of the two; 0 where one of them is all 0."""
    square = float((a * a).sum())
    product, norms = float((a * b).sum()), float(np.linalg.norm(a) * np.linalg.norm(b))
    return (product / square, product / norms) if norms else (0.0, 0.0)


def rms(values: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(values**2)))


def _ranked_alike(one: Seen, other: Seen) -> bool:
    """Traces that one reward tells apart, by over a millionth of the group, neither tie nor swap in the other."""
    rises = np.prod([np.sign(arm.rewards[:, :, None] - arm.rewards[:, None, :]) for arm in (one, other)], axis=0)
    for arm in (one, other):
        apart = abs(arm.advantages[:, :, None] - arm.advantages[:, None, :])
        least = np.maximum(1e-6 * apart.max((1, 2), keepdims=True), 1e-9 * apart.max())
        if ((apart > least + arm.slack[:, :, None]) & (rises <= 0)).any():
            return False
    return True
