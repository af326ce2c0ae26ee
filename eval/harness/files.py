"""Local files in the place of a task's data set."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from context_rl.tasks.types import DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SPLITS = {
    "training_split": ("train",),
    "validation_split": ("validation", "valid", "val", "dev"),
    "test_split": ("test",),
}
"""Where a task's configuration names a split, and the file names that stand for it beside the split's own name."""


def local_data(config: Mapping[str, Any], data: Path, shots: int) -> dict[str, Any]:
    """What to change in the configuration so that its data set comes from these files.

    Only the splits that are needed are read: the files of one data set must have the same columns, and often another
    split's have not.
    """
    role = "test_split" if config.get("test_split") else "validation_split"
    needed = {config.get(role): role}
    if shots and (pool := fewshot_pool(config)):
        needed.setdefault(pool, next((r for r in SPLITS if config.get(r) == pool), "training_split"))
    files = {split: find_files(config["task"], data, split, where, len(needed)) for split, where in needed.items()}
    builders = {BUILDERS[path.suffix] for paths in files.values() for path in paths}
    if len(builders) > 1:
        raise DataError(f"{data} holds files of several formats; use one of {', '.join(BUILDERS)} for all splits")
    kept = {key: config.get(key) if config.get(key) in files else None for key in (*SPLITS, "fewshot_split")}
    examples = dict(config.get("fewshot_config") or {})
    if examples.get("split") not in files:
        examples.pop("split", None)
    sources = {split: [str(path) for path in paths] for split, paths in files.items()}
    return {
        **kept,
        "fewshot_config": examples or None,
        "custom_dataset": None,
        "dataset_path": builders.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": sources},
    }


def fewshot_pool(config: Mapping[str, Any]) -> str | None:
    """The split that few-shot examples come from, by the harness's rules; None where the task brings its own."""
    examples = config.get("fewshot_config") or {}
    named = examples.get("split") or config.get("fewshot_split")
    if named or examples.get("samples") is not None:
        return named
    return next((config[role] for role in SPLITS if config.get(role)), None)


def find_files(task: str, data: Path, split: str | None, role: str, splits: int) -> list[Path]:
    """The files of a split: the folder's that are called so, or the one file that was named."""
    if not data.exists():
        raise DataError(f"there is no file or folder {str(data)!r} with data for task {task!r}")
    if split is None or not re.fullmatch(r"\w+(\.\w+)*", split):
        raise DataError(f"task {task!r} takes its data from {split!r}, for which local files cannot stand")
    if data.is_file():
        if splits > 1:
            raise DataError(
                f"task {task!r} needs examples besides the questions: give a folder with a file for each, or fewshot 0"
            )
        found = [data] if data.suffix in BUILDERS else []
    else:
        names = "|".join(map(re.escape, dict.fromkeys((split, *SPLITS[role]))))
        found = [p for p in sorted(data.iterdir()) if re.fullmatch(rf"(?:{names})(?:-\d+-of-\d+)?", p.stem)]
        found = [path for path in found if path.suffix in BUILDERS]
    if not found:
        there = ", ".join(sorted(p.name for p in data.iterdir())[:8]) or "nothing" if data.is_dir() else data.name
        raise DataError(
            f"task {task!r} reads split {split!r}: put {split}{' or '.join(BUILDERS)} into {data} (it holds {there})"
        )
    return found
