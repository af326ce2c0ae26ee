"""The harness's tasks, found, checked and set on local files where they are given.

Only the data set of a task is replaced (`dataset_path`, `dataset_kwargs` and the names of splits that are not there);
its process_docs, doc_to_text, few-shot sampling, filters and metrics stay the harness's.
"""

import contextlib
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from context_rl.tasks.types import DataError
from eval.harness.files import local_data
from eval.harness.questions import LoadedTask, questions
from scorer.checks import first_line

OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood")
ROLLING = "tasks that score whole documents have no place for a trace"
GREEDY_KEYS = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "do_sample", "temperature", "top_p", "top_k"}


def load_task(
    name: str, data: str | Path | None = None, limit: int | None = None, fewshot: int | None = None
) -> LoadedTask:
    """The harness's task `name`, or that of a YAML file in its format, checked down to the last label.

    Args:
        data: a folder of train/validation/test files (.jsonl, .json, .parquet) or the one file to evaluate on; None
            takes the task's own data set, which as a rule means the hub.
        limit: the first so many documents; None is all of them.
        fewshot: examples in the prompt; None is the task's own number (GSM8K 5, HellaSwag 0).

    Raises:
        DataError: in one line what is wrong and what to do: no such task, a kind of task that has no place for a trace,
            a missing split, a file that cannot be read, a document without its label.
    """
    config = find_config(name)
    shots = config.get("num_fewshot") or 0 if fewshot is None else fewshot
    if shots < 0 or (limit is not None and limit < 1):
        raise DataError(f"limit and fewshot count documents, got limit {limit} and fewshot {fewshot}")
    if fewshot and config.get("num_fewshot") == 0:
        raise DataError(f"task {name!r} is zero-shot by its own definition: leave fewshot out")
    if config.get("output_type") == "loglikelihood_rolling":
        raise DataError(f"task {name!r}: {ROLLING}")
    if data is not None:
        config |= local_data(config, Path(data), shots)
    task = build(name, config | {"num_fewshot": shots}, data)
    check_task(name, task, shots)
    split = str(task.config.test_split or task.config.validation_split)
    docs = [doc for _, doc in task.doc_iterator(limit=limit)]
    loaded = LoadedTask(task.task_name, split, task, docs)
    questions(loaded)  # a document without its label is found here, not after an hour of answers
    return loaded


@functools.cache
def manager() -> TaskManager:
    """The index of the harness's 14,000 tasks, which takes five seconds to build."""
    return TaskManager()


def find_config(name: str) -> dict[str, Any]:
    """The task's configuration with its functions."""
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise DataError(f"there is no file {name!r}; a task is a name of lm-evaluation-harness or such a YAML file")
        return load_yaml(name)
    index = manager().task_index
    if name not in index:
        near = ", ".join(difflib.get_close_matches(name, manager().all_subtasks, 3))
        raise DataError(f"lm-evaluation-harness knows no task {name!r}" + (f"; is it one of {near}?" if near else ""))
    entry = index[name]
    if name not in manager().all_subtasks:
        members = ", ".join(sorted(t for t in manager().all_subtasks if t in entry.tags or t.startswith(name))[:6])
        raise DataError(f"{name!r} is several tasks; name one of them" + (f" ({members}, ...)" if members else ""))
    config = load_yaml(entry.yaml_path) if entry.yaml_path else dict(entry.cfg or {})
    return {**config, "task": name}


@contextlib.contextmanager
def silent(library: str) -> Iterator[None]:
    """What the library logs is not shown."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def build(name: str, config: dict[str, Any], data: str | Path | None) -> ConfigurableTask:
    """The harness's object. The task's own code and the data set library may raise anything here."""
    try:
        with silent("datasets"):  # it reports a broken file besides raising an error
            [task] = manager().load([config])["tasks"].values()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        remedy = (
            "give its files with --data FOLDER" if data is None else "do the files have the columns of its data set?"
        )
        raise DataError(
            f"task {name!r} cannot read {data or config.get('dataset_path')}: "
            f"{type(cause).__name__}: {first_line(cause)}; {remedy}"
        ) from error
    return task


def check_task(name: str, task: object, shots: int) -> None:
    """Refuses what has no place for a trace, what is not greedy, and what would run code."""
    if not isinstance(task, ConfigurableTask) or getattr(task, "MULTIMODAL", False):
        raise DataError(f"task {name!r} is a program of its own or shows pictures; take one that its YAML describes")
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"task {name!r} runs the code that the model writes, which is not done here")
    if task.OUTPUT_TYPE not in OUTPUT_TYPES:
        raise DataError(f"task {name!r} is of kind {task.OUTPUT_TYPE!r}; possible are {', '.join(OUTPUT_TYPES)}")
    if task.multiple_input:
        raise DataError(f"task {name!r} has a prompt of its own for each option, so a trace has no single place in it")
    if task.OUTPUT_TYPE == "generate_until":
        check_greedy(name, task.config.generation_kwargs or {})
    if shots and len(task.sampler.df) <= shots:
        raise DataError(f"task {name!r} has {len(task.sampler.df)} examples, too few to show {shots}")


def check_greedy(name: str, kwargs: Mapping[str, Any]) -> None:
    """Answers are greedy here; a task that wants something else would get other numbers than its definition says."""
    other = {key: value for key, value in kwargs.items() if key not in GREEDY_KEYS}
    if kwargs.get("do_sample") or (kwargs.get("temperature") and kwargs.get("do_sample") is None) or other:
        raise DataError(f"task {name!r} wants {dict(kwargs)}; answers are generated greedily and without {set(other)}")
