"""Columns of a user's file: CSV, TSV, JSON lines, JSON, Parquet or plain text, with errors that name the line.

The readers need nothing beyond Python, except Parquet (pyarrow). Only the columns asked for are kept.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from embedkernels.cli.errors import CliError, UsageError, did_you_mean, listed

# A cell may hold a whole document.
_FIELD_LIMIT = 2**30


@dataclass(frozen=True)
class Table:
    """Some columns of a file.

    Attributes:
        argument: the argument that named the file, for messages.
        name: the file or data set, for messages.
        columns: values by column, all of one length.
        lines: the line of the file that each row starts on; None where a file has no lines.
    """

    argument: str
    name: str
    columns: Mapping[str, list[Any]]
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def where(self, row: int) -> str:
        """The place of a row, for messages: file and line, or file and row counted from 1."""
        return f"{self.name}, " + (f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}")


def missing_column(argument: str, column: str, name: str, there: Iterable[str], hint: str = "") -> UsageError:
    """The error for a column that a table lacks: lists those it has and the closest."""
    there = list(there)
    remedy = f"Columns there: {listed(there)}.{did_you_mean(column, there)}{hint}"
    return UsageError(f"{argument}: no column {column!r} in {name}", remedy)


def format_of(path: Path) -> str | None:
    """The format that a file's name stands for, without ``.gz``; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def formats() -> str:
    """The known endings, for messages."""
    return " ".join(_READERS)


def read(path: Path, argument: str, wanted: Mapping[str, str]) -> Table:
    """Read columns of a file.

    Args:
        path: an existing file whose ending is one of :func:`formats`, also with ``.gz`` (Parquet excepted).
        argument: the argument that named it.
        wanted: the column that each argument names, by argument.

    Raises:
        UsageError: no such column, no rows, not the format its name says, not UTF-8, not to be read.
        CliError: a package is missing.
    """
    kind = format_of(path)
    assert kind is not None
    try:
        if path.stat().st_size == 0:
            raise UsageError(f"{argument}: {path} is empty")
        table = _READERS[kind](path, argument, wanted)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{argument}: {path} is not UTF-8 (byte 0x{error.object[error.start]:02x})", "Save it as UTF-8."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{argument}: {path} cannot be read: {error}", "It is damaged: copy it again.") from error
    except OSError as error:
        raise UsageError(f"{argument}: {path} cannot be read: {error.strerror or error}") from error
    if len(table) == 0:
        raise UsageError(f"{argument}: {path} has no rows")
    return table


def _open(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _delimiter(header: str) -> str:
    """Comma, unless the header has none and has the semicolons or tabs that spreadsheets write."""
    # A quoted name may hold any of them.
    header = re.sub(r'"(?:[^"]|"")*"', "", header)
    return next((mark for mark in ",;\t" if mark in header), ",")


def _read_separated(path: Path, argument: str, wanted: Mapping[str, str], delimiter: str | None) -> Table:
    csv.field_size_limit(_FIELD_LIMIT)
    with _open(path) as file:
        first = file.readline()
        reader = csv.reader(_chain(first, file), delimiter=delimiter or _delimiter(first), strict=True)
        header = _next_row(reader, path, argument)
        if header is None or not any(header):
            raise UsageError(f"{argument}: {path} has no header", "Name the columns in the first line.")
        places = {}
        for option, column in wanted.items():
            if column not in header:
                hint = " The first line of the file must name the columns."
                raise missing_column(option, column, str(path), header, hint)
            _check_once(option, column, header, path)
            places[column] = header.index(column)
        columns: dict[str, list[Any]] = {column: [] for column in places}
        lines = []
        start = reader.line_num + 1
        while (row := _next_row(reader, path, argument)) is not None:
            if row:  # not a blank line
                if len(row) != len(header):
                    raise UsageError(
                        f"{argument}: {path}, line {start}: {len(row)} fields where the header has {len(header)}",
                        'Put fields that contain the separator or line breaks in double quotes, and write " as "".',
                    )
                for column, place in places.items():
                    columns[column].append(row[place])
                lines.append(start)
            start = reader.line_num + 1
    return Table(argument, str(path), columns, lines)


def _check_once(option: str, column: str, there: Sequence[str], path: Path) -> None:
    if there.count(column) > 1:
        raise UsageError(f"{option}: {path} has {there.count(column)} columns named {column!r}")


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _next_row(reader: Any, path: Path, argument: str) -> list[str] | None:
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise UsageError(
            f"{argument}: {path}, line {reader.line_num}: {error}",
            'A field that starts with " must end with it; write " inside as "".',
        ) from error
    return row


def _records(
    records: Iterable[tuple[int, Any]], path: Path, argument: str, wanted: Mapping[str, str], place: str
) -> tuple[dict[str, list[Any]], list[int]]:
    """Columns from objects; a key that only some of the objects have counts as missing in the others."""
    columns: dict[str, list[Any]] = {column: [] for column in wanted.values()}
    numbers = []
    keys: dict[str, None] = {}
    for number, record in records:
        if not isinstance(record, dict):
            raise UsageError(
                f"{argument}: {path}, {place} {number}: expected an object, got {type(record).__name__}",
                'Each row is an object such as {"text": "...", "label": "..."}.',
            )
        keys.update(dict.fromkeys(record))
        for column, values in columns.items():
            values.append(record.get(column))
        numbers.append(number)
    for option, column in wanted.items():
        if numbers and column not in keys:
            raise missing_column(option, column, str(path), keys)
    return columns, numbers


def _json(text: str, path: Path, argument: str, line: int | None) -> Any:
    """The content of a JSON text; ``line`` is its line in the file, None if it is the whole file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "JSON lines have one complete object on each line; name a file with one array .json."
        if line is None:
            extra = error.msg == "Extra data"
            remedy = f"Name a file with one object on each line {path.stem}.jsonl." if extra else ""
        raise UsageError(
            f"{argument}: {path}, line {line or error.lineno} is not JSON: {error.msg} (column {error.colno})", remedy
        ) from error
    except (ValueError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else "has a number with too many digits"
        raise UsageError(f"{argument}: {path}{'' if line is None else f', line {line}'} {what}") from error


def _read_json_lines(path: Path, argument: str, wanted: Mapping[str, str]) -> Table:
    def records(file: IO[str]) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            yield number, _json(line, path, argument, number)

    with _open(path) as file:
        columns, lines = _records(records(file), path, argument, wanted, "line")
    return Table(argument, str(path), columns, lines)


def _read_json(path: Path, argument: str, wanted: Mapping[str, str]) -> Table:
    with _open(path) as file:
        content = _json(file.read(), path, argument, None)
    if isinstance(content, dict):
        # {"data": [...], "version": ...}: the one list in it holds the rows.
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise UsageError(f"{argument}: {path} is no array of objects", 'Use [{"text": "...", "label": "..."}, ...].')
    columns, _ = _records(enumerate(content, 1), path, argument, wanted, "row")
    return Table(argument, str(path), columns)


def _read_parquet(path: Path, argument: str, wanted: Mapping[str, str]) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CliError(f"{argument}: {path} needs pyarrow", "pip install pyarrow") from error
    try:
        there = parquet.read_schema(path).names
        for option, column in wanted.items():
            if column not in there:
                raise missing_column(option, column, str(path), there)
            _check_once(option, column, there, path)
        table = parquet.read_table(path, columns=list(wanted.values()))
        columns = {column: table[column].to_pylist() for column in wanted.values()}
    except pyarrow.ArrowException as error:
        if isinstance(error, MemoryError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{argument}: {path} is not a Parquet file, or a damaged one: {reason}") from error
    return Table(argument, str(path), columns)


def _read_text(path: Path, argument: str, wanted: Mapping[str, str]) -> Table:
    for option, column in wanted.items():
        if column != "text":
            raise missing_column(option, column, str(path), ["text"], " Plain text is for --task causal-lm.")
    with _open(path) as file:
        rows = [(number, line.rstrip("\r\n")) for number, line in enumerate(file, 1) if line.strip()]
    return Table(argument, str(path), {"text": [text for _, text in rows]}, [number for number, _ in rows])


_READERS: dict[str, Callable[[Path, str, Mapping[str, str]], Table]] = {
    ".csv": lambda path, argument, wanted: _read_separated(path, argument, wanted, None),
    ".tsv": lambda path, argument, wanted: _read_separated(path, argument, wanted, "\t"),
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
