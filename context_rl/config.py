"""Every setting of a run: one flat dataclass of ours beside TRL's own `GRPOConfig` and `ModelConfig`.

    accelerate launch recipes/train_context.py [recipe.yaml] [--key value ...]

A recipe may begin with `extends: other.yaml`, a recipe in the same folder (or a path from there), whose values hold
where it says nothing. Its keys and the command line's flags are the fields below, those of TRL's GRPOConfig
(learning_rate, max_steps, num_generations, use_vllm, report_to, ...) and those of its ModelConfig (model_name_or_path
is the context model; use_peft, lora_r, ...). The command line wins over the recipe, the recipe over the defaults.
Unknown keys are errors.
"""

import argparse
import dataclasses
import difflib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import GRPOConfig, ModelConfig, TrlParser

from context_rl.judge import JudgeError, check_endpoint
from context_rl.rewards import Reward, RewardError
from scorer import BACKENDS


class ConfigError(ValueError):
    """A setting that cannot be used: one line that names it and says what to do."""


@dataclass
class ContextConfig:
    """What this project adds to TRL's settings."""

    # --- data
    task: str = field(
        default="symbolic", metadata={"help": "symbolic | gsm8k | hellaswag | qa | dialogue | rg:<reasoning-gym task>"}
    )
    data: str | None = field(default=None, metadata={"help": "hub id, file or folder (gsm8k, hellaswag, qa, dialogue)"})
    eval_data: str | None = field(default=None, metadata={"help": "held-out rows, where `data` has no test split"})
    question_column: str | None = field(default=None, metadata={"help": "column of the question; recognised if unset"})
    answer_column: str | None = field(default=None, metadata={"help": "column of the answer; recognised if unset"})
    task_options: dict | str | None = field(
        default=None, metadata={"help": "of reasoning-gym tasks and hellaswag, JSON"}
    )
    train_questions: int | None = field(
        default=None, metadata={"help": "training questions; unset: all (4,000 if endless)"}
    )
    eval_questions: int = field(default=1000, metadata={"help": "held-out questions of the before/after evaluation"})

    # --- the frozen base model
    scorer: str = field(
        default="local", metadata={"help": "local (transformers) | vllm (a server) | vllm_engine (in this process)"}
    )
    scorer_model: str | None = field(default=None, metadata={"help": "the base model: hub id or folder"})
    scorer_url: list[str] | None = field(
        default=None, metadata={"help": "vllm: running servers, replicas of one model; unset launches one"}
    )
    scorer_python: str | None = field(default=None, metadata={"help": "vllm: interpreter of the server's environment"})
    scorer_args: str = field(default="", metadata={"help": "vllm: further arguments of `vllm serve`, as one string"})
    scorer_memory: float | None = field(default=None, metadata={"help": "vLLM of ours: share of the GPU's memory"})
    scorer_device: str | None = field(default=None, metadata={"help": "launched server: its GPUs, such as 1 or 0,1"})
    scorer_timeout: float = field(default=120.0, metadata={"help": "vllm: seconds for one request"})
    scorer_cache: str | None = field(
        default=None, metadata={"help": "folder of stored no-trace baselines; unset: the user's cache; off: none"}
    )
    scorer_dtype: str = field(default="float32", metadata={"help": "float32 | bfloat16 | float16 | auto"})
    scorer_template: str = field(default="raw", metadata={"help": "raw text, or chat: the base model's chat template"})
    max_answer_tokens: int | None = field(
        default=None,
        metadata={"help": "most tokens of the base model's own answer; unset: two more than the longest gold one"},
    )
    max_unscored: float = field(default=0.01, metadata={"help": "share of unscored traces above which the run stops"})

    # --- who says whether the base model's own answer is right
    grader: str = field(default="task", metadata={"help": "task: its own rule | judge: a model behind an endpoint"})
    judge_url: str | None = field(
        default=None, metadata={"help": "a chat endpoint as OpenAI's, up to /v1; its key: the variable OPENAI_API_KEY"}
    )
    judge_model: str | None = field(default=None, metadata={"help": "the judge's name at its endpoint"})
    judge_timeout: float = field(default=60.0, metadata={"help": "seconds for one request to the judge"})
    judge_concurrency: int = field(default=16, metadata={"help": "requests to the judge at once"})
    judge_max_tokens: int = field(default=64, metadata={"help": "of the judge's reply; more where it thinks first"})
    judge_options: dict | str | None = field(
        default=None, metadata={"help": "merged into the request, JSON; null takes a key out"}
    )
    judge_training: bool = field(
        default=False, metadata={"help": "ask about every sampled trace, for the accuracy curve, whatever the reward"}
    )

    # --- the context model's prompt (the model itself is TRL's model_name_or_path)
    context_template: str = field(default="raw", metadata={"help": "raw text, or chat: its own template"})
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "where a trace ends besides EOS; unset: the next part of the raw template"}
    )

    # --- the reward
    reward: dict | str | None = field(  # never None; argparse knows no other union
        default="probability",
        metadata={"help": "a name or a mapping, see context_rl/rewards/compose.py; all are logged"},
    )
    masked_score: bool = field(
        default=True, metadata={"help": "score traces that state the answer once more without it; off saves scoring"}
    )

    # --- the run
    cpu_threads: int | None = field(default=None, metadata={"help": "threads on a CPU; unset: one a physical core"})
    resume: bool = field(default=False, metadata={"help": "go on from the run folder's latest whole checkpoint"})
    evaluate: bool = field(default=True, metadata={"help": "help against no help on held-out questions, at both ends"})

    def __post_init__(self) -> None:
        choices = {
            "scorer": BACKENDS,
            "scorer_template": ("raw", "chat"),
            "context_template": ("raw", "chat"),
            "scorer_dtype": ("float32", "bfloat16", "float16", "auto"),
            "grader": ("task", "judge"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"--{name} is {getattr(self, name)!r}; it can be {' or '.join(allowed)}")
        whole = ("eval_questions", "max_answer_tokens", "train_questions", "cpu_threads")
        for name in (*whole, "judge_concurrency", "judge_max_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"--{name} is {value}; it must be a whole number, at least 1")
        if isinstance(self.scorer_url, str):
            self.scorer_url = [self.scorer_url]
        if self.scorer_memory is not None and not 0 < self.scorer_memory <= 1:
            raise ConfigError(f"--scorer_memory is {self.scorer_memory}; it is a share, above 0 and at most 1")
        for name in ("scorer_timeout", "judge_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it is a number of seconds above 0")
        if not 0 <= self.max_unscored < 1:
            raise ConfigError(f"--max_unscored is {self.max_unscored}; it is a share, from 0 to below 1")
        if isinstance(self.stop_strings, str):
            self.stop_strings = [self.stop_strings]
        if "" in (self.stop_strings or []):
            raise ConfigError("--stop_strings holds an empty string, at which every trace would end")
        self.task_options = mapping("task_options", self.task_options)
        self.judge_options = mapping("judge_options", self.judge_options)
        if isinstance(self.reward, str) and self.reward.lstrip().startswith("{"):
            self.reward = mapping("reward", self.reward)
        try:
            Reward(self.reward)
        except RewardError as error:
            raise ConfigError(f"--reward: {error}") from None
        self._check_judge()

    def _check_judge(self) -> None:
        """Raises ConfigError for a judge that is needed and not named, or named and never asked."""
        needs = "--grader judge" if self.grader == "judge" else "the reward judge_soft"
        if self.grader == "task" and "judged" not in Reward(self.reward).reads:
            for setting in dataclasses.fields(self):
                if setting.name.startswith("judge_") and getattr(self, setting.name) not in (setting.default, {}):
                    raise ConfigError(f"--{setting.name} has no effect without --grader judge or the reward judge_soft")
            return
        for name in ("judge_url", "judge_model"):
            if not getattr(self, name):
                raise ConfigError(f"{needs} needs --judge_url and --judge_model; --{name} is not set")
        if self.judge_training and self.grader == "task":
            raise ConfigError("--judge_training has no effect without --grader judge")
        try:
            check_endpoint(self.judge_url, self.judge_options)
        except JudgeError as error:
            raise ConfigError(str(error)) from None

    @property
    def judge_in_training(self) -> list[str]:
        """What a judge is asked about every sampled trace: "hard", "soft", both or nothing."""
        reads = Reward(self.reward).reads
        hard = self.grader == "judge" and (self.judge_training or "correct" in reads)
        return ["hard"] * hard + ["soft"] * ("judged" in reads)


def mapping(name: str, value: dict | str | None) -> dict[str, Any]:
    """A setting that is a mapping in the recipe and JSON on the command line."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)  # before YAML, to which 1e-3 is a text
        except json.JSONDecodeError:
            parsed = yaml.safe_load(value)
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise ConfigError(f"--{name} is {value!r}; it must be a mapping such as '{{\"key\": 1}}'")
    return parsed


CONFIGS = (ContextConfig, GRPOConfig, ModelConfig)


class Options(argparse.ArgumentParser):
    """The command line of a tool: argparse, whose own way with an error is to print the whole usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class Parser(TrlParser):
    """TRL's parser, whose own way with an error is to print four screens of usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(argv: list[str], default_recipe: Path) -> tuple[ContextConfig, GRPOConfig, ModelConfig]:
    """Settings from `[recipe.yaml] [--key value ...]`; without a recipe, `default_recipe` supplies the rest.

    Raises:
        ConfigError: the recipe is missing or no mapping, a key is unknown, or a value is impossible.
    """
    argv = list(argv)
    recipe = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else default_recipe
    values = read_recipe(recipe.resolve() if recipe.exists() else recipe)
    if not torch.cuda.is_available() and "bf16" not in values and not any(word.startswith("--bf16") for word in argv):
        argv += ["--bf16", "false"]  # TRL's default is true, at which a CPU stops
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and " " not in flag:  # with a space it is a value, such as that of --scorer_args
            check_key(flag[2:].replace("-", "_").removeprefix("no_"), "the command line")
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as whole:
            whole.write(yaml.safe_dump(values))
            whole.flush()
            return Parser(CONFIGS).parse_args_and_config(["--config", whole.name, *argv])
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, yaml.YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe's mapping, on top of the one that it `extends` (a path beside it), if it does."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    below = values.pop("extends", None)
    for key in values:
        check_key(str(key), str(path))
    if below is None:
        return values
    if not isinstance(below, str) or path in seen:
        raise ConfigError(f"{path}: extends is {below!r}; it must name another recipe, and not go round in a circle")
    return read_recipe((path.parent / below).resolve(), (*seen, path)) | values


def check_key(key: str, where: str) -> None:
    """Raises ConfigError for a key that no setting has, with the nearest that exist."""
    known = [f.name for config in CONFIGS for f in dataclasses.fields(config)] + ["help", "env"]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3)
        raise ConfigError(f"unknown key {key!r} in {where}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
