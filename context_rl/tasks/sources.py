"""What --data may name: a file, a folder of files, a folder from `save_to_disk`, a data set on the hub."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from context_rl.tasks.files import READERS, Keep, Table, columns_to_read, numbered_rows, read_file
from context_rl.tasks.types import DataError

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
"""A word in a file's name, or the whole name of a hub split -> the split it is."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
HUB_TIMEOUT_S = 10

Splits = dict[str, list[Table]]
"""Tables by split; "" where no name tells what they are."""


@dataclass(frozen=True)
class Source:
    """The tables to train on, those to hold out if the data says which, and what was decided on the way."""

    train: list[Table]
    held_out: list[Table] | None
    notes: list[str]


def read_source(data: str, eval_data: str | None, keep: Keep, prefer: Sequence[str] = ("test", "validation")) -> Source:
    """Read `data`; held out is `eval_data`, else the data's test split, else its validation split.

    A single split is for training, whatever its name.

    Args:
        prefer: which of the two to hold out where there are both; the first one that there is.

    Raises:
        DataError: nothing there, nothing readable in it, or splits that cannot be told apart.
    """
    splits = _read_splits(data, keep)
    held_out, notes = None, []
    if len(splits) == 1:
        [(only, train)] = splits.items()
        if only not in ("", "train") and eval_data is None:
            notes.append(f"{data}: its only split, {only!r}, gives both the training and the held-out questions")
    elif "train" not in splits:
        raise DataError(f"{data}: has no train split, only {_listed(splits)}; name one file with --data")
    else:
        train = splits.pop("train")
        if eval_data is None:
            held_out = splits.pop(next((split for split in prefer if split in splits), ""), None)
        notes += [f"{data}: its split {split!r} is not used" for split in splits]
    if eval_data is not None:
        splits = _read_splits(eval_data, keep)
        held_out = splits.pop(next(split for split in (*prefer, *splits) if split in splits))
        notes += [f"{eval_data}: its split {split!r} is not used" for split in splits]
    return Source(train, held_out, notes)


def _read_splits(data: str, keep: Keep) -> Splits:
    path = Path(data).expanduser()
    if path.is_file():
        return {"": [read_file(path, keep)]}
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        return _saved_to_disk(path, keep) if saved else _folder(path, keep)
    if HUB_ID.fullmatch(data) and path.suffix.lower() not in READERS:
        return _hub(data, keep)
    raise DataError(f"{data}: there is no such file or folder; check the path")


def _folder(folder: Path, keep: Keep) -> Splits:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS and p.name[0] != ".")
    if not files:
        raise DataError(f"{folder}: no file in it ends in {', '.join(READERS)}; name a folder that holds some itself")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        found = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", file.stem.lower()) if word in SPLIT_WORDS}
        if len(found) > 1:
            raise DataError(f"{folder}: by its name {file.name} could be {_listed(found)}; rename it")
        by_split.setdefault(found.pop() if found else "", []).append(file)
    if len(by_split) > 1 and "" in by_split:
        nameless = ", ".join(file.name for file in by_split[""])
        raise DataError(f"{folder}: no telling by its name what {nameless} is for; rename it (train, test) or move it")
    return {split: [read_file(file, keep) for file in files] for split, files in by_split.items()}


def _saved_to_disk(folder: Path, keep: Keep) -> Splits:
    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:
        raise DataError(f"{folder}: `datasets.load_from_disk` failed ({_one_line(error)}); save it again") from error
    return _from_datasets(loaded if isinstance(loaded, Mapping) else {"": loaded}, folder.name, str(folder), keep)


def _hub(hub_id: str, keep: Keep) -> Splits:
    """A hub data set; "owner/name:config" names one of its configurations."""
    name, _, config = hub_id.partition(":")
    _check_hub(name)
    try:
        loaded = datasets.load_dataset(name, config or None)
    except ConnectionError as error:
        raise DataError(_unreachable(name, "offline, and not in the cache")) from error
    except Exception as error:
        hint = "see `datasets.load_dataset`" if config else "a configuration is named as in owner/name:config"
        raise DataError(f"{name}: cannot be loaded from the hub ({_one_line(error)}); {hint}") from error
    return _from_datasets(loaded, hub_id, hub_id, keep)


def _check_hub(name: str) -> None:
    """One short question to the hub, because without a network `load_dataset` retries for half a minute."""
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except OfflineModeIsEnabled:
        return  # the cache may have it
    except HfHubHTTPError as error:
        missing = getattr(error.response, "status_code", None) in (401, 403, 404)
        cause = "there is none of that name, or it is private" if missing else _one_line(error)
        hint = "check the name, or log in with `hf auth login`"
        raise DataError(f"{name}: no file or folder here, and not on the hub ({cause}); {hint}") from error
    except Exception as error:
        raise DataError(_unreachable(name, type(error).__name__)) from error


def _unreachable(name: str, cause: str) -> str:
    return (
        f"{name}: no file or folder here, and the hub cannot be reached ({cause}); check the network, set "
        "HF_HUB_OFFLINE=1 to use a copy from the cache, or name local files with --data"
    )


def _from_datasets(splits: Mapping[str, datasets.Dataset], label: str, name: str, keep: Keep) -> Splits:
    tables: Splits = {}
    for split, rows in splits.items():
        suffix = f"/{split}" if split else ""
        if len(rows) == 0:
            raise DataError(f"{name}{suffix}: has no rows; give data that has some")
        columns = tuple(rows.column_names)
        numbered = numbered_rows(label + suffix, name + suffix, rows.select_columns(columns_to_read(columns, keep)))
        tables.setdefault(SPLIT_WORDS.get(split, split), []).append(Table(name + suffix, columns, numbered))
    return tables


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
