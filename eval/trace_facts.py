"""What the traces do: help or harm, state the answer, grow long, run into the limit. Pure functions of evaluation rows.

A row is one reading of one question: {"id", "question", "answer", "condition", "decoding", "sample", "trace",
"trace_tokens", "answer_tokens", "token_logprobs", "logprob", "base_answer", "correct", "unscored"} and, where it is
known, "finished" (q ended the trace before the limit). The row of condition "none" is the question's baseline.

A gain is log p(answer) with the trace minus without, in nats. Where a question has several samples every question
counts once: its rows are averaged first, and intervals are those of that many questions, never of the rows.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from context_rl.rewards.safeguards import find_leak
from eval.metrics import bootstrap_interval, wilson_interval

CONDITIONS = ("none", "untrained", "trained", "shuffled", "own", "gold", "masked")
"""The order in which conditions are shown; others follow in the order of the rows."""

WITHOUT_DECODING = ("none", "gold")
"""Conditions whose trace no model decodes."""

DECODINGS = {"greedy": "greedy", "sampled": "T = 1"}
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
LENGTH_BINS = 5
EXTREMES = 5

Row = Mapping[str, Any]


def baselines(rows: Iterable[Row]) -> dict[str, Row]:
    """The no-help row of each question: the first that was scored, or the first of all where none was.

    Without a trace there is nothing to decode, so a row serves both decodings.
    """
    found: dict[str, Row] = {}
    for row in rows:
        if row["condition"] == "none":
            known = found.setdefault(row["id"], row)
            if known["unscored"] is not None and row["unscored"] is None:
                found[row["id"]] = row
    return found


def gain(row: Row, baseline: Row | None) -> float | None:
    """Nats of log p(answer) that the trace brought; None where either has no log p (a failure, a generated answer)."""
    if baseline is None or row["logprob"] is None or baseline["logprob"] is None:
        return None
    return row["logprob"] - baseline["logprob"]


def flip(row: Row, baseline: Row | None) -> int | None:
    """+1 for an answer that the trace put right, -1 for one that it spoilt, 0 for neither; None where unknown."""
    if baseline is None or row["correct"] is None or baseline["correct"] is None:
        return None
    return int(row["correct"]) - int(baseline["correct"])


def groups(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """The rows of each condition and decoding, in the order in which they are shown."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["condition"], {}).setdefault(row["decoding"], []).append(row)
    shown = {name: place for place, name in enumerate(CONDITIONS)}
    order = sorted(found, key=lambda name: shown.get(name, len(shown)))
    decoding = list(DECODINGS)
    return {
        name: {d: found[name][d] for d in sorted(found[name], key=lambda d: decoding.index(d) if d in decoding else 9)}
        for name in order
    }


def facts(rows: Sequence[Row]) -> dict[str, Any]:
    """{"questions", "rows", "none": {...}, "conditions": {CONDITION: {DECODING: {...}}}}, ready for JSON.

    What is undefined is None: the accuracy after leaks where nothing leaked, how many traces were cut where no row says
    whether it ended. Rows without a score, a trace or a baseline are counted as such and part of nothing else.
    """
    none = baselines(rows)
    scored = [row for row in none.values() if row["unscored"] is None]
    return {
        "questions": len({row["id"] for row in rows}),
        "rows": len(rows),
        "none": {
            "questions": len(none),
            "unscored": len(none) - len(scored),
            "accuracy": share(scored, lambda row: row["correct"]),
        },
        "conditions": {
            condition: {decoding: condition_facts(part, none) for decoding, part in by_decoding.items()}
            for condition, by_decoding in groups(rows).items()
            if condition != "none"
        },
    }


def condition_facts(rows: Sequence[Row], none: Mapping[str, Row]) -> dict[str, Any]:
    """What the traces of one condition and decoding do; `none` are the questions' baselines."""
    known = {i for i, row in none.items() if row["unscored"] is None}
    traced = [row for row in rows if row["trace"] is not None]
    pairs = [(row, change) for row in traced if (change := gain(row, none.get(row["id"]))) is not None]
    gained = [row for row, _ in pairs]
    gains = {id(row): change for row, change in pairs}
    scored = [row for row in traced if row["unscored"] is None]
    leaks = {id(row): find_leak(row["trace"], row["answer"]) for row in traced}
    leaked = [row for row in scored if leaks[id(row)].normalised]
    unleaked = [row for row in scored if not leaks[id(row)].normalised]
    order = sorted(pairs, key=lambda pair: pair[1])
    return {
        "questions": len({row["id"] for row in rows}),
        "rows": len(rows),
        "no_trace": len(rows) - len(traced),
        "unscored": len(traced) - len(scored),
        "no_baseline": sum(row["id"] not in known for row in scored),
        "accuracy": share(scored, lambda row: row["correct"]),
        "help_rate": share(gained, lambda row: gains[id(row)] > 0),
        "mean_gain": mean(gained, lambda row: gains[id(row)]),
        "wrong_to_right": share(scored, lambda row: _is(flip(row, none.get(row["id"])), 1)),
        "right_to_wrong": share(scored, lambda row: _is(flip(row, none.get(row["id"])), -1)),
        "leak_exact": share(traced, lambda row: leaks[id(row)].exact),
        "leak_normalised": share(traced, lambda row: leaks[id(row)].normalised),
        "accuracy_leaked": share(leaked, lambda row: row["correct"]),
        "accuracy_unleaked": share(unleaked, lambda row: row["correct"]),
        "empty": share(traced, lambda row: not row["trace"].strip()),
        "cut": share(traced, lambda row: None if row.get("finished") is None else not row["finished"]),
        "length": length_quantiles([row["trace_tokens"] for row in traced if row["trace_tokens"] is not None]),
        "gain_by_length": gain_by_length(
            [(row["trace_tokens"], change) for row, change in pairs if row["trace_tokens"] is not None]
        ),
        "worst": [_case(*pair) for pair in order[:EXTREMES]],
        "best": [_case(*pair) for pair in order[::-1][:EXTREMES]],
    }


def _is(value: int | None, wanted: int) -> bool | None:
    return None if value is None else value == wanted


def _case(row: Row, change: float) -> dict[str, Any]:
    return {"id": row["id"], "sample": row.get("sample"), "gain": change}


# --- estimates in which every question counts once ---


def share(rows: Iterable[Row], holds: Callable[[Row], bool | None]) -> dict[str, Any] | None:
    """How often `holds` is true: {"count", "n"} of rows, {"value", "ci"} over questions; None without any row.

    Rows for which it is None (not known) are left out. The interval is Wilson's of as many items as there are
    questions: exact for one row a question, and too wide rather than too narrow for several.
    """
    by_question, known = _by_question(rows, holds)
    if not known:
        return None
    value = math.fsum(math.fsum(part) / len(part) for part in by_question) / len(by_question)
    low, high = wilson_interval(value * len(by_question), len(by_question))
    return {"count": sum(known), "n": len(known), "value": value, "ci": [low, high]}


def mean(rows: Iterable[Row], value_of: Callable[[Row], float | None]) -> dict[str, Any] | None:
    """Mean over questions with its bootstrap interval (None for a single question); None without any row."""
    by_question, known = _by_question(rows, value_of)
    if not known:
        return None
    means = [math.fsum(part) / len(part) for part in by_question]
    ci = list(bootstrap_interval(means)) if len(means) > 1 else None
    return {"n": len(known), "value": math.fsum(means) / len(means), "ci": ci}


def _by_question(rows: Iterable[Row], value_of: Callable[[Row], Any]) -> tuple[list[list], list]:
    found: dict[str, list] = defaultdict(list)
    for row in rows:
        value = value_of(row)
        if value is not None:
            found[row["id"]].append(value)
    return list(found.values()), [value for part in found.values() for value in part]


# --- length ---


def length_quantiles(lengths: Sequence[int]) -> dict[str, Any] | None:
    """{"n", "mean", "quantiles": {"0": ..., "50": ..., "100": ...}} in the context model's tokens."""
    if not lengths:
        return None
    values = np.percentile(lengths, QUANTILES)
    return {
        "n": len(lengths),
        "mean": math.fsum(lengths) / len(lengths),
        "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, values, strict=True)},
    }


def gain_by_length(pairs: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Spearman's rho of (length, gain) and the mean gain in up to five bins of about as many rows each.

    Traces of one length are never in two bins. Rows count one by one.
    """
    lengths, gains = (np.array(column, dtype=float) for column in (zip(*pairs, strict=True) if pairs else ([], [])))
    bins = []
    if pairs:
        edges = np.unique(np.percentile(lengths, np.linspace(0, 100, LENGTH_BINS + 1)[1:-1], method="inverted_cdf"))
        place = np.searchsorted(edges, lengths)
        for number in np.unique(place):
            chosen = place == number
            low, high = int(lengths[chosen].min()), int(lengths[chosen].max())
            bins.append({"low": low, "high": high, "n": int(chosen.sum()), "mean_gain": float(gains[chosen].mean())})
    return {"spearman": spearman(lengths, gains), "bins": bins}


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing the mean of their ranks; None where either does not vary."""
    if len(x) < 2:
        return None
    a, b = (_ranks(values) for values in (x, y))
    size = math.sqrt((a @ a) * (b @ b))
    return max(-1.0, min(1.0, float(a @ b) / size)) if size else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Mean ranks around their own mean, in n log n: an evaluation may have 10,000s of rows."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place] - (len(place) + 1) / 2


# --- Markdown ---

COLUMNS = (
    "trace",
    "decoding",
    "questions",
    "right",
    "helps",
    "mean gain, nats",
    "wrong to right",
    "right to wrong",
    "states the answer",
    "right if stated",
    "right if not",
    "tokens",
    "gain ~ length",
    "empty",
    "cut",
    "not scored",
)


def facts_table(found: Mapping[str, Any]) -> str:
    """One Markdown line a condition and decoding, no trace first; 95 % intervals in brackets, a dash for None.

    "tokens" is the median and the 5 and 95 % quantiles. "not scored" counts rows without a score, a trace or a
    baseline.
    """
    none = found["none"]
    lines = []
    if none["questions"]:
        cells = ["none", "-", f"{none['questions']:,}", _share(none["accuracy"])]
        lines.append([*cells, *["-"] * (len(COLUMNS) - len(cells) - 1), f"{none['unscored']:,}"])
    for condition, by_decoding in found["conditions"].items():
        for decoding, f in by_decoding.items():
            rho = f["gain_by_length"]["spearman"]
            decoded = "-" if condition in WITHOUT_DECODING else DECODINGS.get(decoding, decoding)
            lines.append(
                [
                    *(condition, decoded, f"{f['questions']:,}", _share(f["accuracy"])),
                    *(_share(f["help_rate"]), _mean(f["mean_gain"])),
                    *(_share(f[key]) for key in ("wrong_to_right", "right_to_wrong", "leak_normalised")),
                    *(_share(f[key]) for key in ("accuracy_leaked", "accuracy_unleaked")),
                    *(_length(f["length"]), "-" if rho is None else f"{rho:+.2f}"),
                    *(_share(f[key], interval=False) for key in ("empty", "cut")),
                    f"{f['unscored'] + f['no_trace'] + f['no_baseline']:,}",
                ]
            )
    table = [[str(cell).replace("|", "\\|") for cell in line] for line in (COLUMNS, *lines)]
    head, *body = ("| " + " | ".join(line) + " |" for line in table)
    return "\n".join([head, "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|", *body])


def _share(found: Mapping[str, Any] | None, interval: bool = True) -> str:
    if found is None:
        return "-"
    text = f"{100 * found['value']:.1f} %"
    return text + (" [{:.1f}, {:.1f}]".format(*(100 * end for end in found["ci"])) if interval else "")


def _mean(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['value']:+.2f}" + (" [{:+.2f}, {:+.2f}]".format(*found["ci"]) if found["ci"] else "")


def _length(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(found["quantiles"][q] for q in ("50", "5", "95")))
