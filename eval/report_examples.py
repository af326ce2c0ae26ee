"""Traces of the arms side by side, at the same questions."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from context_rl import runs
from eval.report_runs import Arm, Run

EXAMPLES = 3


def examples(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """[{"id", "question", "answer", "arms": {name: {moment: (trace, right or wrong or None)}}}] of one run an arm.

    Training questions that all arms saw both at the first and at the last step, the middle one's trace where it is
    there; where there are none, held-out questions, untrained against trained, greedy.
    """
    chosen = {arm.name: arm.finished[0] for arm in arms if arm.finished}
    try:
        return from_training(chosen) or from_held_out(chosen)
    except (OSError, ValueError, KeyError, pa.ArrowException):  # examples are no reason to lose the report
        return []


def fixed(ids: set[str]) -> list[str]:
    """The same few of them every time: those whose hashes are smallest."""
    return sorted(ids, key=lambda i: hashlib.sha256(i.encode()).digest())[:EXAMPLES]


def from_training(chosen: Mapping[str, Run]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, dict[str, tuple[str, bool | None]]]] = {}
    for name, run in chosen.items():
        files = sorted((run.folder / "traces").glob("step-*.parquet"))
        if len(files) < 2:
            continue
        moments = {"before": files[0], "during": files[len(files) // 2], "after": files[-1]}
        found[name] = {moment: first_traces(path) for moment, path in moments.items()}
    if not found:
        return []
    ids = set.intersection(*(set(by["before"]) & set(by["after"]) for by in found.values()))
    if not ids:
        return []
    questions = {row["id"]: row for row in runs.read_jsonl(next(iter(chosen.values())).folder / "questions.jsonl")}
    return [
        {
            "id": i,
            "question": questions[i]["question"] if i in questions else None,
            "answer": questions[i]["answer"] if i in questions else None,
            "arms": {name: {moment: rows.get(i) for moment, rows in by.items()} for name, by in found.items()},
        }
        for i in fixed(ids)
    ]


def first_traces(path: Path) -> dict[str, tuple[str, bool | None]]:
    """Question -> its first trace in the file."""
    out: dict[str, tuple[str, bool | None]] = {}
    for row in pq.read_table(path, columns=["example_id", "trace", "correct"]).to_pylist():
        out.setdefault(row["example_id"], (row["trace"], row["correct"]))
    return out


def from_held_out(chosen: Mapping[str, Run]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, dict[str, dict]]] = {}
    for name, run in chosen.items():
        paths = {m: next(iter((run.folder / "eval").glob(f"*.{c}.jsonl")), None) for m, c in MOMENTS.items()}
        if all(paths.values()):
            found[name] = {
                moment: {row["id"]: row for row in runs.read_jsonl(path) if row["decoding"] == "greedy"}
                for moment, path in paths.items()
            }
    if not found:
        return []
    ids = fixed(set.intersection(*(set(rows) for by in found.values() for rows in by.values())))
    first = next(iter(found.values()))["after"]
    return [
        {
            "id": i,
            "question": first[i].get("question"),
            "answer": first[i].get("answer"),
            "arms": {
                name: {moment: (rows[i]["trace"], rows[i]["correct"]) for moment, rows in by.items()}
                for name, by in found.items()
            },
        }
        for i in ids
    ]


MOMENTS = {"before": "untrained", "after": "trained"}
