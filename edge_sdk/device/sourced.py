"""Figures with their sources: what the files of ``device_profiles`` are made of, and how they are read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from typing import Annotated, Any, TypeVar

import msgspec

from edge_sdk.config.checking import check
from edge_sdk.config.problems import Problem, nearest, refuse
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.base import Name, Record, Text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Fact", "Figure", "Source", "named", "parse", "read_all"]

Day = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^\d{4}(-\d{2}(-\d{2})?)?\Z", description='a date as text: "2026", "2026-01", "2026-01-31"'
    ),
]

_R = TypeVar("_R", bound=Record)


class Source(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where figures come from: a vendor's page, file or data sheet, or who measured."""

    title: Text
    date: Day
    """Of the edition, as exactly as it is known."""
    checked: Day | None = None
    """When the figures were last compared with the source's text; None: they were not, since written down."""


class Figure(Record, frozen=True, kw_only=True):
    """A number, with the name of its source in ``sources``."""

    value: Annotated[float, msgspec.Meta(gt=0)]
    source: Name
    note: Text = ""


class Fact(Record, frozen=True, kw_only=True):
    """A text, with the name of its source."""

    value: Text
    source: Name
    note: Text = ""


def parse(file: str, text: str, kind: type[_R], rules: Callable[[_R], Iterable[Problem]]) -> _R:
    """One TOML file's record. Raises ConfigError with the file's name and every error of it.

    Args:
        rules: what no single value shows, asked when all values are right.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not TOML: {error}") from None
    found = check(file, data, kind)
    refuse(file, [*_name(file, found), *_sources(found), *rules(found)])
    return found


def read_all(folder: str, parse_file: Callable[[str, str], _R]) -> dict[str, _R]:
    """All files of a folder of ``device_profiles`` ("" for its own), by the record's name, in order of it."""
    files = resources.files("device_profiles").joinpath(folder).iterdir()
    texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".toml")}
    found = [parse_file(file, texts[file]) for file in sorted(texts, key=lambda file: file[:-5])]
    return {one.name: one for one in found}  # type: ignore[attr-defined]


def named(name: str, what: str, those: Mapping[str, _R]) -> _R:
    """The one of that name. Raises ConfigError, with those that exist, where there is none."""
    if name in those:
        return those[name]
    meant = nearest(name, those)
    hint = f'did you mean "{meant}"? ' if meant else ""
    raise ConfigError(f'there is no {what} "{name}"', f"{hint}those that exist: {', '.join(those)}")


def _name(file: str, found: Any) -> Iterator[Problem]:
    if file != f"{found.name}.toml":
        yield Problem("name", f'received "{found.name}"', "it must be the file's name")


def _sources(found: Any) -> Iterator[Problem]:
    used = dict(_used(found, ""))
    for key, source in used.items():
        if source not in found.sources:
            yield Problem(f"{key}source", f'"{source}" is not in [sources]')
    for source in found.sources.keys() - used.values():
        yield Problem(f"sources.{source}", "no figure names it", "delete it, or name it where it is used")


def _used(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every ``source`` in a record, with the path of what holds it."""
    if isinstance(value, msgspec.Struct):
        if isinstance(source := getattr(value, "source", None), str):
            yield key, source
        for field in value.__struct_fields__:
            yield from _used(getattr(value, field), f"{key}{field}.")
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _used(one, f"{key}{name}.")
    elif isinstance(value, tuple):
        for at, one in enumerate(value):
            yield from _used(one, f"{key[:-1]}[{at}].")
