"""What a report is made of, and as Markdown. The page is made of the same parts, so that their numbers are equal."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.report_plots import Look


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells as text; the columns in `words` are text and stand on the left, others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture: the stem of its files, what it shows, and its SVG in every look."""

    name: str
    caption: str
    svgs: dict[Look, str] = field(repr=False)


Part = Heading | Text | Bullets | Table | Figure


def as_markdown(title: str, parts: Sequence[Part]) -> str:
    """The report as Markdown."""
    lines = [f"# {escaped(title)}", ""]
    for part in parts:
        match part:
            case Heading():
                lines += [f"{'#' * part.level} {escaped(part.text)}", ""]
            case Text():
                lines += [escaped(part.text), ""]
            case Bullets():
                lines += [*(f"- {escaped(item)}" for item in part.items), ""]
            case Table():
                rule = "".join("---|" if n in part.words else "---:|" for n in range(len(part.header)))
                rows = ["| " + " | ".join(cell_text(cell) for cell in row) + " |" for row in (part.header, *part.rows)]
                lines += [rows[0], "|" + rule, *rows[1:], ""]
            case Figure():
                lines += [f"![{escaped(part.caption)}]({part.name}.png)", "", f"*{escaped(part.caption)}*", ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text that a model wrote is no markup."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def cell_text(cell: str) -> str:
    return escaped(cell).replace("|", "\\|") or "-"
