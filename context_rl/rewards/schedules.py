"""Thresholds that move during training: by the share of it that is done, or with the values seen of late."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from context_rl.rewards.inputs import RewardError

KINDS = ("linear", "cosine", "quantile")


def linear(start: float, end: float, done: float) -> float:
    """start + (end - start) * done, for `done` in [0, 1]."""
    return start + (end - start) * done


def cosine(start: float, end: float, done: float) -> float:
    """Half a cosine wave from `start` to `end`: slow at both ends."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation, as numpy's default. Raises ValueError for no values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values have no quantile")
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


class Schedule:
    """A threshold: a number, or one that moves.

    In a recipe:

        tau: 0.3
        tau: {linear: [0.0, 0.5]}                 from 0.0 at the first step to 0.5 at the last
        tau: {cosine: [0.0, 0.5], until: 0.5}     ... at half of the steps, and 0.5 from there on
        tau: {quantile: 0.7, window: 1024}        the 0.7-quantile of the last 1,024 values, the present ones included

    `state` holds the window; a resumed run goes on with it.
    """

    def __init__(self, spec: Any, where: str):
        self.where = where
        options = (
            dict(spec) if isinstance(spec, dict) else {"linear": [check_number(where, spec, -math.inf, math.inf)] * 2}
        )
        kinds = [kind for kind in KINDS if kind in options]
        if len(kinds) != 1:
            raise RewardError(f"{where} is {spec!r}; it can be a number or a mapping with one of {', '.join(KINDS)}")
        self.kind = kinds[0]
        arguments = options.pop(self.kind)
        self.moves = isinstance(spec, dict)
        self.window: deque[float] = deque()
        if self.kind == "quantile":
            self.q = check_number(f"{where}: quantile", arguments, 0, 1)
            size = check_number(f"{where}: window", options.pop("window", 1024), 1, 1e9)
            if size != int(size):
                raise RewardError(f"{where}: window is {size!r}; it must be a whole number")
            self.window = deque(maxlen=int(size))
        else:
            if not isinstance(arguments, list | tuple) or len(arguments) != 2:
                raise RewardError(f"{where}: {self.kind} is {arguments!r}; it must be [start, end]")
            self.start, self.end = (check_number(f"{where}: {self.kind}", a, -math.inf, math.inf) for a in arguments)
            self.until = check_number(f"{where}: until", options.pop("until", 1.0), 1e-9, 1)
        if options:
            raise RewardError(f"{where}: {self.kind} takes no {', '.join(map(repr, options))}")

    def at(self, values: Sequence[float], progress: float) -> float:
        """The threshold for these values, at this share of the training. A quantile's window takes them up first."""
        if self.kind == "quantile":
            self.window.extend(values)
            return quantile(self.window, self.q)
        done = min(max(progress / self.until, 0.0), 1.0)
        return (linear if self.kind == "linear" else cosine)(self.start, self.end, done)

    @property
    def state(self) -> list[float]:
        """What a resumed run needs to go on alike."""
        return list(self.window)

    @state.setter
    def state(self, values: Sequence[float]) -> None:
        self.window.clear()
        self.window.extend(values)


class SpreadFilter:
    """Which groups have spread enough to learn from: std >= beta * the running mean of the groups' std.

    RLPR (Yu et al. 2025), which starts from the first batch's mean and moves by 1 - `decay` a batch.
    """

    def __init__(self, beta: float, decay: float):
        self.beta, self.decay = beta, decay
        self.running: float | None = None

    def keep(self, stds: Sequence[float]) -> list[bool]:
        """One verdict a group of the present batch, which the running mean takes up first."""
        if stds:
            present = math.fsum(stds) / len(stds)
            self.running = present if self.running is None else linear(present, self.running, self.decay)
        return [std >= self.beta * (self.running or 0.0) for std in stds]

    @property
    def state(self) -> list[float]:
        """What a resumed run needs to go on alike."""
        return [] if self.running is None else [self.running]

    @state.setter
    def state(self, values: Sequence[float]) -> None:
        self.running = values[0] if values else None


def check_number(where: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite number in [low, high].

    Raises:
        RewardError: it is none, or lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RewardError(f"{where} must be a finite number, not {value!r}")
    if not low <= value <= high:
        raise RewardError(f"{where} is {value!r}; it must lie between {low:g} and {high:g}")
    return float(value)
