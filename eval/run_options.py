"""The command line of `python -m eval.run`, and what it takes from a run, from the defaults and from the data."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from context_rl import runs
from context_rl.config import ConfigError, Options, mapping
from eval.benchmarks import Benchmark
from eval.trace_facts import CONDITIONS
from scorer import BACKENDS

DOES = "How much do the traces help? One benchmark, several conditions on its questions, any number of base models."
JUDGE = ("judge_url", "judge_model", "judge_options")
MAX_UNSCORED = 0.01
"""Share of verdicts that may fail, as in training."""


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; with --run, what it leaves out is taken from the run."""
    parser = Options(prog="python -m eval.run", description=DOES)
    add = parser.add_argument
    add("--run", type=Path, nargs="+", help="finished runs (seeds of one arm): task, base model and q come from them")
    add("--task", help="symbolic | qa | dialogue | rg:NAME, or one of lm-evaluation-harness such as gsm8k, hellaswag")
    add("--data", help="local files in place of the hub's")
    add("--eval_data", help="held-out rows, where --data has no test split")
    add("--question_column", help="of qa; recognised if unset")
    add("--answer_column", help="of qa; recognised if unset")
    add("--task_options", help="of an rg: task, JSON")
    add("--fewshot", type=int, help="worked examples in a harness task's prompt; unset: the task's own number")
    add("--base", nargs="+", metavar="MODEL", help="frozen base models, which all read the same traces")
    add("--untrained", metavar="MODEL", help="the context model before training")
    add("--trained", metavar="MODEL", help="... and after")
    add("--conditions", nargs="+", choices=CONDITIONS, help="unset: all that there is something for")
    add("--questions", type=int, help="at most this many; unset: 1,000 of ours, all of a harness task")
    add("--samples", type=int, default=1, help="sampled traces a question, besides the greedy one (default 1)")
    add("--seed", type=int, default=0, help="of the sampled traces")
    add("--max_trace_tokens", type=int, help="unset: the run's max_completion_length, else 256")
    add("--max_answer_tokens", type=int, help="of our tasks: unset, two more than the longest gold answer has")
    add("--template", choices=("raw", "chat"), help="how the base model is asked (default raw)")
    add("--context_template", choices=("raw", "chat"), help="how q is asked (default raw)")
    add("--grader", choices=("task", "judge"), help="who says what is right; unset: the run's, else the task's rule")
    add("--judge_url", help="a chat endpoint as OpenAI's; unset: the run's. Its key: the variable OPENAI_API_KEY")
    add("--judge_model", help="the judge's name at its endpoint; unset: the run's")
    add("--judge_options", help="merged into the judge's request, JSON; unset: the run's")
    add("--scorer", choices=BACKENDS, default="local", help="how the base models are run")
    add("--dtype", help="of all models: float32 | bfloat16 | float16 | auto (default float32)")
    add("--scorer_python", help="vllm: interpreter of the server's environment")
    add("--scorer_url", nargs="+", help="vllm: running servers of the one base model")
    add("--scorer_memory", type=float, help="vLLM of ours: share of the GPU's memory")
    add("--out", type=Path, help="unset: RUN/eval_run, or eval_runs/TASK")
    parser.set_defaults(judge_limits={})
    options = parser.parse_args(argv)
    if not options.run and (options.task is None or not options.base):
        parser.error("give --run, or --task and --base")
    for name in ("task_options", "judge_options"):
        if getattr(options, name) is not None:
            setattr(options, name, mapping(name, getattr(options, name)))
    if options.samples < 0 or (options.questions is not None and options.questions < 2):
        parser.error("--samples must be 0 or more, and --questions 2 or more")
    if len(set(options.base or ())) != len(options.base or ()):
        parser.error("--base names a model twice")
    if options.scorer_url and len(options.base or ()) > 1:
        parser.error("--scorer_url serves one model; give one --base, or leave the URL out")
    if options.run and len(options.run) > 1 and (options.trained or options.untrained):
        parser.error("several --run bring their own q; leave --trained and --untrained out")
    return options


def settled(options: argparse.Namespace, folder: Path | None) -> argparse.Namespace:
    """The options of one evaluation: what the command line leaves out comes from the run, or is a default."""
    options = argparse.Namespace(**vars(options))
    if folder is not None:
        take_from_run(options, folder)
    defaults: dict[str, Any] = {
        "max_trace_tokens": 256,
        "template": "raw",
        "context_template": "raw",
        "dtype": "float32",
        "grader": "task",
        "out": Path("eval_runs") / options.task.replace(":", "-"),
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in JUDGE:
        if options.grader == "task" and getattr(options, name):
            raise ConfigError(f"--{name} has no effect without --grader judge")
        if options.grader == "judge" and name != "judge_options" and not getattr(options, name):
            raise ConfigError(f"--grader judge needs --judge_url and --judge_model; --{name} is not set")
    return options


def take_from_run(options: argparse.Namespace, folder: Path) -> None:
    """Fills what the command line leaves out from a finished run's config.yaml."""
    if not runs.is_finished(folder):
        raise ConfigError(f"--run {folder}: no finished run there (no result.json)")
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["settings"]
    task: dict[str, Any] = {"task": settings["task"]}
    if options.task in (None, settings["task"]):  # another task's data would be no help
        names = ("data", "eval_data", "question_column", "answer_column", "task_options")
        task |= {name: settings[name] or None for name in names}
    from_run: dict[str, Any] = {
        **task,
        "base": [settings["scorer_model"]],
        "untrained": settings["model_name_or_path"],
        "trained": str(folder / "context_model"),
        "max_trace_tokens": settings["max_completion_length"],
        "max_answer_tokens": settings["max_answer_tokens"],
        "template": settings["scorer_template"],
        "context_template": settings["context_template"],
        "dtype": settings["scorer_dtype"],
        "out": folder / "eval_run",
        "grader": settings.get("grader"),
    }
    if (options.grader or settings.get("grader")) == "judge":
        from_run |= {name: settings.get(name) for name in JUDGE}
        limits = {"timeout_s": "judge_timeout", "concurrency": "judge_concurrency", "max_tokens": "judge_max_tokens"}
        options.judge_limits = {name: settings[key] for name, key in limits.items() if key in settings}
    for name, value in from_run.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def possible(options: argparse.Namespace, benchmark: Benchmark) -> list[str]:
    """The conditions asked for, or all that there is something for.

    Raises:
        ConfigError: one was asked for, and what it needs is missing.
    """
    gold = sum(q.solution is not None for q in benchmark.questions)
    missing = {
        "untrained": None if options.untrained else "--untrained",
        **{c: None if options.trained else "--trained" for c in ("trained", "shuffled", "masked")},
        "gold": None
        if gold == len(benchmark.questions)
        else f"solutions in the data ({gold} of the questions have one)",
    }
    asked = options.conditions or [c for c in CONDITIONS if missing.get(c) is None]
    for condition in asked:
        if missing.get(condition):
            raise ConfigError(f"the condition {condition!r} needs {missing[condition]}")
    return list(dict.fromkeys(["none", *asked]))
