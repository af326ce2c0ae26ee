"""One file of rows -> a table whose rows know where they stand."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from context_rl.tasks.types import DataError

Keep = Callable[[str], bool]
"""Which columns are worth reading; the names of all of them stay known for error messages."""


@dataclass(frozen=True)
class Row:
    """A row as it was read: `id` names it for good ("my.jsonl:12"), `where` says it in words ("my.jsonl, line 12")."""

    id: str
    where: str
    values: dict[str, object]


@dataclass(frozen=True)
class Table:
    """The rows of one file or one hub split."""

    name: str
    columns: tuple[str, ...]
    rows: list[Row]


def read_file(path: Path, keep: Keep) -> Table:
    """Read one file by its ending.

    Raises:
        DataError: unknown ending, not readable, not UTF-8, broken, or without rows.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        ending = f"a file that ends in {path.suffix!r}" if path.suffix else "a file without an ending"
        raise DataError(f"{path}: cannot read {ending}; use one of {', '.join(READERS)}")
    try:
        table = reader(path, keep)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    if not table.rows:
        raise DataError(f"{path}: has no rows; give a file that has some")
    return table


def numbered_rows(label: str, name: str, rows: Iterable[dict[str, object]]) -> list[Row]:
    """Rows of a format without lines, counted from 1."""
    return [Row(f"{label}:{n}", f"{name}, row {n}", values) for n, values in enumerate(rows, 1)]


def columns_to_read(columns: tuple[str, ...], keep: Keep) -> list[str]:
    """Those to keep; the first one if there are none, because without columns the rows would be gone too."""
    return [column for column in columns if keep(column)] or list(columns[:1])


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def _parse_json(text: str, path: Path, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {first_line + error.lineno - 1}"
        raise DataError(f"{where}: broken JSON ({error.msg}, column {error.colno}); correct the line") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {first_line}: unusable JSON ({error}); correct the line") from error


def _from_objects(path: Path, rows: list[Row], keep: Keep) -> Table:
    """A table of JSON objects; their keys may differ, so the columns are all keys in order of appearance."""
    for row in rows:
        if not isinstance(row.values, dict):
            raise DataError(f"{row.where}: a row must be an object such as {{...}}, not a {type(row.values).__name__}")
    columns = tuple(dict.fromkeys(key for row in rows for key in row.values))
    kept = [Row(row.id, row.where, {k: v for k, v in row.values.items() if keep(k)}) for row in rows]
    return Table(str(path), columns, kept)


def _read_jsonl(path: Path, keep: Keep) -> Table:
    return _from_objects(path, _json_lines(path, _read_text(path)), keep)


def _json_lines(path: Path, text: str) -> list[Row]:
    # Not splitlines(): a JSON string may hold U+2028, U+0085 and others that it would cut at.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [Row(f"{path.name}:{n}", f"{path}, line {n}", _parse_json(line, path, n)) for n, line in lines]


def _read_json(path: Path, keep: Keep) -> Table:
    text = _read_text(path)
    if text.lstrip().startswith("["):
        return _from_objects(path, numbered_rows(path.name, str(path), _parse_json(text, path, 1)), keep)
    try:
        return _from_objects(path, _json_lines(path, text), keep)
    except DataError as error:
        raise DataError(f"{error} (a .json file holds a list [...] of objects, or one object a line)") from error


def _read_csv(path: Path, keep: Keep) -> Table:
    """Every field stays the text it is: "007" keeps its zeros."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # strict: otherwise a quote that is never closed swallows the rest of the file as one field.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    columns, rows, line = None, [], 1
    try:
        for fields in reader:
            # A quoted field may span lines: the row begins after the line on which the last one ended.
            first, line = line, reader.line_num + 1
            if not fields:
                continue
            if columns is None:
                columns = _csv_header(fields, f"{path}, line {first}")
            elif len(fields) != len(columns):
                problem = f"{len(fields)} fields, but the header has {len(columns)}"
                raise DataError(f"{path}, line {first}: {problem}; put quotes around a field that holds the separator")
            else:
                values = {c: f for c, f in zip(columns, fields, strict=True) if keep(c)}
                rows.append(Row(f"{path.name}:{first}", f"{path}, line {first}", values))
    except csv.Error as error:
        hint = 'put quotes around a field that holds one and write the inner one ""'
        raise DataError(f"{path}, line {line}: broken quotes ({error}); {hint}") from error
    return Table(str(path), columns or (), rows)


def _csv_header(fields: list[str], where: str) -> tuple[str, ...]:
    columns = tuple(field.strip() for field in fields)
    double = next((c for c in columns if columns.count(c) > 1), None)
    if double is not None:
        raise DataError(f"{where}: two columns are named {double!r}; rename one")
    return columns


def _read_parquet(path: Path, keep: Keep) -> Table:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            rows = file.read(columns=columns_to_read(columns, keep)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: broken Parquet file ({str(error).splitlines()[0]}); write it again") from error
    return Table(str(path), columns, numbered_rows(path.name, str(path), rows))


READERS: dict[str, Callable[[Path, Keep], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
