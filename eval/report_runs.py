"""Run folders, as a report reads them.

Only config.yaml, result.json, metrics.jsonl and eval/*.jsonl are read here. What cannot be read is never guessed: the
folder is listed with the reason and its numbers are left out.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from context_rl import runs

Settings = dict[str, Any]

METRICS = {
    "accuracy": "accuracy",
    "reward": "reward",
    "entropy": "entropy",
    "tokens": "trace_tokens",
    "leak": "rewards/leak",
    "no_spread": "no_spread",
    "seconds": "seconds/step",
    "scoring": "seconds/scoring",
}
"""Our name of a curve -> its key in metrics.jsonl."""

WITHOUT_EFFECT = runs.SETTINGS_THAT_MAY_CHANGE | {"seed", "data_seed", "project", "local_rank"}
"""Settings in which the runs of an arm may differ: the seed, and those that change no number."""

MARKERS = ("config.yaml", "result.json", "metrics.jsonl", "questions.jsonl", "traces")
"""A folder with one of these is a run folder, maybe a broken one."""

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"


class Unreadable(Exception):
    """Why a run folder cannot be used, in one line."""


class Rows(NamedTuple):
    """One condition and decoding of eval/*.jsonl: ids, right (1, 0) and log p in nats; NaN where unscored."""

    ids: list[str]
    correct: np.ndarray
    logprob: np.ndarray


@dataclass
class Run:
    """A run folder. `curves` holds arrays as long as `steps`, NaN where nothing was logged; see `METRICS`.

    Attributes:
        config: settings that make the arm, see `arm_settings`; empty where config.yaml cannot be read.
        status: finished (result.json is there), stopped early (it is not) or failed (a file cannot be read).
        problem: why it failed.
        rows: (condition, decoding) -> the held-out rows.
        window: logged steps of a running mean: a tenth of the longest run of its arm, see `group_arms`.
    """

    folder: Path
    status: str
    problem: str = ""
    config: Settings = field(default_factory=dict)
    seed: tuple[Any, Any] = (None, None)
    result: dict[str, Any] = field(default_factory=dict)
    steps: np.ndarray = field(default_factory=lambda: np.array([]))
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[tuple[str, str], Rows] = field(default_factory=dict)
    git: str = ""
    window: int = 1

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed_text(self) -> str:
        return "-" if self.seed[0] is None else str(self.seed[0])

    def has(self, name: str) -> bool:
        """Whether anything of a curve was logged: where a judge grades, a likelihood reward logs no accuracy."""
        return name in self.curves and bool((~np.isnan(self.curves[name])).any())

    def summary(self, condition: str, decoding: str) -> dict[str, Any]:
        """result.json's numbers of a condition; empty where there are none."""
        return ((self.result.get("eval") or {}).get(condition) or {}).get(decoding) or {}


# --- reading ---


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders among the paths and below them, each once.

    Empty folders, and paths that hold no run, are among them so that they are listed. Hidden folders, earlier reports
    and folders of other things are passed over.
    """
    found: dict[Path, Path] = {}

    def visit(path: Path, named: bool) -> None:
        inside = list(path.iterdir()) if path.is_dir() else []
        below = sorted(p for p in inside if p.is_dir() and not p.name.startswith("."))
        if any((path / marker).exists() for marker in MARKERS) or not inside or (named and not below):
            found.setdefault(path.resolve(), path)
            return
        for folder in below:
            if not (folder / "report.md").exists():
                visit(folder, named=False)

    for path in paths:
        visit(path, named=True)
    return list(found.values())


FAILURES = "failures.json"
"""What `recipes.ablate` leaves beside its run folders: the name of a run that failed -> why."""


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """All runs of the paths; those that their ablation calls failed are so, also where they left no folder."""
    found = [read_run(folder) for folder in find_runs(paths)]
    for parent in dict.fromkeys([*(run.folder.parent for run in found), *paths]):
        try:
            failures = mapping(parent / FAILURES)
        except Unreadable:
            continue
        known = {run.name: run for run in found if run.folder.parent == parent}
        for name, why in failures.items():
            if name not in known:
                found.append(Run(parent / name, FAILED, str(why)))
            elif known[name].status == STOPPED:
                known[name].status, known[name].problem = FAILED, str(why)
    return found


def read_run(folder: Path) -> Run:
    """The run of a folder; what cannot be read makes it a failed one."""
    run = Run(folder, FAILED)
    try:
        described = mapping(folder / "config.yaml")
        settings = described.get("settings")
        if not isinstance(settings, dict):
            raise Unreadable("config.yaml has no settings")
        run.seed = (settings.get("seed"), settings.get("data_seed"))
        run.config, run.git = arm_settings(described), str(described.get("git", ""))
        run.steps, run.curves = read_curves(folder)
        if (folder / "result.json").exists():
            run.result = mapping(folder / "result.json")
            for path in sorted((folder / "eval").glob("*.jsonl")):
                run.rows.update(read_rows(path))
        run.status = FINISHED if run.result else STOPPED
    except Unreadable as error:
        run.problem = str(error)
        run.result, run.curves, run.rows, run.steps = {}, {}, {}, np.array([])
    return run


def mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that must hold a mapping."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.load(text, loader)
    except FileNotFoundError:
        raise Unreadable(f"no {path.name}" if path.parent.is_dir() else "no such folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path.name} cannot be read ({type(error).__name__})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise Unreadable(f"{path.name} is broken: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(value, dict) or not value:
        raise Unreadable(f"{path.name} holds no mapping")
    return value


def arm_settings(described: Mapping[str, Any]) -> Settings:
    """What makes an arm: settings that change a number, the base model's weights and the held-out questions.

    The training questions are drawn by the seed, so they are part of no arm.
    """
    settings = {key: value for key, value in described["settings"].items() if key not in WITHOUT_EFFECT}
    scorer, data = described.get("scorer") or {}, described.get("data") or {}
    return settings | {
        "base model's weights": scorer.get("weights"),
        "held-out questions": data.get("held_out"),
    }


def read_curves(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(steps, curves) of metrics.jsonl; nothing where it is not there."""
    try:
        lines = runs.read_metrics(folder)
        steps = np.array([line["step"] for line in lines], dtype=float)
        curves = {name: np.array([finite(line.get(key)) for line in lines]) for name, key in METRICS.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"metrics.jsonl is broken: {type(error).__name__}: {error}"[:160]) from None
    return steps, curves


def read_rows(path: Path) -> dict[tuple[str, str], Rows]:
    """(condition, decoding) -> rows of an eval file; only of the conditions that the report compares."""
    condition = path.name.rsplit(".", 2)[-2]
    if condition not in ("trained", "none"):
        return {}
    by: dict[str, list[tuple[str, float, float]]] = {}
    try:
        for row in runs.read_jsonl(path):
            values = (sys.intern(row["id"]), finite(row["correct"]), finite(row["logprob"]))
            by.setdefault(row["decoding"], []).append(values)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Unreadable(f"eval/{path.name} is broken: {type(error).__name__}: {error}"[:160]) from None
    out = {}
    for decoding, rows in by.items():
        ids, correct, logprob = zip(*rows, strict=True)
        if len(set(ids)) < len(ids):
            raise Unreadable(f"eval/{path.name} has an item twice")
        out[condition, decoding] = Rows(list(ids), np.array(correct), np.array(logprob))
    return out


def finite(value: Any) -> float:
    """The number; NaN for nothing and for what is no finite number."""
    return math.nan if value is None or not math.isfinite(value) else float(value)
