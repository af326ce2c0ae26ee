"""From settings to everything a run needs, checked: task, context model, base model, questions."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

from context_rl.config import ConfigError, ContextConfig
from context_rl.judge import Judge, Judging
from context_rl.questions import Questions
from context_rl.rewards import Reward, RewardError
from context_rl.rewards.equivalence import outweighing
from context_rl.tasks import DataError, Task, is_endless, load_task
from context_rl.training import (
    LikelihoodReward,
    StopRun,
    build_dataset,
    build_trainer,
    check_prompts_fit,
    check_reward_fits,
    check_trainer_settings,
)
from scorer import Scorer, ScorerError, open_scorer
from scorer.checks import why_not_loaded
from scorer.store import ScoreStore, StoreError, open_store

USER_ERRORS = (ConfigError, DataError, RewardError, ScorerError, StopRun, StoreError)
"""What a user can mend: shown as one line, without a traceback."""


ENDLESS = 4000
"""Training questions of a task that makes its own, where no number is given."""


@dataclass(frozen=True)
class Experiment:
    """What a run is made of. Nothing has been written yet."""

    config: ContextConfig
    args: GRPOConfig
    model_config: ModelConfig
    task: Task
    model: Any
    tokenizer: PreTrainedTokenizerBase
    questions: Questions

    def reward(self, folder: Path | None) -> LikelihoodReward:
        """The one reward function; it writes its rows into `folder`, and the judge, if there is one, its verdicts."""
        if folder is not None and self.questions.judging.judge is not None:
            self.questions.judging.judge.keep(folder, self.args.process_index)
        return LikelihoodReward(self.questions, self.config, self.args, self.tokenizer, folder)

    def trainer(self, reward: Any, folder: Path | None) -> GRPOTrainer:
        """TRL's trainer on this task and model."""
        dataset = build_dataset(self.task, self.config)
        peft = get_peft_config(self.model_config)
        return build_trainer(self.model, self.tokenizer, dataset, reward, self.args, peft, folder)


@contextmanager
def prepare(config: ContextConfig, args: GRPOConfig, model_config: ModelConfig) -> Iterator[Experiment]:
    """Loads and checks everything; the base model is closed at the end.

    Raises:
        ConfigError, DataError, ScorerError: one line that names the setting, row, model or URL.
    """
    state = PartialState(cpu=args.use_cpu)
    use_threads(config, state)
    check_trainer_settings(args)
    task = load_task(
        config.task,
        data=config.data,
        eval_data=config.eval_data,
        question_column=config.question_column,
        answer_column=config.answer_column,
        train_size=config.train_questions or (ENDLESS if is_endless(config.task, config.data) else None),
        eval_size=config.eval_questions,
        seed=args.seed,
        task_options=config.task_options,
    )
    check_reward_fits(task, config)
    task = replace(task, notes=(*task.notes, *outweighing(Reward(config.reward), str(args.scale_rewards))))
    if config.evaluate and len(task.held_out) < 2:
        raise DataError(
            f"{task.name}: {len(task.held_out)} held-out question, and the evaluation needs 2; give more rows or "
            "--eval_data, or leave it out with --no_evaluate"
        )
    judging = open_judging(config)
    if judging is not None:
        task = replace(task, notes=(*task.notes, *check_judge(judging, config, task)))
    examples = [*task.train, *task.held_out]
    model, tokenizer = load_context_model(model_config)
    check_template("context_template", config.context_template, str(model_config.model_name_or_path), tokenizer)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    check_prompts_fit(examples, config, tokenizer, room, args.max_completion_length)
    scorer = open_base_model(config, state)
    store: ScoreStore | None = None
    try:
        chat = config.scorer_template == "chat"
        check_template("scorer_template", config.scorer_template, str(config.scorer_model), scorer.tokenizer)
        if config.scorer_cache != "off":
            store = open_store(Path(config.scorer_cache) if config.scorer_cache else None, scorer.fingerprint)
        questions = Questions(
            examples,
            task.grade,
            scorer,
            chat=chat,
            max_answer_tokens=config.max_answer_tokens,
            store=store,
            masked=config.masked_score,
            judging=judging,
        )
        yield Experiment(config, args, model_config, task, model, tokenizer, questions)
    finally:
        scorer.close()
        if judging is not None:
            judging.judge.close()
        if store is not None:
            store.close()
        keep_server_log(scorer, args.output_dir)


def open_judging(config: ContextConfig) -> Judging | None:
    """The run's judge; None where nothing asks one."""
    if config.judge_url is None:
        return None
    judge = Judge(
        config.judge_url,
        config.judge_model,
        timeout_s=config.judge_timeout,
        concurrency=config.judge_concurrency,
        max_tokens=config.judge_max_tokens,
        options=config.judge_options,
    )
    grades = config.grader == "judge"
    return Judging(judge, grades=grades, in_training=config.judge_in_training)


def check_judge(judging: Judging, config: ContextConfig, task: Task) -> list[str]:
    """Asks the judge what the run is going to ask, once; see `Judge.check`."""
    asked = {*judging.in_training, *(["hard"] if judging.grades and config.evaluate else [])}
    example = task.train[0]
    return judging.judge.check(sorted(asked), example.question, example.answer)


def check_template(flag: str, template: str, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where a chat template is asked for and the model has none."""
    if template == "chat" and not tokenizer.chat_template:
        raise ConfigError(f"--{flag} chat: {model!r} has no chat template; use raw")


def load_context_model(model_config: ModelConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """q and its tokenizer."""
    name = model_config.model_name_or_path
    if name is None:
        raise ConfigError("--model_name_or_path is not set: it names the context model, a hub id or a folder")
    return load_causal_model(
        name,
        "the context model (--model_name_or_path)",
        revision=model_config.model_revision,
        dtype=model_config.dtype,
        attn_implementation=model_config.attn_implementation,
    )


def load_causal_model(
    name: str, what: str, *, revision: str | None = None, **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model that writes and its tokenizer, padding on the left as generation needs it.

    Args:
        what: the model's part, for the error.
        options: further arguments of `from_pretrained`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"cannot load {name!r}, {what}: {why_not_loaded(name, error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def open_base_model(config: ContextConfig, state: PartialState) -> Scorer:
    """The scorer of this process. Of several processes, the main one launches the server if there is none."""

    if config.scorer == "vllm_engine" and state.num_processes > 1:
        raise ConfigError("--scorer vllm_engine is for one process; use --scorer vllm, one server for all")

    def opened(url: list[str] | None) -> Scorer:
        return open_scorer(
            config.scorer,
            model=config.scorer_model,
            dtype=config.scorer_dtype,
            url=url,
            python=config.scorer_python,
            server_args=config.scorer_args,
            memory=config.scorer_memory,
            device=config.scorer_device,
            timeout_s=config.scorer_timeout,
        )

    if config.scorer == "local" or config.scorer_url is not None or state.num_processes == 1:
        return opened(config.scorer_url)
    scorer = opened(None) if state.is_main_process else None
    url = everywhere(getattr(scorer, "url", ""))
    return scorer or opened([url])


def keep_server_log(scorer: Scorer, folder: str | None) -> None:
    """Copies the launched server's log into the run folder, if the run came as far as having one."""
    log = getattr(scorer, "server_log", None)
    if log is not None and folder is not None and Path(folder).is_dir():
        shutil.copyfile(log, Path(folder) / "vllm.log")


def use_threads(config: ContextConfig, state: PartialState) -> None:
    """Sets the number of CPU threads, because `accelerate launch` on a CPU leaves a process with one."""
    if state.device.type == "cpu":
        torch.set_num_threads(config.cpu_threads or max(1, usable_cores() // state.num_processes))


def usable_cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


def everywhere(value: str) -> str:
    """The main process's value, in every process."""
    return broadcast_object_list([value])[0]
