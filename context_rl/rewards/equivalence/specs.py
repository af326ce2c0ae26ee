"""Valid rewards as their recipes write them, taken apart."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from context_rl.rewards.compose import COMBINATORS, HYBRID_DEFAULT, Reward, Spec
from context_rl.rewards.formulas import FORMULAS


def named(spec: Spec) -> tuple[str, dict[str, Any]]:
    """A valid spec's name and all its parameters, the defaults filled in."""
    name, given = (spec, None) if isinstance(spec, str) else next(iter(spec.items()))
    if name == "hybrid":
        return name, dict(given or HYBRID_DEFAULT)
    known: Mapping[str, inspect.Parameter] = {}
    if name in COMBINATORS or name in FORMULAS:
        function = getattr(Reward, f"_{name}") if name in COMBINATORS else FORMULAS[name].function
        known = inspect.signature(function).parameters
    return name, {p.name: p.default for p in known.values() if p.default is not p.empty} | dict(given or {})


def terms(hybrid: Mapping[str, Any]) -> list[tuple[Spec, float]]:
    """The terms of a hybrid, without its clip: spec and weight."""
    full = {n: dict(g) if isinstance(g, Mapping) else {"weight": g} for n, g in hybrid.items() if n != "clip"}
    return [({n: {k: v for k, v in g.items() if k != "weight"}}, g["weight"]) for n, g in full.items()]


def nested(spec: Spec) -> Iterator[Spec]:
    """A reward and those that it is made of, but for masked ones: they see other log-probs."""
    yield spec
    name, given = named(spec)
    parts = [term for term, _ in terms(given)] if name == "hybrid" else []
    if name in COMBINATORS and name not in ("hybrid", "masked"):
        for of in (given[key] for key in ("of", "first", "gate") if key in given):
            parts += of if isinstance(of, list | tuple) else [of]
    for part in parts:
        yield from nested(part)
