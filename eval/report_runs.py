"""Run folders read, and grouped into arms: runs that differ in nothing but their seed.

Only config.yaml, result.json, metrics.jsonl and eval/*.jsonl are read here. What cannot be read is never guessed: the
folder is listed with the reason and its numbers are left out.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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

NAMED_FIRST = ("reward", "scale_rewards", "task", "scorer_model", "model_name_or_path", "learning_rate")
"""Settings that name an arm before others do, where they tell arms apart."""

CALLED = {"scorer_model": "base", "model_name_or_path": "context", "task": "task"}
"""Settings that an arm's name calls by another word."""

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


@dataclass
class Arm:
    """Runs of one configuration, by seed."""

    name: str
    config: Settings
    runs: list[Run]

    def of(self, status: str) -> list[Run]:
        return [run for run in self.runs if run.status == status]

    @cached_property
    def finished(self) -> list[Run]:
        return self.of(FINISHED)


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


# --- arms ---


def group_arms(found: Sequence[Run], by: Sequence[str] = ()) -> tuple[list[Arm], list[str]]:
    """(Arms of the runs whose settings are known, notes). Of two runs of one seed the one that got further is kept.

    Args:
        by: settings that name the arms before others do.
    """
    groups: dict[str, list[Run]] = {}
    for run in found:
        if run.config:
            groups.setdefault(canonical(run.config), []).append(run)
    configs = [members[0].config for members in groups.values()]
    arms, notes = [], []
    for name, config, members in zip(arm_names(configs, by), configs, groups.values(), strict=True):
        kept: dict[Any, Run] = {}
        for run in sorted(members, key=progress, reverse=True):
            first = kept.setdefault(run.seed, run)
            if first is not run:
                notes.append(f"{name}: seed {run.seed_text} is there twice; {run.name} is left out for {first.name}")
        ordered = sorted(kept.values(), key=lambda run: (str(type(run.seed[0])), run.seed[0] or 0, run.name))
        for run in ordered:
            run.window = max(1, max(len(other.steps) for other in ordered) // 10)
        arms.append(Arm(name, config, ordered))
    if mixed := [arm.name for arm in arms if len({run.git for run in arm.runs}) > 1]:
        notes.append(f"runs of one arm are of different revisions of the code: {', '.join(mixed)}")
    return arms, notes


def progress(run: Run) -> tuple[bool, bool, float, str]:
    return run.status == FINISHED, run.status == STOPPED, run.steps[-1] if len(run.steps) else 0.0, run.name


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def differing(configs: Sequence[Settings], by: Sequence[str] = ()) -> list[str]:
    """Settings in which the arms differ, those that name arms first."""
    keys = {key for config in configs for key in config}
    differ = {key for key in keys if len({canonical(config.get(key)) for config in configs}) > 1}
    first = [key for key in (*by, *NAMED_FIRST) if key in differ]
    return list(dict.fromkeys([*first, *sorted(differ, key=lambda key: (" " in key, key))]))


def arm_names(configs: Sequence[Settings], by: Sequence[str] = ()) -> list[str]:
    """A name for each arm: its values of as few of the differing settings as tell all arms apart."""
    chosen: list[str] = [key for key in dict.fromkeys(by) if any(key in config for config in configs)]

    def classes(keys: Sequence[str]) -> int:
        return len({canonical([config.get(key) for key in keys]) for config in configs})

    for key in differing(configs, by):
        if key not in chosen and classes([*chosen, key]) > classes(chosen):
            chosen.append(key)
    chosen = chosen or ["reward"]
    labels = reward_labels([config.get("reward") for config in configs])

    def word(config: Settings, key: str) -> str:
        if key == "reward":
            return labels[canonical(config.get("reward"))]
        return (f"{CALLED[key]} " if key in CALLED else f"{key}=") + setting_text(config.get(key))

    return [", ".join(word(config, key) for key in chosen) for config in configs]


def reward_labels(specs: Sequence[Any]) -> dict[str, str]:
    """canonical(spec) -> what to call it: the reward's name, or its compact form where two would share that."""
    distinct = {canonical(spec): spec for spec in specs}
    names = {key: reward_name(spec) for key, spec in distinct.items()}
    taken = list(names.values())
    return {key: names[key] if taken.count(names[key]) == 1 else compact(spec) for key, spec in distinct.items()}


def reward_name(spec: Any) -> str:
    """The word that a specification begins with."""
    return str(next(iter(spec))) if isinstance(spec, dict) and len(spec) == 1 else compact(spec)


def compact(spec: Any) -> str:
    """A reward's specification on a line: threshold(probability, tau quantile 0.7 window 1024)."""
    if not isinstance(spec, dict):
        return setting_text(spec)
    [(name, options), *rest] = spec.items()
    if rest or not isinstance(options, dict):
        return " ".join(f"{key} {setting_text(value)}" for key, value in spec.items())
    parts = [(f"{key} " if key != "of" else "") + compact(value) for key, value in options.items()]
    return f"{name}({', '.join(parts)})"


def setting_text(value: Any) -> str:
    """A setting's value, short: of a path the last part, so that no machine's folders stand in a report."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2] or value
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(setting_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {setting_text(inner)}" for key, inner in value.items()) + "}"
    return "none" if value is None else str(value)


def parts_of(spec: Any) -> int:
    """How complicated a reward is: the names and numbers in its specification."""
    if isinstance(spec, dict):
        return sum((key != "of") + parts_of(value) for key, value in spec.items())
    return sum(map(parts_of, spec)) if isinstance(spec, list | tuple) else 1
