"""Runs grouped into arms, which differ in nothing but their seed; and what to call an arm."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eval.report_runs import FINISHED, STOPPED, Run, Settings

NAMED_FIRST = ("reward", "scale_rewards", "task", "scorer_model", "model_name_or_path", "learning_rate")
"""Settings that name an arm before others do, where they tell arms apart."""

CALLED = {"scorer_model": "base", "model_name_or_path": "context", "task": "task"}
"""Settings that an arm's name calls by another word."""


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
