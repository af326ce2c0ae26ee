"""Rewards: pure formulas, what combines them, what guards them, and what GRPO makes of them.

inputs.py       what is known of a trace when it is rewarded
formulas.py     formulas of one trace, each with its source and range
compose.py      a recipe's `reward:` -> a function of a batch; thresholds, hybrids, gates
binding.py      a formula with the parameters that the recipe gives it, checked
schedules.py    thresholds that move
safeguards.py   what a trace does besides helping: leaks, repetition, length
advantages.py   GRPO's advantages, and groups without a gradient
equivalence/    which rewards GRPO cannot tell apart, and what of one it does not see
catalogue.py    one arm of each kind, for logs, the bench and ablations
"""

from context_rl.rewards.advantages import grpo_advantages, no_spread_share
from context_rl.rewards.catalogue import ARMS, LOGGED, logged_values
from context_rl.rewards.compose import COMBINATORS, Reward, Spec
from context_rl.rewards.formulas import FORMULAS
from context_rl.rewards.inputs import Option, RewardError, RewardInputs

__all__ = [
    "ARMS",
    "COMBINATORS",
    "FORMULAS",
    "LOGGED",
    "Option",
    "Reward",
    "RewardError",
    "RewardInputs",
    "Spec",
    "grpo_advantages",
    "logged_values",
    "no_spread_share",
]
