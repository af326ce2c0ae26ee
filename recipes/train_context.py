"""Trains a context model q on the likelihood that a frozen base model gives to the right answer after q's trace.

    accelerate launch --config_file accelerate_config.yaml recipes/train_context.py [recipe.yaml] [--key value ...]

In order: read the settings, load the task, the context model and the base model, check every row; ask the base model
how well it answers with no trace and with the untrained model's; train with GRPO; ask again; write the result. Nothing
is written before everything has been checked, and result.json is written last.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# Where other programs use the CPU too, OpenMP's busy waiting makes a step 15 times slower; alone it gains nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import psutil
import transformers
import yaml
from accelerate import PartialState
from datasets.utils.logging import disable_progress_bar
from tqdm import tqdm

from context_rl import runs
from context_rl.config import parse
from context_rl.experiment import USER_ERRORS, Experiment, everywhere, prepare
from context_rl.rewards import Reward
from context_rl.traces import HELD_OUT, QUESTIONS, write_questions
from eval.before_after import BeforeAfter, Halfway
from eval.metrics import mean_of
from eval.run_end import plot_curves, print_result
from scorer.types import Usage

DEFAULT_RECIPE = Path(__file__).with_name("symbolic.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; an error that a user can mend is one line, and the exit code 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except USER_ERRORS as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # not behind a bar that is still on its line
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the latest checkpoint", file=sys.stderr)
        return 130
    return 0


def run(argv: Sequence[str]) -> None:
    config, args, model_config = parse(argv, DEFAULT_RECIPE)
    asked_for = None if args.output_dir in (None, "trainer_output") else args.output_dir
    name = f"{config.task.replace(':', '-')}-{Reward(config.reward).name}-seed{args.seed}"
    folder = Path(everywhere(str(runs.run_folder(asked_for, name, config.resume))))
    args.output_dir = str(folder)

    with prepare(config, args, model_config) as experiment:
        checkpoint = begin(folder, experiment)
        reward = experiment.reward(folder)
        trainer = experiment.trainer(reward, folder)
        before_after = BeforeAfter(experiment, trainer, folder)
        if config.evaluate:
            before_after.run("none")
            before_after.run("untrained")
            trainer.add_callback(Halfway(before_after))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model(str(folder / "context_model"))
        trainer.save_state()
        if config.evaluate:
            before_after.run("trained")
            before_after.run("shuffled")
        if trainer.is_world_process_zero():
            finish(folder, experiment, before_after, trainer.state.global_step, checkpoint, reward.usage)


def begin(folder: Path, experiment: Experiment) -> Path | None:
    """Creates the run folder, or takes it back to its latest whole checkpoint, which is returned."""
    config, state = experiment.config, PartialState()
    settings = (config, experiment.args, experiment.model_config)
    parts = {"train": experiment.task.train, "held_out": experiment.task.held_out}
    data = {name: runs.rows_digest((e.id, e.question, e.answer) for e in part) for name, part in parts.items()}
    description = runs.describe(settings, experiment.questions.scorer.fingerprint, data)
    checkpoint = None
    if config.resume:
        runs.check_same_settings(folder, description)
        checkpoint = runs.latest_checkpoint(folder)[0]
    if state.is_main_process:
        if config.resume:
            runs.rewind(folder, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
        else:
            text = yaml.safe_dump(description, sort_keys=False)
            folder.mkdir(parents=True, exist_ok=True)
            runs.write_atomically(folder / "config.yaml", text)
            write_questions(folder / QUESTIONS, experiment.task.train)
            write_questions(folder / HELD_OUT, experiment.task.held_out)
        for note in experiment.task.notes:
            print(f"note: {note}")
        begun = f", resumed from {checkpoint.name}" if checkpoint else ", no checkpoint yet: from the beginning"
        print(f"run folder: {folder}" + (begun if config.resume else ""))
    state.wait_for_everyone()
    return checkpoint


def finish(
    folder: Path,
    experiment: Experiment,
    before_after: BeforeAfter,
    steps: int,
    checkpoint: Path | None,
    usage: Usage,
) -> None:
    """curves.png, the table, and result.json last."""
    config, args, judge = experiment.config, experiment.args, experiment.questions.judging.judge
    lines = runs.read_metrics(folder)
    step_seconds = sum(line["seconds/step"] for line in lines)
    scoring_seconds = sum(line["seconds/scoring"] for line in lines)
    # With --logging_strategy no there are none, which is no reason to lose a run.
    no_spread = [line["no_spread"] for line in lines if "no_spread" in line]
    unscored = [line["unscored"] for line in lines if "unscored" in line]
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "task": config.task,
        "reward": Reward(config.reward).name,
        "reward_spec": config.reward,
        "scale_rewards": str(args.scale_rewards),
        "seed": args.seed,
        "steps": steps,
        "resumed_from": checkpoint.name if checkpoint else None,
        "seconds": time.time() - psutil.Process().create_time(),
        "training_seconds": step_seconds,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
        "scoring_share": scoring_seconds / step_seconds if step_seconds else None,
        "no_spread_share": mean_of(no_spread),
        "no_spread_share_first_20": mean_of(no_spread[:20]),
        "unscored_share": mean_of(unscored),
        "scoring": usage.metrics() | {"baselines_from_store": experiment.questions.baselines_from_store},
        "judge": None if judge is None else {"model": judge.model, **judge.total},
        "notes": list(experiment.task.notes),
        "eval": before_after.summary(),
        "differences": before_after.differences(),
    }
    (folder / "README.md").unlink(missing_ok=True)  # TRL's model card, which knows neither model nor method
    plot_curves(folder, result)
    print_result(result, folder)
    runs.write_atomically(folder / "result.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
