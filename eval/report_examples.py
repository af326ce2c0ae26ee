"""Traces of the arms side by side, at the same questions: before, during and after training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from context_rl import runs
from context_rl.traces import HELD_OUT, QUESTIONS
from eval.conditions import fixed
from eval.report_arms import Arm
from eval.report_runs import Run

EXAMPLES = 3
CONDITIONS = {"before": "untrained", "during": "halfway", "after": "trained"}

Seen = dict[str, tuple[str, bool | None]]
"""Question -> (trace, right or wrong or not scored)."""


class Examples(NamedTuple):
    """What the traces are, in words, and [{"id", "question", "answer", "arms": {name: {moment: (trace, right)}}}]."""

    kind: str
    rows: list[dict[str, Any]]


def examples(arms: Sequence[Arm]) -> Examples:
    """A few questions with the traces of one run an arm.

    Held-out questions that every run has before and after its training, and those of them that it has in the middle
    first; where there are none, training questions that all arms saw both at their first and at their last step.
    """
    ways: tuple[tuple[str, Callable[[Run], dict[str, Seen]], str], ...] = (
        ("held-out questions, greedy", held_out, HELD_OUT),
        ("training questions at the first, middle and last step", trained_on, QUESTIONS),
    )
    for kind, read, file in ways:
        try:
            rows = side_by_side({arm.name: arm.finished for arm in arms}, read, file)
        except (OSError, ValueError, KeyError, pa.ArrowException):  # examples are no reason to lose the report
            continue
        if rows:
            return Examples(kind, rows)
    return Examples("", [])


def side_by_side(
    arms: Mapping[str, Sequence[Run]], read: Callable[[Run], dict[str, Seen]], file: str
) -> list[dict[str, Any]]:
    """The questions that all arms have, each in its first run with the most moments, and what `file` says of them."""
    found: dict[str, dict[str, Seen]] = {}
    texts: dict[str, dict[str, Any]] = {}
    for name, members in arms.items():
        for run in members:
            moments = read(run)
            if len(moments) > len(found.get(name, ())):
                found[name] = moments
                if not texts and (run.folder / file).exists():
                    texts = {row["id"]: row for row in runs.read_jsonl(run.folder / file)}
            if len(moments) == len(CONDITIONS):
                break
    if not found:
        return []
    ids = set.intersection(*(set(moments["before"]) & set(moments["after"]) for moments in found.values()))
    watched = ids.intersection(*(set(moments.get("during", ids)) for moments in found.values()))
    return [
        {
            "id": i,
            "question": texts.get(i, {}).get("question"),
            "answer": texts.get(i, {}).get("answer"),
            "arms": {name: {moment: seen.get(i) for moment, seen in by.items()} for name, by in found.items()},
        }
        for i in fixed(watched or ids, EXAMPLES)
    ]


def held_out(run: Run) -> dict[str, Seen]:
    """Moment -> its greedy traces of held-out questions; empty where the run has no evaluation."""
    paths = {m: next(iter((run.folder / "eval").glob(f"*.{c}.jsonl")), None) for m, c in CONDITIONS.items()}
    if not (paths["before"] and paths["after"]):
        return {}
    return {
        moment: {r["id"]: (r["trace"], r["correct"]) for r in runs.read_jsonl(path) if r["decoding"] == "greedy"}
        for moment, path in paths.items()
        if path
    }


def trained_on(run: Run) -> dict[str, Seen]:
    """Moment -> the first sampled trace of each training question at that step."""
    files = sorted((run.folder / "traces").glob("step-*.parquet"))
    if len(files) < 2:
        return {}
    moments = {"before": files[0], "during": files[len(files) // 2], "after": files[-1]}
    return {moment: first_traces(path) for moment, path in moments.items()}


def first_traces(path: Path) -> Seen:
    out: Seen = {}
    for row in pq.read_table(path, columns=["example_id", "trace", "correct"]).to_pylist():
        out.setdefault(row["example_id"], (row["trace"], row["correct"]))
    return out
