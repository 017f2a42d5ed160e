"""Reading rows of text and label, one at a time; whatever is wrong is told with the row's number.

A row's number is that of its first line in the file, counted from 1, as an editor shows it. Rows never
leave the device.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import msgspec

from edge_sdk.config.problems import nearest, shown
from edge_sdk.errors import DataError

__all__ = ["FORMATS", "Row", "RowSource", "read_rows"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMATS = (".jsonl", ".ndjson", *_DELIMITERS)
_MAX_LINE_BYTES = 4 << 20
_Fields = dict[str, Any]


class RowSource(Protocol):
    """A file of rows and the columns that hold text and label."""

    @property
    def path(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def label(self) -> str: ...


class Row(NamedTuple):
    text: str
    label: str
    number: int


def read_rows(source: RowSource, labels: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a JSONL or CSV file (told by its suffix; UTF-8, with or without a byte order mark).

    Args:
        source: path and columns.
        labels: the set that every label must be of; None: any. Numbers count by their decimal text.

    Raises:
        DataError: at the first row that cannot be used, or where the file holds none.
    """
    path = Path(source.path)
    allowed = None if labels is None else dict.fromkeys(labels)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        raise DataError(f"{path}: Parquet is not read", f"write the rows as one of {', '.join(FORMATS)}")
    if suffix not in FORMATS:
        raise DataError(f'{path}: the suffix "{suffix}" tells no format', f"use one of {', '.join(FORMATS)}")
    try:
        with path.open("rb") as file:
            lines = _lines(path, file)
            delimiter = _DELIMITERS.get(suffix)
            found = _csv(path, lines, delimiter) if delimiter else _jsonl(path, lines)
            number = 0
            for number, fields in found:
                text = _text(path, number, fields, source.text)
                yield Row(text, _label(path, number, fields, source.label, allowed), number)
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such file", "data.path is where the rows are looked for"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not number:
        raise DataError(f"{path}: holds no rows", "one row of text and label is the least")


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Decoded lines with their ends. Line by line, so that a wrong byte is told with its line."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise _bad(path, number, f"is longer than {_MAX_LINE_BYTES >> 20} MiB")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            found = f"0x{line[error.start]:02x} at byte {error.start + 1}"
            raise _bad(path, number, f"is not UTF-8 text: {found}", "save the file as UTF-8") from None


def _jsonl(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, _Fields]]:
    decoder = msgspec.json.Decoder()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _bad(path, number, f"is not JSON: {error}", f"received {shown(line.strip())}") from None
        if not isinstance(fields, dict):
            raise _bad(
                path, number, f"received {shown(fields)}", 'a row is an object, {"text": ..., "label": ...}'
            )
        yield number, fields


def _csv(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, _Fields]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] = []
    number = 1
    try:
        for values in reader:
            if not values:
                pass  # an empty line
            elif not columns:
                columns = values
                twice = [name for name, count in Counter(columns).items() if count > 1]
                if twice:
                    raise _bad(path, number, f"names the column {shown(twice[0])} more than once")
            elif len(values) != len(columns):
                what = f"has {len(values)} fields, its header {len(columns)}"
                raise _bad(path, number, what, "put text that holds the delimiter in double quotes")
            else:
                yield number, dict(zip(columns, values, strict=True))
            number = reader.line_num + 1  # a quoted field may run over several lines
    except csv.Error as error:
        raise _bad(path, number, f"is not CSV: {error}") from None


def _column(path: Path, number: int, fields: _Fields, name: str) -> Any:
    if name in fields:
        return fields[name]
    meant = nearest(name, fields)
    hint = f'did you mean "{meant}"? ' if meant else ""
    columns = ", ".join(list(fields)[:20]) or "none"
    raise _bad(
        path,
        number,
        f'has no column "{name}"',
        f"{hint}its columns: {columns}; data.text and data.label name them",
    )


def _text(path: Path, number: int, fields: _Fields, name: str) -> str:
    value = _column(path, number, fields, name)
    if not isinstance(value, str):
        raise _bad(path, number, f'"{name}" is {_kind(value)}, received {shown(value)}', "it must be text")
    if not value.strip():
        raise _bad(path, number, f'"{name}" is empty', "give it text, or take the row out")
    return value


def _label(path: Path, number: int, fields: _Fields, name: str, allowed: dict[str, None] | None) -> str:
    value = _column(path, number, fields, name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _bad(
            path, number, f'"{name}" is {_kind(value)}, received {shown(value)}', "it must be a label's text"
        )
    if allowed is not None and value not in allowed:
        meant = nearest(value, allowed)
        hint = f'did you mean "{meant}"? ' if meant else ""
        some = ", ".join(list(allowed)[:20]) + (f" and {len(allowed) - 20} more" if len(allowed) > 20 else "")
        raise _bad(
            path, number, f"the label {shown(value)} is outside the run's set", f"{hint}labels: {some}"
        )
    return value


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "a truth value", dict: "an object", list: "a list"}.get(
        type(value), "a number"
    )


def _bad(path: Path, number: int, what: str, hint: str = "") -> DataError:
    return DataError(f"{path}: row {number}: {what}", hint)
