"""Which rewards can GRPO not tell apart? By their formulas, before anything is sampled; and on sampled traces.

TRL's advantage of a trace with reward r is (r - mean_g) / (s + 1e-4), where s is the standard deviation of its group
("group") or of the batch ("batch"), or r - mean_g ("none"). What all traces of a question add drops out of r - mean_g;
what multiplies them all drops out of z = (r - mean_g) / s. Hence five kinds of verdict, the closest first:

    identical   the same advantages to rounding: 1e-9 of the largest, and what rounding rewards of this size in double
                precision does to them. (TRL holds rewards in single precision: 6e-8 of their size.)
    epsilon     the same z, and A = z s / (s + e) with TRL's e = 1e-4: |A1 - A2| = |z| e |1/(s1 + e) - 1/(s2 + e)|, at
                most |z| e / min(s1, s2). On data the root mean square of A1 - A2 must stay below a tenth of the larger
                one's besides; where spreads are so small that it does not, the verdict is a later one
    factor      one positive factor for all advantages of a batch: a learning rate, which Adam all but removes
    order       the same ranking in every group, but other distances or other weights of the questions
    different   not even that

verdicts.py   the kinds
specs.py      rewards as recipes write them, taken apart
argument.py   what the formulas prove
data.py       what sampled traces show
arms.py       both, for every pair of arms, and as a table
warnings.py   what GRPO does not see of one reward, and what drowns the rest
"""

from context_rl.rewards.equivalence.argument import by_argument
from context_rl.rewards.equivalence.arms import compare_arms, explain
from context_rl.rewards.equivalence.data import EPSILON, on_data
from context_rl.rewards.equivalence.verdicts import KINDS, Verdict
from context_rl.rewards.equivalence.warnings import outweighing, vanishing_parts

__all__ = [
    "EPSILON",
    "KINDS",
    "Verdict",
    "by_argument",
    "compare_arms",
    "explain",
    "on_data",
    "outweighing",
    "vanishing_parts",
]
