"""What scoring costs in a training loop, as ratios measured in one run.

    python -m recipes.bench [recipe.yaml] [--key value ...]

Trains the recipe with learning rate 0, so that every step does the same work, and rewards every other step with a
constant instead of asking the base model. Prints the share of a step that scoring takes, and how much longer a step
with scoring is than one with the constant reward. Writes no run folder.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train_context.py

from context_rl.config import parse
from context_rl.experiment import USER_ERRORS, prepare

DEFAULT_RECIPE = Path(__file__).with_name("symbolic.yaml")
STEPS = 24
WARM_UP = 4
"""Steps left out: the first ones allocate memory and choose kernels."""


class EveryOtherStep:
    """The given reward on odd steps, a constant on even ones."""

    __name__ = "reward"

    def __init__(self, reward: Any):
        self.reward = reward
        self.stops = reward.stops
        self.seconds = 0.0

    def __call__(self, *, completion_ids: list[list[int]], trainer_state: Any, **rest: Any) -> list[float | None]:
        if trainer_state.global_step % 2 == 0:
            return self.reward(completion_ids=completion_ids, trainer_state=trainer_state, **rest)
        return [0.0] * len(completion_ids)


def measure(argv: Sequence[str]) -> dict[str, float]:
    """Median seconds of the two kinds of step, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--output_dir", folder, "--max_steps", str(STEPS), "--learning_rate", "0", "--logging_steps", "1"]
        settings = parse([*argv, *fixed, "--save_strategy", "no", "--report_to", "none"], DEFAULT_RECIPE)
        with prepare(*settings) as experiment:
            trainer = experiment.trainer(EveryOtherStep(experiment.reward(folder=None)), folder=None)
            trainer.train()
    steps = [line for line in trainer.state.log_history if "step_time" in line and line["step"] > WARM_UP]
    scored = [line for line in steps if "time/scoring" in line]
    constant = [line for line in steps if "time/scoring" not in line]
    with_scoring = statistics.median(line["step_time"] for line in scored)
    without = statistics.median(line["step_time"] for line in constant)
    return {
        "steps_of_each_kind": len(scored),
        "seconds_with_scoring": with_scoring,
        "seconds_with_constant_reward": without,
        "scoring_share": statistics.median(line["time/scoring"] / line["step_time"] for line in scored),
        "ratio": with_scoring / without,
    }


def main(argv: Sequence[str] | None = None) -> int:
    try:
        result = measure(sys.argv[1:] if argv is None else argv)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"scoring takes {result['scoring_share']:.1%} of a step")
    print(f"a step with scoring takes {result['ratio']:.2f} times a step with a constant reward")
    print(json.dumps(result | {"cpus": os.cpu_count()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
