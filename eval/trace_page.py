"""One static page to read the traces on: what each did to the answer, token by token. No network, no server, one file.

`write_page(rows, "traces.html", "Traces of run x")`; the rows are those of `eval.trace_facts`. Everything that a model
or a data set wrote reaches the page as JSON in ASCII without "<", and from there as text nodes, never as HTML.
"""

import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from context_rl.rewards import safeguards
from eval.trace_facts import (
    CONDITIONS,
    DECODINGS,
    WITHOUT_DECODING,
    Row,
    baselines,
    facts,
    facts_table,
    flip,
    gain,
    groups,
)

TEMPLATE = Path(__file__).with_name("trace_page.html")

LABELS = {
    "none": "no trace",
    "untrained": "untrained",
    "trained": "trained",
    "shuffled": "trained, shuffled",
    "own": "base model\u2019s own",
    "gold": "gold",
    "masked": "answer masked",
}
"""What a reader sees for a condition; others keep their names."""

HEADING = re.compile(r"(#{1,6}) +(.+)")
RULE = re.compile(r":?-{3,}:?")
SEPARATORS = re.compile(r"(?<!\\)\|")


def write_page(
    rows: Sequence[Row],
    path: str | Path,
    title: str,
    summary_markdown_or_rows: str | Sequence[Sequence[Any]] | None = None,
    limit: int = 2000,
) -> Path:
    """Writes the page and returns its path.

    Args:
        rows: evaluation rows; all of them are in the table of facts, also where only a sample of questions is shown.
        summary_markdown_or_rows: what stands in the table's place: Markdown (headings, tables, lists, paragraphs, all
            of plain text) or rows of cells, the header first; None makes `facts_table(facts(rows))`.
        limit: most questions to show; of more, those with the smallest hashes of their ids, the same every time.

    Raises:
        ValueError: a question's rows do not have one log-prob a token of its answer, or a number is not finite.
    """
    summary = facts_table(facts(rows)) if summary_markdown_or_rows is None else summary_markdown_or_rows
    data = page_data(rows, limit)
    parts = {
        "title": html.escape(title),
        "extent": html.escape(extent(data)),
        "heading": "What the traces do" if summary_markdown_or_rows is None else "Summary",
        "summary": summary_html(summary),
        "data": script_json(data),
    }
    # In one pass: a placeholder inside a title or a trace stays text.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    path = Path(path)
    path.write_bytes(page.encode("utf-8", errors="replace"))
    return path


# --- the data ---


def page_data(rows: Sequence[Row], limit: int) -> dict[str, Any]:
    """{"total", "labels", "decodings", "conditions", "questions": [{"id", ..., "runs": [...]}]}, for the page."""
    ids = list(dict.fromkeys(row["id"] for row in rows))
    shown = sample_ids(ids, limit)
    by_id: dict[str, list[Row]] = {i: [] for i in ids if i in shown}
    for row in rows:
        if row["id"] in shown:
            by_id[row["id"]].append(row)
    none = baselines(rows)
    conditions = list(groups(rows))
    return {
        "total": len(ids),
        "labels": {name: LABELS.get(name, name) for name in conditions},
        "decodings": {name: DECODINGS.get(name, name) for name in dict.fromkeys(row["decoding"] for row in rows)},
        "conditions": conditions,
        "undecoded": list(WITHOUT_DECODING),
        "questions": [question_data(part, none.get(i)) for i, part in by_id.items()],
    }


def sample_ids(ids: Sequence[str], limit: int) -> set[str]:
    """All ids, or the `limit` of them whose SHA-256 is smallest: no seed, and a smaller sample is part of a larger."""
    if len(ids) <= limit:
        return set(ids)
    return set(sorted(ids, key=lambda i: hashlib.sha256(i.encode("utf-8", "surrogatepass")).digest())[:limit])


def question_data(rows: Sequence[Row], none: Row | None) -> dict[str, Any]:
    """One question with all its runs, no help first; without a trace a question has one run, whatever the decoding."""
    first, last = rows[0], len(CONDITIONS)
    tokens = next((row["answer_tokens"] for row in rows if row["answer_tokens"] is not None), None)
    order = {name: place for place, name in enumerate(CONDITIONS)}
    decoding = {name: place for place, name in enumerate(DECODINGS)}
    traced = sorted(
        (row for row in rows if row["condition"] != "none"),
        key=lambda row: (order.get(row["condition"], last), decoding.get(row["decoding"], 9), row.get("sample") or 0),
    )
    runs = [run_data(row, none) for row in ([none] if none else []) + traced]
    for run in runs:
        if tokens is not None and run["logprobs"] is not None and len(run["logprobs"]) != len(tokens):
            raise ValueError(
                f"{first['id']}: {len(run['logprobs'])} log-probs in the condition {run['condition']!r} for an answer "
                f"of {len(tokens)} tokens; its rows are not of one scorer"
            )
    return {
        "id": first["id"],
        "question": first["question"],
        "answer": first["answer"],
        "tokens": tokens,
        "runs": runs,
    }


def run_data(row: Row, none: Row | None) -> dict[str, Any]:
    """One reading; its trace is cut into pieces, every second one a mention of the answer."""
    trace, is_none = row["trace"], row["condition"] == "none"
    pieces = None if trace is None else mention_pieces(trace, row["answer"])
    logprobs = row["token_logprobs"]
    return {
        "condition": row["condition"],
        "decoding": row["decoding"],
        "sample": row.get("sample") or 0,
        "trace": pieces,
        "leak": None if pieces is None else len(pieces) > 1,
        "length": row["trace_tokens"],
        "finished": row.get("finished"),
        "logprob": row["logprob"],
        "logprobs": None if logprobs is None else [round(value, 5) for value in logprobs],
        "gain": None if is_none else gain(row, none),
        "flip": None if is_none else flip(row, none),
        "base_answer": row["base_answer"],
        "correct": row["correct"],
        "unscored": row["unscored"],
    }


def mention_pieces(trace: str, answer: str) -> list[str]:
    """The trace cut at its mentions of the answer: text, mention, text, ...; joined it is the trace again.

    Pieces and not offsets: JavaScript counts UTF-16 units where Python counts characters.
    """
    if not safeguards.find_leak(trace, answer).normalised:
        return [trace]
    pieces, done = [], 0
    for start, end in sorted({*safeguards._exact(trace, answer), *safeguards._normalised(trace, answer)}):
        if start < done:
            if end > done:  # it overlaps the mention before it: "New York New York"
                pieces[-1], done = pieces[-1] + trace[done:end], end
            continue
        pieces += [trace[done:start], trace[start:end]]
        done = end
    return [*pieces, trace[done:]]


def script_json(data: Any) -> str:
    """JSON that no text in it can end or escape from: ASCII, without "<", ">" and "&". NaN is a ValueError."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- the header ---


def extent(data: Mapping[str, Any]) -> str:
    """How much of the evaluation is on the page."""
    shown, total = len(data["questions"]), data["total"]
    if shown < total:
        return f"{shown:,} of {total:,} questions, chosen by hash. The table is of all {total:,}."
    return f"{total:,} question{'' if total == 1 else 's'}."


def summary_html(summary: str | Sequence[Sequence[Any]]) -> str:
    """Markdown's headings, tables, lists and paragraphs, or rows of cells, as HTML; all else in it is plain text."""
    if not isinstance(summary, str):
        return table_html([["-" if cell is None else str(cell) for cell in row] for row in summary])
    blocks: list[str] = []
    for kind, group in groupby((line.strip() for line in summary.splitlines()), key=line_kind):
        lines = list(group)
        if kind == "heading":
            for marks, text in (HEADING.fullmatch(line).groups() for line in lines):
                level = min(6, len(marks) + 2)
                blocks.append(f"<h{level}>{html.escape(text)}</h{level}>")
        elif kind == "table":
            rows = [[cell.strip().replace("\\|", "|") for cell in SEPARATORS.split(line)[1:-1]] for line in lines]
            rule = next((row for row in rows if all(map(RULE.fullmatch, row))), [])
            left = [n for n, cell in enumerate(rule) if not cell.endswith(":")]
            blocks.append(table_html([row for row in rows if row is not rule], left))
        elif kind == "list":
            blocks.append(f"<ul>{''.join(f'<li>{html.escape(line[2:])}</li>' for line in lines)}</ul>")
        elif kind == "text":
            blocks.append(f"<p>{html.escape(' '.join(lines))}</p>")
    return "\n".join(blocks)


def line_kind(line: str) -> str:
    """What a line of Markdown is part of."""
    if HEADING.fullmatch(line):
        return "heading"
    return "table" if line.startswith("|") else "list" if line.startswith("- ") else "text" if line else "nothing"


def table_html(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """A table that scrolls by itself where the screen is narrow; columns "trace" and "decoding" become one.

    Args:
        left: columns of words; others are of numbers and stand on the right.
    """
    if not rows:
        return ""
    heads = [html.escape(cell) for cell in rows[0]]
    body = [[cell_html(cell) for cell in row] for row in rows[1:]]
    columns = list(range(len(heads)))
    if heads[:2] == ["trace", "decoding"]:
        columns.remove(1)
        for cells, row in zip(body, rows[1:], strict=True):
            cells[0] = html.escape(LABELS.get(row[0], row[0])) + ("" if row[1] == "-" else small(html.escape(row[1])))
    words = {n: ' class="words"' for n in left}
    head = "".join(f'<th scope="col"{words.get(n, "")}>{heads[n]}</th>' for n in columns)
    lines = "".join(
        f'<tr><th scope="row">{cells[0]}</th>'
        + "".join(f"<td{words.get(n, '')}>{cells[n]}</td>" for n in columns[1:] if n < len(cells))
        + "</tr>\n"
        for cells in body
    )
    return (
        f'<div class="scroll" role="region" aria-label="Table: {heads[0]}" tabindex="0"><table class="facts">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>"
    )


def cell_html(cell: str) -> str:
    """A cell as HTML: a dash in grey, an interval in brackets below its number, minus signs as such."""
    if cell == "-":
        return '<span class="dash">\u2013</span>'
    text = html.escape(re.sub(r"(?<![^\s\[])-(?=\d)", "\u2212", cell))
    match = re.fullmatch(r"(.+?) (\[[^\[\]]+\])", text)
    return match[1] + small(match[2]) if match else text


def small(text: str) -> str:
    return f' <span class="ci">{text}</span>'
