"""What a run folder is, and how it survives being killed.

    runs/<name>/
      config.yaml          every setting as resolved, versions, git revision, the scorer's fingerprint
      questions.jsonl      the training questions, so that the traces can be rewarded and scored again
      held_out.jsonl       the questions of the evaluation
      metrics.jsonl        one line a logged step
      traces/              Parquet, one file a generation batch (and process): trace, token log-probs, every reward
      eval/                one JSON line an item: <task>.<condition>.jsonl; "halfway" is a few of them in mid-training
      checkpoint-N/        transformers' checkpoints
      context_model/       the trained context model
      trainer_state.json   transformers' own log
      curves.png           reward and accuracy
      judge.jsonl          every verdict of the judge, with its own words (judge-001.jsonl, ...: of other processes)
      vllm.log             what the launched scoring server printed, if there was one
      result.json          written last: its presence means the run is done

A step's traces are on disk before the step is, and a checkpoint counts only when its last file is whole. So a resumed
run drops what came after its checkpoint and ends with every row exactly once.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from context_rl.config import ConfigError

SETTINGS_THAT_MAY_CHANGE = {
    *("output_dir", "run_name", "resume", "resume_from_checkpoint", "evaluate"),
    *("scorer_url", "scorer_python", "scorer_args", "scorer_memory", "scorer_device", "scorer_timeout", "scorer_cache"),
    *("judge_url", "judge_timeout", "judge_concurrency"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port"),
    *("report_to", "logging_dir", "logging_steps", "logging_first_step", "log_level", "log_completions"),
    *("save_steps", "save_strategy", "save_total_limit", "disable_tqdm", "dataloader_num_workers", "cpu_threads"),
}
"""Settings a resumed run may have otherwise than it began with: they change no trained number."""


def run_folder(output_dir: str | None, name: str, resume: bool) -> Path:
    """The folder a run uses; nothing is created.

    Args:
        output_dir: the folder asked for; unset means runs/<name>, or runs/<name>-2, -3 ... where that is taken.

    Raises:
        ConfigError: the folder holds a finished run; or a run that was not asked to go on; or nothing to go on from.
    """
    if output_dir is None:
        free, taken = Path("runs") / name, []
        while free.exists():
            taken.append(free)
            free = free.with_name(f"{name}-{len(taken) + 1}")
        unfinished = [path for path in taken if (path / "config.yaml").exists() and not is_finished(path)]
        if resume and not unfinished:
            raise ConfigError(f"--resume: no unfinished run runs/{name}; name its folder with --output_dir")
        return unfinished[-1] if resume else free
    folder = Path(output_dir)
    if is_finished(folder):
        raise ConfigError(f"{folder} already holds a finished run; choose another --output_dir")
    if resume and not (folder / "config.yaml").exists():
        raise ConfigError(f"--resume: {folder} holds no run to go on from")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; add --resume to go on with its run, or choose another --output_dir")
    return folder


def is_finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


# --- config.yaml ---


def describe(configs: Sequence[Any], fingerprint: dict[str, str], data: dict[str, str]) -> dict[str, Any]:
    """The content of config.yaml. `data` are digests of the questions, so that a resumed run has the same ones."""
    settings: dict[str, Any] = {}
    for config in configs:
        values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
        settings.update(json.loads(json.dumps(values, default=str)))
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "reasoning-gym")
    return {
        "settings": {key: value for key, value in sorted(settings.items()) if key != "hub_token"},
        "scorer": fingerprint,
        "data": data,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "git": git_revision(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
    }


def rows_digest(rows: Iterable[Sequence[str]]) -> str:
    """Short digest of rows of text, the same in every process."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()[:16]


def git_revision() -> str:
    """The revision of the code that runs, with + where it was changed since; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_same_settings(folder: Path, description: dict[str, Any]) -> None:
    """Raises ConfigError where a resumed run would go on under other settings or with another scorer."""
    begun = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    for part in ("settings", "scorer", "data"):
        for key in sorted(begun.get(part, {}).keys() | description[part].keys()):
            before, now = begun.get(part, {}).get(key), description[part].get(key)
            if before != now and key not in SETTINGS_THAT_MAY_CHANGE:
                raise ConfigError(f"--resume: {folder} was begun with {part} {key} = {before!r}, not {now!r}")


# --- checkpoints ---


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """(The newest whole checkpoint, the half-written ones).

    transformers writes straight into checkpoint-N, trainer_state.json last; a checkpoint is whole when that file can be
    read and says N. (Its own `get_last_checkpoint` takes the highest N even if it is half written.)
    """
    whole, broken = [], []
    for path in folder.glob("checkpoint-*"):
        if not path.name.rpartition("-")[2].isdigit():
            continue  # a name of the user's own
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            ok = state["global_step"] == int(path.name.rpartition("-")[2])
        except (OSError, ValueError, KeyError):
            ok = False
        (whole if ok else broken).append(path)
    whole.sort(key=lambda path: int(path.name.rpartition("-")[2]))
    return (whole[-1] if whole else None), broken


def rewind(folder: Path, step: int) -> None:
    """Removes what a killed run wrote after `step`: traces, metric lines and half-written checkpoints."""
    for path in latest_checkpoint(folder)[1]:
        shutil.rmtree(path)
    for condition in ("trained", "shuffled"):  # of a model that is about to be trained again
        for path in (folder / "eval").glob(f"*.{condition}.jsonl"):
            path.unlink()
    for path in (folder / "traces").glob("*.parquet*"):
        if path.suffix != ".parquet" or int(path.name.split("-")[1]) > step:
            path.unlink()
    metrics = folder / "metrics.jsonl"
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in kept))


# --- tables ---


def write_traces(
    folder: Path, step: int, process: int, batch: int, rows: list[dict[str, Any]], schema: pa.Schema | None = None
) -> Path:
    """One Parquet file with the traces of one generation batch; it appears whole or not at all.

    Args:
        schema: the columns' types. Without it a column that is empty in one batch and not in the next would have two.
    """
    path = folder / "traces" / f"step-{step:06d}-{process:03d}-{batch:02d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".parquet.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")
    temporary.replace(path)
    return path


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged steps in order; a last line that a kill cut short is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    out = []
    for number, line in enumerate(lines):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return out


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): a question may hold U+2028, at which it would cut.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_atomically(path: Path, text: str) -> None:
    """The file changes from its old text to the new one at once, also if the process dies in between."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
