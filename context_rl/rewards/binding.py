"""What a recipe calls a formula with, checked by name, kind and range before anything runs."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from context_rl.rewards.formulas import FORMULAS
from context_rl.rewards.inputs import Option, RewardError, RewardInputs
from context_rl.rewards.schedules import check_number

INF = math.inf
PROBE = RewardInputs((-1.0,), (-1.0,), False, 1.0, 1.0, options=(Option(-1.0, 1), Option(-1.0, 1)), label=0, judged=0.0)
"""What every formula fits: parameters that are out of range are found before the run."""


def own_function(path: str) -> Callable[..., float]:
    """The user's function at a dotted path."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: ".name", "..name"
        raise RewardError(f"reward {path!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise RewardError(f"reward {path!r} is no function but {function!r:.60}")
    return function


def bind(name: str, function: Callable[..., float], parameters: Mapping[str, Any]) -> Callable[[RewardInputs], float]:
    """A formula with its parameters, checked by name and kind."""
    known = check_call(name, function, parameters, PROBE)
    bound = partial(function, **parameters) if parameters else function
    if name in FORMULAS:
        for key, value in parameters.items():
            if not isinstance(known[key].default, str):
                check_number(f"reward {name!r}: {key}", value, -INF, INF)
        try:
            bound(PROBE)
        except ValueError as error:
            raise RewardError(f"reward {name!r}: {error}") from error
    return bound


def check_call(
    name: str, function: Callable, given: Mapping[str, Any], *before: Any
) -> Mapping[str, inspect.Parameter]:
    """The function's parameters; raises RewardError unless it can be called with `before` and those that are given."""
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise RewardError(f"reward {name!r} does not say what it takes; call it from a function of your own") from error
    known = list(signature.parameters)[len(before) :]
    takes = f"it takes: {', '.join(known) or 'no parameters'}"
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in given:
            if key not in known:
                raise RewardError(f"reward {name!r} takes no {key!r}; {takes}")
    try:
        signature.bind(*before, **given)
    except TypeError as error:
        raise RewardError(f"reward {name!r}: {error}; {takes}") from error
    return signature.parameters


def positive(where: str, value: Any) -> None:
    """Raises RewardError unless `value` is a number above 0."""
    if check_number(where, value, -INF, INF) <= 0:
        raise RewardError(f"{where} must be above 0, not {value!r}")


def finite(name: str, value: Any) -> float:
    """What a user's function returned, as a finite float."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's, of more than one number
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"reward {name!r} returned {value!r}; it must return a finite number for every trace")
    return number
