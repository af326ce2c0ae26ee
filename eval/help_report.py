"""The report of `eval.run`: accuracies, paired differences with their verdicts, what the traces do, transfer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from eval.comparisons import Comparison, compare, compare_seeds
from eval.metrics import bootstrap_interval, mean_of, wilson_interval
from eval.trace_facts import DECODINGS, WITHOUT_DECODING, facts, facts_table

Row = dict[str, Any]
LISTED = 20
"""Unscored rows named in the report; all of them are in OUT/rows/."""
LABELS = {
    "none": "no trace",
    "untrained": "untrained q",
    "trained": "trained q",
    "shuffled": "trained q, another question's",
    "masked": "trained q, answer cut out",
    "own": "base model's own",
    "gold": "reference solution",
}


def at(rows: Sequence[Row], decoding: str) -> dict[str, list[Row]]:
    """Rows by condition, of one decoding; those without one belong to both."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["decoding"] == decoding or row["condition"] in WITHOUT_DECODING:
            found.setdefault(row["condition"], []).append(row)
    return found


def summarise_base(rows: Sequence[Row], aggregated: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the report says of one base model, ready for JSON."""
    by_decoding = {d: at(rows, d) for d in DECODINGS if any(row["decoding"] == d for row in rows)}
    return {
        "conditions": {
            d: {condition: accuracy(part) for condition, part in found.items()} for d, found in by_decoding.items()
        },
        "comparisons": {
            d: [
                asdict(c)
                for reference in ("none", "untrained")
                if reference in found
                for c in against(found, reference)
            ]
            for d, found in by_decoding.items()
        },
        "facts": facts(rows),
        "harness": {name: dict(table) for name, table in aggregated.items()},
        "unscored": [
            {key: row[key] for key in ("id", "condition", "decoding", "sample", "unscored")}
            for row in rows
            if row["unscored"] is not None
        ],
    }


def accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    """{"n", "accuracy", "accuracy_ci", "mean_logprob", "mean_logprob_ci", "unscored"} of one condition.

    n counts questions: the samples of one are averaged first, and what is unscored is part of no mean. Generated
    answers have no log-prob.
    """
    right = by_question(rows, "correct")
    logprobs = by_question(rows, "logprob")
    single = all(value in (0.0, 1.0) for value in right)
    return {
        "n": len(right),
        "accuracy": mean_of(right),
        "accuracy_ci": list(wilson_interval(int(sum(right)), len(right)) if single else bootstrap_interval(right))
        if right
        else None,
        "mean_logprob": mean_of(logprobs),
        "mean_logprob_ci": list(bootstrap_interval(logprobs)) if logprobs else None,
        "unscored": sum(row["unscored"] is not None for row in rows),
    }


def by_question(rows: Sequence[Row], key: str) -> list[float]:
    """Each question's mean over its scored samples."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row[key] is not None:
            found.setdefault(row["id"], []).append(float(row[key]))
    return [math.fsum(values) / len(values) for values in found.values()]


def against(found: Mapping[str, Sequence[Row]], reference: str) -> list[Comparison]:
    """Every condition against this one; untrained traces are what trained ones are compared with, and nothing else."""
    wanted = compared(found, reference)
    return compare(wanted, reference) if len(wanted) > 1 else []


def compared(found: Mapping[str, Sequence[Row]], reference: str) -> dict[str, Sequence[Row]]:
    """The conditions that are compared with `reference`, and itself."""
    return {c: rows for c, rows in found.items() if c == reference or reference == "none" or c == "trained"}


def summarise_seeds(by_run: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Accuracies of each run, and the differences over all of them, ready for JSON."""
    found: dict[str, Any] = {"conditions": {}, "comparisons": {}}
    for decoding in DECODINGS:
        rows = {run: at(rows, decoding) for run, rows in by_run.items()}
        if not any(row["decoding"] == decoding for part in by_run.values() for row in part):
            continue
        names = list(next(iter(rows.values())))
        found["conditions"][decoding] = {
            name: [mean_of(by_question(part[name], "correct")) for part in rows.values()] for name in names
        }
        found["comparisons"][decoding] = [
            asdict(c)
            for reference in ("none", "untrained")
            if reference in names and len(compared(dict.fromkeys(names, ()), reference)) > 1
            for c in compare_seeds({run: compared(part, reference) for run, part in rows.items()}, reference)
        ]
    return found


# --- Markdown ---


def as_markdown(result: Mapping[str, Any], short: bool = False) -> str:
    """The report; `short` leaves out what the traces do, which is wide."""
    lines = [f"# {result['task']}: {result['questions']:,} questions", ""]
    lines += [f"- {note}" for note in result["notes"]] + ([""] if result["notes"] else [])
    for base, found in result["bases"].items():
        lines += [f"## Read by {base}", "", *accuracies(found), "", *differences(found), ""]
        if not short:
            lines += ["### What the traces do", "", facts_table(found["facts"]), ""]
            lines += harness(found["harness"])
        lines += unscored(found["unscored"])
    if len(result["bases"]) > 1:
        lines += ["## Transfer", "", *transfer(result["bases"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def seeds_markdown(task: str, names: Sequence[str], found: Mapping[str, Any]) -> str:
    """The report over several runs."""
    lines = [f"# {task}: {len(names)} runs", "", *(f"- {name}" for name in names), ""]
    lines += ["| trace | decoding | accuracy of each run |", "|---|---|---|"]
    for decoding, conditions in found["conditions"].items():
        for condition, values in conditions.items():
            if is_shown(condition, decoding):
                lines.append(f"| {labels(condition, decoding)} | {', '.join(map(share, values))} |")
    return "\n".join([*lines, "", "Over seeds and questions:", "", *differences(found)]) + "\n"


def is_shown(condition: str, decoding: str) -> bool:
    """A condition without a decoding stands in the rows of both, and is shown once."""
    return decoding == "greedy" or condition not in WITHOUT_DECODING


def labels(condition: str, decoding: str) -> str:
    """The first two cells of a row."""
    return f"{LABELS[condition]} | {'-' if condition in WITHOUT_DECODING else DECODINGS[decoding]}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" [{ends[0]:.1%}, {ends[1]:.1%}]"


def accuracies(found: Mapping[str, Any]) -> list[str]:
    """One line a condition and decoding; 95 % intervals in brackets."""
    lines = ["| trace | decoding | n | accuracy | mean log p(answer) | unscored |", "|---|---|---:|---:|---:|---:|"]
    for decoding, conditions in found["conditions"].items():
        for condition, s in conditions.items():
            if not is_shown(condition, decoding):
                continue
            logprob = "-" if s["mean_logprob"] is None else f"{s['mean_logprob']:.3f}"
            right = share(s["accuracy"]) + interval(s["accuracy_ci"])
            lines.append(f"| {labels(condition, decoding)} | {s['n']} | {right} | {logprob} | {s['unscored']} |")
    return lines


def differences(found: Mapping[str, Any]) -> list[str]:
    """One line a comparison, with its verdict in words."""
    lines = ["| difference in accuracy | decoding | points | p | p, Holm | verdict |", "|---|---|---:|---:|---:|---|"]
    for decoding, comparisons in found["comparisons"].items():
        for c in comparisons:
            points = f"{100 * c['difference']:+.1f} [{100 * c['ci'][0]:+.1f}, {100 * c['ci'][1]:+.1f}]"
            shown = DECODINGS[decoding]
            pair = f"{LABELS[c['condition']]} against {LABELS[c['reference']]}"
            lines.append(f"| {pair} | {shown} | {points} | {c['p']:.2g} | {c['p_holm']:.2g} | {c['words']} |")
    return lines


def harness(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """lm-evaluation-harness's own aggregates, as it computes them; empty for tasks of ours."""
    if not tables:
        return []
    names = [k for k in dict.fromkeys(k for t in tables.values() for k in t) if isinstance(numbers(tables, k), float)]
    lines = ["### As lm-evaluation-harness counts", "", "| condition | " + " | ".join(names) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for job, table in tables.items():
        cells = [f"{table[n]:.4f}" if isinstance(table.get(n), int | float) else "-" for n in names]
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def numbers(tables: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """The first table's value of this name."""
    return next((float(t[name]) for t in tables.values() if isinstance(t.get(name), int | float)), None)


def unscored(rows: Sequence[Row]) -> list[str]:
    """Which rows have no score, and why."""
    if not rows:
        return []
    lines = [f"### {len(rows):,} rows could not be scored", ""]
    lines += [f"- {row['id']} ({row['condition']}, {row['decoding']}): {row['unscored']}" for row in rows[:LISTED]]
    return [*lines, *([f"- and {len(rows) - LISTED:,} more, see rows/"] if len(rows) > LISTED else []), ""]


def transfer(bases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Accuracy of every condition under every base model, on the same traces."""
    names = list(bases)
    lines = ["| trace | decoding | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for decoding in DECODINGS:
        conditions = dict.fromkeys(c for b in bases.values() for c in b["conditions"].get(decoding, {}))
        for condition in conditions:
            if not is_shown(condition, decoding):
                continue
            cells = [bases[name]["conditions"].get(decoding, {}).get(condition) for name in names]
            shown = [share(c and c["accuracy"]) + interval(c and c["accuracy_ci"]) for c in cells]
            lines.append(f"| {labels(condition, decoding)} | " + " | ".join(shown) + " |")
    return lines
