"""Rows of a task, one at a time; whatever is wrong is told with the row's number.

Classification reads text and label; a causal LM reads whole texts, prompts with responses, or chats.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from edge_sdk.config.problems import nearest, shown
from edge_sdk.data.formats import FORMATS, Fields, bad_row, check_file, missing_column, read_fields
from edge_sdk.errors import DataError

__all__ = [
    "FORMATS",
    "ChatRow",
    "Checked",
    "Message",
    "PromptRow",
    "Row",
    "RowSource",
    "Sample",
    "TextRow",
    "check_rows",
    "read_rows",
    "read_samples",
]

_LABELLED = "data.text and data.label"
_SAMPLED = "data.prompt, data.response, data.text and data.messages"


class RowSource(Protocol):
    """A file of rows and the columns of each kind."""

    @property
    def path(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    @property
    def response(self) -> str: ...

    @property
    def messages(self) -> str: ...


class Row(NamedTuple):
    """Of classification."""

    text: str
    label: str
    number: int


class TextRow(NamedTuple):
    """Every token is to be learnt."""

    text: str
    number: int


class PromptRow(NamedTuple):
    """The response is to be learnt."""

    prompt: str
    response: str
    number: int


class Message(NamedTuple):
    role: str
    content: str


class ChatRow(NamedTuple):
    """The turns of role ``assistant`` are to be learnt; there is at least one."""

    messages: tuple[Message, ...]
    number: int


Sample = TextRow | PromptRow | ChatRow


def read_rows(source: RowSource, labels: Sequence[str] | None = None) -> Iterator[Row]:
    """The labelled rows of a JSONL, CSV or Parquet file (told by its suffix).

    Args:
        source: path and columns.
        labels: the set that every label must be of; None: any. Numbers count by their decimal text.

    Raises:
        DataError: at the first row that cannot be used, or where the file holds none.
        MissingExtraError: Parquet without pyarrow.
    """
    path = Path(source.path)
    allowed = None if labels is None else dict.fromkeys(labels)
    columns = (source.text, source.label)

    def choose(number: int, names: Collection[str]) -> Sequence[str]:
        for name in columns:
            if name not in names:
                raise missing_column(path, number, names, name, _LABELLED)
        return columns

    for number, fields in read_fields(path, choose):
        text = _text(path, number, fields, source.text, _LABELLED)
        yield Row(text, _label(path, number, fields, source.label, allowed), number)


def read_samples(source: RowSource) -> Iterator[Sample]:
    """The rows of a file for a causal LM. Of which kind they are, the first row tells by its columns:

    messages, else prompt and response, else text. Raises as ``read_rows``.
    """
    path = Path(source.path)
    kind = _SampleKind(path, source)
    for number, fields in read_fields(path, kind.choose):
        text = partial(_text, path, number, fields, keys=_SAMPLED)
        if kind.found == "messages":
            yield ChatRow(_messages(path, number, fields, source.messages), number)
        elif kind.found == "prompt":
            yield PromptRow(text(source.prompt), text(source.response), number)
        else:
            yield TextRow(text(source.text), number)


class Checked(NamedTuple):
    """What a file's rows are, by the columns of its first."""

    kind: type[Row | Sample]
    """As which they are read: ``Row`` for classification, else for a causal LM."""
    columns: tuple[str, ...]


def check_rows(source: RowSource) -> Checked | None:
    """Reads all rows before the task is known: as labelled ones where the first row has both columns.

    Parquet is left to whoever reads it: None. Raises as ``read_rows``.
    """
    path = Path(source.path)
    if not check_file(path):
        return None
    first = next(read_fields(path, lambda *_: ()))[1]
    labelled = {source.text, source.label} <= first.keys()
    (kind,) = {type(row) for row in (read_rows(source) if labelled else read_samples(source))}
    return Checked(kind, tuple(first))


class _SampleKind:
    """Which columns a file's samples are in; known once ``choose`` was called."""

    def __init__(self, path: Path, source: RowSource) -> None:
        self._path = path
        self._source = source
        self.found: Literal["messages", "prompt", "text"] = "text"

    def choose(self, number: int, names: Collection[str]) -> Sequence[str]:
        source = self._source
        if source.messages in names:
            self.found = "messages"
            return (source.messages,)
        if source.prompt in names and source.response in names:
            self.found = "prompt"
            return (source.prompt, source.response)
        for one, other in ((source.prompt, source.response), (source.response, source.prompt)):
            if one in names and source.text not in names:
                raise missing_column(self._path, number, names, other, _SAMPLED)
        if source.text not in names:
            raise missing_column(self._path, number, names, source.text, _SAMPLED)
        return (source.text,)


def _column(path: Path, number: int, fields: Fields, name: str, keys: str) -> Any:
    if name not in fields:
        raise missing_column(path, number, fields, name, keys)
    return fields[name]


def _text(path: Path, number: int, fields: Fields, name: str, keys: str) -> str:
    value = _column(path, number, fields, name, keys)
    if not isinstance(value, str):
        raise bad_row(path, number, f'"{name}" is {_kind(value)}, received {shown(value)}', "it must be text")
    if not value.strip():
        raise bad_row(path, number, f'"{name}" is empty', "give it text, or take the row out")
    return value


def _label(path: Path, number: int, fields: Fields, name: str, allowed: dict[str, None] | None) -> str:
    value = _column(path, number, fields, name, _LABELLED)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise bad_row(
            path, number, f'"{name}" is {_kind(value)}, received {shown(value)}', "it must be a label's text"
        )
    if allowed is not None and value not in allowed:
        meant = nearest(value, allowed)
        hint = f'did you mean "{meant}"? ' if meant else ""
        some = ", ".join(list(allowed)[:20]) + (f" and {len(allowed) - 20} more" if len(allowed) > 20 else "")
        raise bad_row(
            path, number, f"the label {shown(value)} is outside the run's set", f"{hint}labels: {some}"
        )
    return value


def _messages(path: Path, number: int, fields: Fields, name: str) -> tuple[Message, ...]:
    """A list of objects; where the format holds text alone (CSV), its JSON."""

    def bad(what: str) -> DataError:
        return bad_row(
            path, number, f'"{name}" {what}', 'it must be a list of {"role": "...", "content": "..."}'
        )

    value = _column(path, number, fields, name, _SAMPLED)
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise bad(f"is text that is not JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise bad(f"is {_kind(value) if value != [] else 'empty'}, received {shown(value)}")
    messages = []
    for place, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise bad(f"holds {shown(entry)} at place {place}")
        role, content = entry.get("role"), entry.get("content")
        if not isinstance(role, str) or not role or not isinstance(content, str):
            raise bad(f"lacks role or content, as text, at place {place}")
        messages.append(Message(role, content))
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise bad_row(path, number, f'"{name}" has no turn of role "assistant"', "only such turns are learnt")
    return tuple(messages)


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a truth value", dict: "an object", list: "a list", str: "text"}
    number = "a number" if isinstance(value, (int, float)) else f"of type {type(value).__name__}"
    return kinds.get(type(value), number)
