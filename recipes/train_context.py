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
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# Where other programs use the CPU too, OpenMP's busy waiting makes a step 15 times slower; alone it gains nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import psutil
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets.utils.logging import disable_progress_bar
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

from context_rl import runs
from context_rl.config import ConfigError, ContextConfig, parse
from context_rl.rewards import RewardError
from context_rl.tasks import DataError, Task, load_task
from context_rl.training import (
    LikelihoodReward,
    Questions,
    StopRun,
    build_dataset,
    build_trainer,
    check_prompts_fit,
    check_resumable,
    trace_prompt,
)
from eval.conditions import DECODINGS, evaluate_condition, generate_traces, shuffle_between_questions
from eval.metrics import paired_difference, summarise
from eval.report import plot_curves, print_result
from scorer import open_scorer
from scorer.local import first_line
from scorer.types import Scorer, ScorerError

DEFAULT_RECIPE = Path(__file__).with_name("symbolic.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; an error that a user can mend is one line, and the exit code 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()
    try:
        run(*parse(list(sys.argv[1:] if argv is None else argv), DEFAULT_RECIPE))
    except (ConfigError, DataError, RewardError, ScorerError, StopRun) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(config: ContextConfig, args: GRPOConfig, model_config: ModelConfig) -> None:
    state = PartialState(cpu=args.use_cpu)
    use_threads(config, state)
    asked_for = None if args.output_dir in (None, "trainer_output") else args.output_dir
    name = f"{config.task.replace(':', '-')}-{config.reward}-seed{args.seed}"
    folder = Path(everywhere(str(runs.run_folder(asked_for, name, config.resume))))
    args.output_dir = str(folder)
    check_resumable(args)

    task = load_task(
        config.task,
        data=config.data,
        eval_data=config.eval_data,
        question_column=config.question_column,
        answer_column=config.answer_column,
        train_size=config.train_questions,
        eval_size=config.eval_questions,
        seed=args.seed,
        task_options=config.task_options,
    )
    if state.is_main_process:
        for note in task.notes:
            print(f"note: {note}")
    model, tokenizer = load_context_model(model_config)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    check_prompts_fit([*task.train, *task.held_out], config, tokenizer, room, args.max_completion_length)

    scorer = open_base_model(config, state)
    try:
        questions = Questions(
            [*task.train, *task.held_out],
            task.grade,
            scorer,
            chat=config.scorer_template == "chat",
            max_answer_tokens=config.max_answer_tokens,
        )
        description = runs.describe((config, args, model_config), scorer.fingerprint)
        checkpoint = begin(folder, config, description, state)
        reward = LikelihoodReward(questions, config, args, tokenizer, folder)
        trainer = build_trainer(
            model, tokenizer, build_dataset(task, config), reward, args, get_peft_config(model_config), folder
        )
        if state.is_main_process:
            print(f"run folder: {folder}" + (f" (resumed from {checkpoint.name})" if checkpoint else ""))
        evaluation = Evaluation(questions, task, config, args, trainer, tokenizer, folder)
        if config.evaluate:
            evaluation.run("none")
            evaluation.run("untrained")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model(str(folder / "context_model"))
        trainer.save_state()
        if config.evaluate:
            evaluation.run("trained")
            evaluation.run("shuffled")
        if state.is_main_process:
            finish(folder, config, args, trainer, evaluation, checkpoint)
    finally:
        scorer.close()


def load_context_model(model_config: ModelConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """q and its tokenizer, padding on the left as generation needs it."""
    name, revision = model_config.model_name_or_path, model_config.model_revision
    if name is None:
        raise ConfigError("--model_name_or_path is not set: it names the context model, a hub id or a folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=model_config.dtype, attn_implementation=model_config.attn_implementation
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(f"cannot load the context model {name!r} (--model_name_or_path): {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def open_base_model(config: ContextConfig, state: PartialState) -> Scorer:
    """The scorer of this process. Of several processes, the main one launches the server if there is none."""

    def opened(url: str | None) -> Scorer:
        return open_scorer(
            config.scorer,
            model=config.scorer_model,
            dtype=config.scorer_dtype,
            url=url,
            python=config.scorer_python,
            server_args=config.scorer_args,
        )

    if config.scorer == "local" or config.scorer_url is not None or state.num_processes == 1:
        return opened(config.scorer_url)
    scorer = opened(None) if state.is_main_process else None
    url = everywhere(getattr(scorer, "url", ""))
    return scorer or opened(url)


def use_threads(config: ContextConfig, state: PartialState) -> None:
    """Sets the number of CPU threads, because `accelerate launch` on a CPU leaves a process with one."""
    if state.device.type == "cpu":
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
        torch.set_num_threads(config.cpu_threads or max(1, cores // state.num_processes))


def begin(folder: Path, config: ContextConfig, description: dict, state: PartialState) -> Path | None:
    """Creates the run folder, or takes it back to its latest whole checkpoint, which is returned."""
    checkpoint = None
    if config.resume:
        runs.check_same_settings(folder, description)
        checkpoint = runs.latest_checkpoint(folder)[0]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if config.resume:
            runs.rewind(folder, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
        else:
            runs.write_atomically(folder / "config.yaml", yaml.safe_dump(description, sort_keys=False))
    state.wait_for_everyone()
    return checkpoint


def everywhere(value: str) -> str:
    """The main process's value, in every process."""
    return broadcast_object_list([value])[0]


class Evaluation:
    """The conditions of one run, each written to eval/ when it is done and read back from there on resume."""

    def __init__(
        self,
        questions: Questions,
        task: Task,
        config: ContextConfig,
        args: GRPOConfig,
        trainer: GRPOTrainer,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
    ):
        self.questions, self.task, self.config, self.args = questions, task, config, args
        self.trainer, self.tokenizer, self.folder = trainer, tokenizer, folder
        self.rows: dict[str, dict[str, list[dict]]] = {}

    def run(self, condition: str) -> None:
        """Fills `rows[condition][decoding]`. Every process takes every n-th question; all get all rows."""
        path = self.folder / "eval" / f"{self.task.name.replace(':', '-')}.{condition}.jsonl"
        if path.exists():
            rows = runs.read_jsonl(path)
        else:
            rows = [row for decoding in DECODINGS for row in self.evaluate(condition, decoding)]
            if self.args.process_index == 0:
                runs.write_jsonl(path, rows)
        self.rows[condition] = {d: [row for row in rows if row["decoding"] == d] for d in DECODINGS}

    def evaluate(self, condition: str, decoding: str) -> list[dict]:
        examples = self.task.held_out
        if condition == "none" and decoding != "greedy":
            # There is no trace to decode: the second decoding is the first.
            return [{**row, "decoding": decoding} for row in self.rows_of_none]
        if condition == "shuffled":
            traces = shuffle_between_questions([row["trace"] for row in self.rows["trained"][decoding]])
        elif condition == "none":
            traces = [None] * len(examples)
        else:
            traces = self.share(
                lambda part: generate_traces(
                    self.trainer.accelerator.unwrap_model(self.trainer.model),
                    self.tokenizer,
                    [trace_prompt(self.config, examples[i].question) for i in part],
                    sample=decoding == "sampled",
                    max_new_tokens=self.args.max_completion_length,
                    stops=self.trainer.reward_funcs[0].stops,
                    seed=self.args.seed,
                    description=f"{condition} traces, {decoding}",
                )
            )
        rows = self.share(
            lambda part: evaluate_condition(
                self.questions,
                [examples[i].id for i in part],
                [traces[i] for i in part],
                decoding,
                f"scoring {condition}, {decoding}",
            )
        )
        if condition == "none":
            self.rows_of_none = rows
        return rows

    def share(self, work: Any) -> list:
        """work(indices) of the held-out questions, done in shares by all processes and put back in order."""
        mine = list(range(self.args.process_index, len(self.task.held_out), self.args.world_size))
        done = gather_object(list(zip(mine, work(mine), strict=True)))
        return [value for _, value in sorted(done, key=lambda pair: pair[0])]

    def summary(self) -> dict[str, dict[str, dict]]:
        return {c: {d: summarise(rows) for d, rows in by.items()} for c, by in self.rows.items()}

    def differences(self) -> dict[str, dict]:
        """Paired differences in accuracy at T = 1."""
        trained = self.rows["trained"]["sampled"]
        return {
            f"trained_minus_{other}": paired_difference(trained, self.rows[other]["sampled"], "correct")
            for other in ("untrained", "none", "shuffled")
        }


def finish(
    folder: Path,
    config: ContextConfig,
    args: GRPOConfig,
    trainer: GRPOTrainer,
    evaluation: Evaluation,
    checkpoint: Path | None,
) -> None:
    """result.json, curves.png and the table."""
    lines = runs.read_metrics(folder)
    step_seconds = sum(line["step_time"] for line in lines)
    result = {
        "task": config.task,
        "reward": config.reward,
        "reward_params": config.reward_params,
        "scale_rewards": str(args.scale_rewards),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "resumed_from": checkpoint.name if checkpoint else None,
        "seconds": time.time() - psutil.Process().create_time(),
        "training_seconds": step_seconds,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9,
        "scoring_share": sum(line["time/scoring"] for line in lines) / step_seconds if step_seconds else None,
        "no_spread_share": sum(line["frac_reward_zero_std"] for line in lines) / len(lines) if lines else None,
        "no_spread_share_first_20": sum(line["frac_reward_zero_std"] for line in lines[:20]) / len(lines[:20])
        if lines
        else None,
        "unscored_traces": evaluation.trainer.reward_funcs[0].unscored,
        "eval": evaluation.summary(),
        "differences": evaluation.differences() if evaluation.rows else {},
    }
    plot_curves(folder, result)
    if evaluation.rows:
        print_result(result, folder)
    runs.write_atomically(folder / "result.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
