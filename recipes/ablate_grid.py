"""From a grid's YAML to its runs: names, settings, commands, and which arms are one experiment. Nothing is run here.

    base: ../symbolic.yaml              # the recipe below all runs, a path from this file
    settings: {max_steps: 30}           # for all runs, over the recipe
    axes:                               # every value of one with every value of the others, in this order
      reward: [probability, binary]     # an axis named after a recipe key: its values
      scale_rewards: {none: none, std: group}       # ... with names of your own
      size:                             # any other axis: a name -> recipe keys
        small: {max_completion_length: 32}
        large: {max_completion_length: 64, learning_rate: 5.0e-5}
    exclude:                            # combinations to leave out; a list stands for any of its values
      - {reward: binary, scale_rewards: [none]}
    arms:                               # instead of a product, or as its first axis: named settings
      plain: {reward: probability}
      cut: {reward: {threshold: {tau: 0.5}}, scale_rewards: none}

A value of an axis that is named after a recipe key may set further keys too: as a mapping that holds that key.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from context_rl.config import CONFIGS, ConfigError, ContextConfig, Parser, check_key, mapping, read_recipe
from context_rl.rewards import Reward, RewardError
from context_rl.rewards.advantages import SCALES
from context_rl.rewards.equivalence import Verdict, compare_arms
from context_rl.runs import SETTINGS_THAT_MAY_CHANGE

PARTS = ("base", "settings", "axes", "exclude", "arms")
NOT_FOR_A_GRID = {"output_dir": "use --out", "resume": "cut runs are resumed anyway", "help": "", "env": ""}
LONGEST_LABEL, LONGEST_NAME = 60, 200
RESERVED = ("logs",)


@dataclass(frozen=True)
class Run:
    """One cell of a grid.

    Attributes:
        name: of its folder.
        labels: axis -> the name of its value.
        settings: what the run has otherwise than the recipe.
        resolved: all settings, those of the command line and the defaults included.
        explicit: the keys that the recipe, the grid or the command line sets.
    """

    name: str
    labels: Mapping[str, str]
    settings: Mapping[str, Any]
    resolved: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    explicit: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Grid:
    """A grid, checked.

    Attributes:
        base: the recipe.
        extra: words of the command line that go to every run.
    """

    path: Path
    base: Path
    runs: tuple[Run, ...]
    extra: tuple[str, ...] = ()


# --- reading ---


def read_grid(path: Path, extra: Sequence[str] = (), only: Sequence[str] = ()) -> Grid:
    """The grid of a file, with `--key value` words for all of its runs, of which `only` patterns choose some.

    Raises:
        ConfigError: one line that names the file and the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the grid {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("base"), str):
        raise ConfigError(f"{path} must hold `base: RECIPE` and axes or arms")
    if unknown := [key for key in content if key not in PARTS]:
        raise ConfigError(f"{path}: a grid has no {unknown[0]!r}; it has {', '.join(PARTS)}")
    base = path.parent / content["base"]
    recipe = read_recipe(base.resolve() if base.exists() else base)
    everywhere = content.get("settings") or {}
    check_settings(everywhere, f"{path}: settings")
    axes = read_axes(content, str(path))
    runs = expand(axes, read_exclude(content.get("exclude") or [], axes, str(path)), str(path))
    runs = [run for run in runs if not only or any(fnmatchcase(run.name, pattern) for pattern in only)]
    if not runs:
        raise ConfigError(f"{path}: no run is called {' or '.join(only)}")
    return Grid(path, base, checked(runs, recipe, everywhere, extra, axes, str(path)), tuple(extra))


def read_axes(content: Mapping[str, Any], where: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Axis -> name of a value -> settings. `arms` are an axis "arm", the first."""
    given, axes = content.get("axes") or {}, {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: axes must be a mapping, axis -> values")
    if arms := content.get("arms"):
        if isinstance(arms, list) and all(isinstance(arm, dict) and "name" in arm for arm in arms):
            arms = {str(arm["name"]): {k: v for k, v in arm.items() if k != "name"} for arm in arms}
        if not isinstance(arms, dict) or "arm" in given or len(arms) < len(content["arms"]):
            raise ConfigError(
                f"{where}: arms must be a mapping, name -> settings, of different names; no axis is `arm`"
            )
        given = {"arm": arms} | given
    for axis, values in given.items():
        if not isinstance(values, list | dict) or not values:
            raise ConfigError(f"{where}: axes: {axis} must be a list of values or a mapping, name -> settings")
        pairs = list(values.items()) if isinstance(values, dict) else [(spelt(value), value) for value in values]
        labels = safe_labels([str(label) for label, _ in pairs], [value for _, value in pairs])
        if len(set(labels)) < len(labels):
            raise ConfigError(f"{where}: axes: {axis} has one value twice")
        found = {}
        for label, (_, value) in zip(labels, pairs, strict=True):
            found[label] = settings_of(str(axis), value, f"{where}: {axis}: {label}")
        axes[str(axis)] = found
    if not axes:
        raise ConfigError(f"{where} has neither axes nor arms")
    keys = [(axis, {key for settings in values.values() for key in settings}) for axis, values in axes.items()]
    for (one, mine), (other, its) in itertools.combinations(keys, 2):
        if both := sorted(mine & its):
            raise ConfigError(f"{where}: {one} and {other} both set {both[0]}")
    return axes


def settings_of(axis: str, value: Any, where: str) -> dict[str, Any]:
    """The settings of one value of an axis, checked."""
    try:
        check_key(axis, where)
    except ConfigError as error:
        if not isinstance(value, dict):
            what = f"{where} must be a mapping of recipe keys, for the axis is named after none"
            raise ConfigError(f"{what} ({error})") from None
        settings = value
    else:
        settings = value if isinstance(value, dict) and axis in value else {axis: value}
    check_settings(settings, where)
    return settings


def check_settings(settings: Any, where: str) -> None:
    """Raises ConfigError for what is no mapping of recipe keys, and for a reward that is none."""
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} must be a mapping of recipe keys")
    for key, value in settings.items():
        check_key(str(key), where)
        if key in NOT_FOR_A_GRID:
            raise ConfigError(f"{where}: {key} is nothing for a grid to set; {NOT_FOR_A_GRID[key]}".rstrip("; "))
        if value is None:
            raise ConfigError(f"{where}: {key} has no value; leave it out")
        if key == "reward":
            try:
                Reward(value)
            except RewardError as error:
                raise ConfigError(f"{where}: reward: {error}") from None


def read_exclude(given: Any, axes: Mapping[str, Mapping[str, Any]], where: str) -> list[dict[str, set[str]]]:
    """The combinations to leave out: axis -> names of values."""
    if not isinstance(given, list) or not all(isinstance(entry, dict) and entry for entry in given):
        raise ConfigError(f"{where}: exclude must be a list of mappings, axis -> value")
    found = []
    for entry in given:
        found.append({})
        for axis, value in entry.items():
            labels = {safe(spelt(one)) for one in (value if isinstance(value, list) else [value])}
            if axis not in axes or not labels <= axes[axis].keys():
                raise ConfigError(f"{where}: exclude: {axis}: {value} is on no axis")
            found[-1][axis] = labels
    return found


# --- expanding ---


def expand(
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]], exclude: Sequence[Mapping[str, set[str]]], where: str
) -> list[Run]:
    """The product of the axes, less what is excluded."""
    runs = []
    for labels in itertools.product(*axes.values()):
        cell = dict(zip(axes, labels, strict=True))
        if any(all(cell[axis] in labels for axis, labels in entry.items()) for entry in exclude):
            continue
        settings = {k: v for axis, label in cell.items() for k, v in axes[axis][label].items()}
        runs.append(Run(run_name(cell), cell, settings))
    if not runs:
        raise ConfigError(f"{where}: everything is excluded")
    return runs


def run_name(cell: Mapping[str, str]) -> str:
    """A folder's name: axis=value, joined by commas; an arm is its name alone."""
    name = ",".join(label if axis == "arm" else f"{safe(axis)}={label}" for axis, label in cell.items())
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{short_hash(name)}"
    return f"{name}-run" if name in RESERVED else name


def spelt(value: Any) -> str:
    """A value as text; true and false as YAML writes them."""
    return value if isinstance(value, str) else json.dumps(value)


def safe(text: str) -> str:
    """Letters, digits and . _ + - only, so that no shell and no file system minds."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.")


def safe_labels(texts: Sequence[str], values: Sequence[Any]) -> list[str]:
    """Names of an axis's values, with a short hash where a name would be empty, too long or another's."""
    labels = [safe(text) for text in texts]
    taken = [label.casefold() for label in labels]
    return [
        label
        if label and len(label) <= LONGEST_LABEL and taken.count(label.casefold()) == 1
        else f"{label[:LONGEST_LABEL]}-{short_hash([text, value])}".lstrip("-")
        for label, text, value in zip(labels, texts, values, strict=True)
    ]


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:6]


# --- settings as words ---


def flags(settings: Mapping[str, Any]) -> list[str]:
    """`--key value` words that train_context.py reads back to the same settings."""
    words = []
    for key, value in settings.items():
        if isinstance(value, list):
            words += [f"--{key}", *(spelt(one) for one in value)]
        elif (text := spelt(value)).startswith("-"):
            words.append(f"--{key}={text}")  # argparse takes a word of its own for the next flag
        else:
            words += [f"--{key}", text]
    return words


def shell(words: Sequence[str]) -> str:
    """One line for bash, whatever is in the words: a line end is written as $'...\\n...'."""

    def quoted(word: str) -> str:
        if "\n" not in word:
            return shlex.quote(word)
        return "$'" + word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    return " ".join(quoted(word) for word in words)


@cache
def parser() -> argparse.ArgumentParser:
    return Parser(CONFIGS)


def checked(
    runs: Sequence[Run],
    recipe: Mapping[str, Any],
    everywhere: Mapping[str, Any],
    extra: Sequence[str],
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]],
    where: str,
) -> tuple[Run, ...]:
    """The runs with all their settings, each of them of its type and allowed.

    What only a machine knows (bf16 without a GPU, a model that is not there) is left to the run itself.
    """
    keys = {word[2:].partition("=")[0].replace("-", "_") for word in extra if word[:2] == "--" and " " not in word}
    keys = {key.removeprefix("no_") for key in keys}
    for key in sorted(keys):
        check_key(key, "the command line")
        if key in NOT_FOR_A_GRID:
            raise ConfigError(f"--{key} is nothing for a grid; {NOT_FOR_A_GRID[key]}".rstrip("; "))
        if own := [axis for axis, values in axes.items() if any(key in settings for settings in values.values())]:
            raise ConfigError(f"--{key}: {where} sets it run by run ({own[0]}); choose runs with --only instead")
    found = []
    for run in runs:
        settings = {**everywhere, **run.settings}
        below = {k: v for k, v in recipe.items() if v is not None and k not in NOT_FOR_A_GRID}
        try:
            values = vars(parser().parse_args([*flags(below | settings), *extra]))
            own = ContextConfig(**{field.name: values[field.name] for field in dataclasses.fields(ContextConfig)})
        except ConfigError as error:
            raise ConfigError(f"{where}: run {run.name}: {' '.join(str(error).split())}") from None
        resolved = values | dataclasses.asdict(own)
        explicit = frozenset(below.keys() | settings.keys() | keys)
        found.append(dataclasses.replace(run, settings=settings, resolved=resolved, explicit=explicit))
    return tuple(found)


# --- comparing settings ---


def plain(key: str, value: Any) -> str:
    """A setting for comparison, whether from a command line or from config.yaml."""
    if key in ("reward", "task_options"):
        bare = isinstance(value, str) and not value.lstrip().startswith("{")
        return json.dumps(value if bare else mapping(key, value), sort_keys=True)
    if key == "scale_rewards":
        return scale_of(value)
    if isinstance(value, int | float):
        return repr(float(value))
    return json.dumps(value, sort_keys=True, default=lambda other: getattr(other, "value", str(other)))


def scale_of(value: Any) -> str:
    """TRL's name of a scaling, which may be written as true or false."""
    return {"true": "group", "false": "none"}.get(str(value).lower(), str(value))


def other_setting(run: Run, begun: Mapping[str, Any]) -> str | None:
    """The first setting that a folder's config.yaml has otherwise than the grid asks for, in words."""
    for key in sorted(run.explicit - SETTINGS_THAT_MAY_CHANGE - {"fsdp", "deepspeed"}):
        before, now = begun.get(key), run.resolved.get(key)
        known = key in begun and (not isinstance(before, dict) or key in ("reward", "task_options"))
        if known and plain(key, before) != plain(key, now):
            return f"{key} = {before!r}, not {now!r}"
    return None


def identity(run: Run, without: Sequence[str] = ()) -> str:
    """All settings that change a trained number, as one text."""
    left_out = SETTINGS_THAT_MAY_CHANGE | set(without)
    return json.dumps({k: plain(k, v) for k, v in sorted(run.resolved.items()) if k not in left_out})


def same_settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Pairs of runs that are one run under two names."""
    first: dict[str, str] = {}
    return [(first[key], r.name) for r in runs for key in [identity(r)] if first.setdefault(key, r.name) != r.name]


def equivalent_arms(runs: Sequence[Run]) -> list[tuple[str, str, str, Verdict]]:
    """What `compare_arms` says, by argument, of arms that differ in nothing but reward and seed."""
    together: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        key = scale_of(run.resolved["scale_rewards"]), identity(run, ["reward", "seed", "scale_rewards"])
        together.setdefault(key, {})[reward_label(run)] = run.resolved["reward"]
    found = {}
    for (scale, _), arms in together.items():
        for verdict in compare_arms(arms, [scale] if scale in SCALES else []):
            found[verdict[:3]] = verdict
    order = list(SCALES)
    return sorted(found.values(), key=lambda verdict: order.index(verdict[2]))


def reward_label(run: Run) -> str:
    """The reward as the grid calls it: the label of the arm or axis that sets it, else its own name."""
    for axis in ("reward", "arm"):
        if axis in run.labels:
            return run.labels[axis]
    return safe(spelt(run.resolved["reward"]))
