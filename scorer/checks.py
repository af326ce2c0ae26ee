"""What both back-ends check and name the same way."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from scorer.types import Greedy, Item


def check_items(items: Sequence[Item], max_length: int, greedy: Greedy | None) -> None:
    """Raises ValueError, with the item's index, where an item cannot be scored as it stands."""
    if greedy is not None and (greedy.max_new_tokens < 1 or not greedy.stop):
        raise ValueError(f"a greedy answer needs at least one token and a stop string, got {greedy}")
    for index, item in enumerate(items):
        if not item.prefix_ids or not item.answer_ids:
            raise ValueError(f"item {index} has {len(item.prefix_ids)} prefix and {len(item.answer_ids)} answer tokens")
        if (length := len(item.prefix_ids) + len(item.answer_ids)) > max_length:
            raise ValueError(f"item {index} has {length} tokens, but the model takes {max_length}")
        if greedy is not None and (length := len(item.prefix_ids) + greedy.max_new_tokens) > max_length:
            raise ValueError(f"item {index} needs {length} tokens with its greedy answer; the model takes {max_length}")


def weights_digest(folder: str) -> str | None:
    """Digest of the contents of a local model's weight files, about a second a gigabyte; None for a hub id."""
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()[:16]


def revision(name: str) -> str | None:
    """The commit of a hub model in this machine's cache, which is what a server started here has loaded."""
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return getattr(config, "_commit_hash", None)


def why_not_loaded(name: str, error: BaseException) -> str:
    """One line on a model that transformers could not load."""
    missing = "" if Path(name).exists() else "there is no such folder here, and "
    return missing + first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
