"""Files of rows, by their suffix: JSONL, CSV and Parquet, read a piece at a time.

A row's number is that of its first line in the file, counted from 1, as an editor shows it; in Parquet,
which has no lines, it is the row's own. Rows never leave the device.
"""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from edge_sdk.config.problems import nearest, shown
from edge_sdk.errors import DataError, MissingExtraError

__all__ = ["FORMATS", "Choose", "Fields", "bad_row", "check_file", "missing_column", "read_fields"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PARQUET = ".parquet"
FORMATS = (".jsonl", ".ndjson", *_DELIMITERS, _PARQUET)
_MAX_LINE_BYTES = 4 << 20
_MAGIC = b"PAR1"
_BATCH_ROWS = 1024
Fields = dict[str, Any]
Choose = Callable[[int, Collection[str]], Sequence[str]]
"""Given the first row's number and columns, those that will be asked for."""


def read_fields(path: Path, choose: Choose) -> Iterator[tuple[int, Fields]]:
    """Number and columns of every row; of Parquet none but the chosen columns are read.

    Raises:
        DataError: at the first row that cannot be read, or where the file holds none.
        MissingExtraError: Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f'{path}: the suffix "{suffix}" tells no format', f"use one of {', '.join(FORMATS)}")
    number = 0
    try:
        with path.open("rb") as file:
            for number, fields in _rows(path, suffix, file, choose):
                yield number, fields
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such file", "data.path is where the rows are looked for"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not number:
        raise DataError(f"{path}: holds no rows", "one row is the least")


def check_file(path: Path) -> bool:
    """Whether the file is one that reading costs little. Parquet is looked at from outside only: its reader
    takes 50 MB, which belong in the process that trains. Raises as ``read_fields``.
    """
    if path.suffix.lower() != _PARQUET:
        return True
    if importlib.util.find_spec("pyarrow") is None:
        raise _no_pyarrow(path)
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise DataError(f"{path}: is not Parquet: it does not begin with {_MAGIC.decode()}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return False


def bad_row(path: Path, number: int, what: str, hint: str = "") -> DataError:
    return DataError(f"{path}: row {number}: {what}", hint)


def missing_column(path: Path, number: int, columns: Collection[str], name: str, keys: str) -> DataError:
    """``keys``: those of the config that name such columns."""
    meant = nearest(name, columns)
    hint = f'did you mean "{meant}"? ' if meant else ""
    some = ", ".join(list(columns)[:20]) or "none"
    return bad_row(path, number, f'has no column "{name}"', f"{hint}its columns: {some}; {keys} name them")


def _rows(path: Path, suffix: str, file: BinaryIO, choose: Choose) -> Iterator[tuple[int, Fields]]:
    if suffix == _PARQUET:
        yield from _parquet(path, file, choose)
        return
    lines = _lines(path, file)
    delimiter = _DELIMITERS.get(suffix)
    first = True
    for number, fields in _csv(path, lines, delimiter) if delimiter else _jsonl(path, lines):
        if first:
            choose(number, fields)
            first = False
        yield number, fields


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Decoded lines with their ends. Line by line, so that a wrong byte is told with its line."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise bad_row(path, number, f"is longer than {_MAX_LINE_BYTES >> 20} MiB")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            found = f"0x{line[error.start]:02x} at byte {error.start + 1}"
            raise bad_row(path, number, f"is not UTF-8 text: {found}", "save the file as UTF-8") from None


def _jsonl(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Fields]]:
    decoder = msgspec.json.Decoder()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise bad_row(path, number, f"is not JSON: {error}", f"received {shown(line.strip())}") from None
        if not isinstance(fields, dict):
            raise bad_row(
                path, number, f"received {shown(fields)}", 'a row is an object, {"text": ..., "label": ...}'
            )
        yield number, fields


def _csv(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, Fields]]:
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
                    raise bad_row(path, number, f"names the column {shown(twice[0])} more than once")
            elif len(values) != len(columns):
                what = f"has {len(values)} fields, its header {len(columns)}"
                raise bad_row(path, number, what, "put text that holds the delimiter in double quotes")
            else:
                yield number, dict(zip(columns, values, strict=True))
            number = reader.line_num + 1  # a quoted field may run over several lines
    except csv.Error as error:
        raise bad_row(path, number, f"is not CSV: {error}") from None


def _parquet(path: Path, file: BinaryIO, choose: Choose) -> Iterator[tuple[int, Fields]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _no_pyarrow(path) from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        wanted = [name for name in dict.fromkeys(choose(1, columns)) if name in columns]
        twice = [name for name in wanted if columns.count(name) > 1]
        if twice:
            raise bad_row(
                path, 1, f"names the column {shown(twice[0])} more than once", "rename all but one of them"
            )
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            for fields in _values(path, batch, number):
                number += 1
                yield number, fields
    except (pyarrow.ArrowException, OSError) as error:
        where = f" after row {number}" if number else ""
        raise DataError(f"{path}: is not Parquet{where}: {str(error).splitlines()[0][:200]}") from None


def _values(path: Path, batch: Any, before: int) -> list[Fields]:
    """A batch's rows; of one that holds what Python cannot (text that is not UTF-8, a time too far off),
    the number is told."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):
        for place in range(batch.num_rows):
            try:
                batch.slice(place, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                said = " ".join(str(error).split())[:200]
                raise bad_row(
                    path, before + place + 1, f"cannot be read: {said}", "write its values as UTF-8 text"
                ) from None
        raise


def _no_pyarrow(path: Path) -> MissingExtraError:
    return MissingExtraError(
        f"{path}: reading Parquet needs pyarrow, which is not installed",
        "pip install 'edge-sdk[parquet]', or write the rows as .jsonl or .csv",
    )
