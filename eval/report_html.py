"""The report as one page: no network, no script, one file, for wide and narrow screens, light and dark."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from eval.report_document import Bullets, Figure, Heading, Part, Table, Text
from eval.report_plots import Look

TEMPLATE = Path(__file__).with_name("report_page.html")


def as_html(title: str, parts: Sequence[Part]) -> str:
    """The whole page; the parts' text is text in it, never markup."""
    body = "\n".join(part_html(part) for part in parts)
    values = {"title": html.escape(title), "body": body}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def part_html(part: Part) -> str:
    match part:
        case Heading():
            return f"<h{part.level}>{html.escape(part.text)}</h{part.level}>"
        case Text():
            return f"<p>{prose(part.text)}</p>"
        case Bullets():
            return f"<ul>{''.join(f'<li>{prose(item)}</li>' for item in part.items)}</ul>"
        case Figure():
            return figure_html(part)
        case Table():
            table = table_html(part)
            if not part.folded:
                return table
            rows = f"{len(part.rows)} row{'s' * (len(part.rows) != 1)}"
            return f"<details><summary>Show the table ({rows})</summary>{table}</details>"


def prose(text: str) -> str:
    """A sentence, in which no line ends before a per cent sign."""
    return html.escape(text).replace(" %", "\u00a0%")


def table_html(part: Table) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    kinds = [' class="words"' if n in part.words else "" for n in range(len(part.header))]
    head = "".join(f'<th scope="col"{kind}>{html.escape(c)}</th>' for c, kind in zip(part.header, kinds, strict=True))
    lines = []
    for row in part.rows:
        cells = [cell_html(cell, n in part.words) for n, cell in enumerate(row)]
        data = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(cells[1:], kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row">{cells[0]}</th>{data}</tr>')
    label = html.escape(part.header[0], quote=True)
    body = "\n".join(lines)
    return (
        f'<div class="scroll" role="region" aria-label="Table: {label}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def cell_html(cell: str, words: bool) -> str:
    """A cell: a dash in grey; of numbers an interval below its value, and minus signs as such."""
    if cell in ("", "-"):
        return '<span class="dash">\u2013</span>'
    if words:
        return html.escape(cell)
    text = html.escape(re.sub(r"(?<![^\s\[])-(?=\d)", "\u2212", cell))
    match = re.fullmatch(r"(.+?) (\[[^\[\]]+\])", text)
    return f'{match[1]} <span class="ci">{match[2]}</span>' if match else text


def figure_html(part: Figure) -> str:
    """The picture for the reader's screen and page, each as a data URI: SVGs inline would share their ids."""

    def uri(look: Look) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(part.svgs[look].encode()).decode()

    narrow, dark = "(max-width: 44rem)", "(prefers-color-scheme: dark)"
    sources = [
        (Look(wide=False, dark=True), f"{narrow} and {dark}"),
        (Look(wide=False, dark=False), narrow),
        (Look(wide=True, dark=True), dark),
    ]
    tags = "".join(f'<source media="{media}" srcset="{uri(look)}">' for look, media in sources)
    caption = html.escape(part.caption)
    return (
        f'<figure><picture>{tags}<img src="{uri(Look())}" alt="{html.escape(part.caption, quote=True)}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
