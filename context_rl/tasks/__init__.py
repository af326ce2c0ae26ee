"""From data to validated examples: `load_task` is the one entrance.

task        data
symbolic    made here, offline: leg-counting word problems
gsm8k       the hub's openai/gsm8k, or --data
hellaswag   the hub's Rowan/hellaswag, or --data: the right one of four endings; --task_options {"show_endings": true}
            lists them to the context model
qa          the user's own questions and answers: --data
dialogue    the reply that ends a dialogue: made here, offline, or --data with messages
rg:NAME     made by reasoning-gym's generator NAME, e.g. rg:chain_sum
"""

from collections.abc import Callable
from typing import Any

from context_rl.tasks import dialogue, gsm8k, hellaswag, qa, rg, symbolic
from context_rl.tasks.types import DataError, Example, Task

__all__ = ["TASKS", "DataError", "Example", "Task", "is_endless", "load_task"]

FILE_TASKS: dict[str, Callable[..., Task]] = {
    "gsm8k": gsm8k.load,
    "hellaswag": hellaswag.load,
    "qa": qa.load,
    "dialogue": dialogue.load,
}
TASKS = ("symbolic", *FILE_TASKS, "rg:NAME")


def is_endless(task: str, data: str | None) -> bool:
    """Whether the task makes its own questions, as many as are asked for."""
    return task not in FILE_TASKS or (task == "dialogue" and data is None)


def load_task(
    task: str,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    train_size: int | None,
    eval_size: int | None,
    seed: int,
    task_options: dict[str, Any] | None = None,
) -> Task:
    """The examples to train on and to hold out, every one of them right by the task's own grader.

    No question is in both parts. `held_out` depends on the data and `eval_size` alone, so runs with different seeds are
    compared on the same questions, and a smaller `eval_size` takes the first of a larger one. If a part has fewer
    questions than asked for, all are used and `Task.notes` says so.

    Args:
        data: hub id (owner/name, or owner/name:config), file or folder.
        eval_data: the same, held out in place of the test split that `data` may have.
        train_size: None for all there are; 0 for none, to evaluate only.
        seed: which training questions, and in what order.
        task_options: options of a reasoning-gym generator, or hellaswag's {"show_endings": bool}.

    Raises:
        DataError: with one line that says where, what and what to do.
    """
    for size, what in ((train_size, "training"), (eval_size, "held-out")):
        if size is not None and size < 0:
            raise DataError(f"the number of {what} questions cannot be {size}")
    sizes = {"train_size": train_size, "eval_size": eval_size, "seed": seed}
    columns = {"question_column": question_column, "answer_column": answer_column}
    kind, _, name = task.partition(":")
    if task != "symbolic" and kind != "rg" and task not in FILE_TASKS:
        raise DataError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    if task_options and kind not in ("hellaswag", "rg"):
        raise DataError(f"the task {task!r} takes no task_options; leave them out")
    if task == "hellaswag":
        return hellaswag.load(data, eval_data, **columns, task_options=task_options, **sizes)
    if task in FILE_TASKS:
        return FILE_TASKS[task](data, eval_data, **columns, **sizes)
    given = [
        f"--{flag}" for flag, value in {"data": data, "eval_data": eval_data, **columns}.items() if value is not None
    ]
    if given:
        raise DataError(f"the task {task!r} makes its own questions; leave {', '.join(given)} out")
    return symbolic.load(**sizes) if task == "symbolic" else rg.load(name, task_options, **sizes)
