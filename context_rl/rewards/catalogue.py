"""One reward of every kind, by name: what a run logs, the offline bench compares and an ablation can sweep."""

from context_rl.rewards.compose import Reward, Spec
from context_rl.rewards.formulas import FORMULAS
from context_rl.rewards.inputs import RewardError, RewardInputs

ARMS: dict[str, Spec] = {
    **{name: name for name, formula in FORMULAS.items() if formula.family != "safeguard"},
    "option_probability_per_character": {"option_probability": {"per": "character"}},
    "option_margin_per_character": {"option_margin": {"per": "character"}},
    "threshold": "threshold",
    "threshold_tiers": "tiers",
    "threshold_sigmoid": "sigmoid_threshold",
    "threshold_linear": {"threshold": {"of": "probability", "tau": {"linear": [0.1, 0.9]}}},
    "threshold_cosine": {"threshold": {"of": "probability", "tau": {"cosine": [0.1, 0.9]}}},
    "threshold_quantile": {"threshold": {"of": "probability", "tau": {"quantile": 0.7, "window": 1024}}},
    "hybrid": "hybrid",
    "hybrid_absolute_relative": {"hybrid": {"probability": 0.3, "perplexity_improvement": 0.7, "clip": [0, 1]}},
    "gated": {"gated": {"of": "probability", "gate": "binary"}},
    "fallback": "fallback",
    "spread_filter": "spread_filter",
    "masked_probability": "masked",
    "guarded": {"gated": {"of": {"hybrid": {"probability": 1, "early_leak": -0.5, "clip": [0, 1]}}}},
}
"""Safeguards are not among them by themselves: they are no reward for helping."""

LOGGED: dict[str, Reward] = {
    name: reward
    for name, reward in ((name, Reward(spec)) for name, spec in (ARMS | {name: name for name in FORMULAS}).items())
    if reward.alone
}
"""What every run logs for every trace, whichever of them trains: all that a trace has by itself."""


def logged_values(x: RewardInputs) -> dict[str, float | None]:
    """Every reward of `LOGGED`; None where one does not fit (a numeric reward of a textual answer)."""
    values: dict[str, float | None] = {}
    for name, reward in LOGGED.items():
        try:
            values[name] = reward.of(x)
        except RewardError:
            values[name] = None
    return values
