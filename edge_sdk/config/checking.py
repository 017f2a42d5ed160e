"""From TOML to a record of a schema, with every error of the file found in one walk."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

from edge_sdk.config.problems import Problem, nearest, refuse, shown
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.base import MOST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Rules", "Schema", "check", "keys", "read_toml"]

_S = TypeVar("_S", bound=msgspec.Struct)
_MAX_FILE_BYTES = 4 << 20
Rules = Mapping[str, Callable[[Any], Iterable[Problem]]]
"""By section: what no single value shows."""


class Schema(NamedTuple):
    """A kind of config file: what it holds, how it is called, who owns it, and which command writes one."""

    kind: type[msgspec.Struct]
    name: str
    owner: str
    init: str


def read_toml(path: Path, init: str) -> dict[str, Any]:
    """The tables of a TOML file, as the command ``init`` writes them.

    Raises ConfigError where it is missing, unreadable or not TOML.
    """
    try:
        with path.open("rb") as file:
            read = file.read(_MAX_FILE_BYTES + 1)  # no more of what has no end, as /dev/zero
        if len(read) > _MAX_FILE_BYTES:
            raise ConfigError(f"{path}: is above {_MAX_FILE_BYTES >> 20} MiB, so hardly a config file")
        return tomllib.loads(read.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file", f"`{init}` writes a commented one") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        # The parser's own text ends in "(at line 3, column 7)".
        hint = f"`{init}` writes a file to compare with"
        raise ConfigError(f"{path}: is not TOML: {error}", hint) from None


def check(
    file: object,
    data: dict[str, Any],
    kind: type[_S],
    *,
    folder: Path = Path(),
    other: Schema | None = None,
    rules: Rules | None = None,
    init: str | None = None,
    files: bool = True,
) -> _S:
    """The record in ``data``. Raises one ConfigError with every error found.

    Args:
        file: its name, for the error.
        data: the file's tables. Not changed.
        folder: where the file lies; relative paths start there.
        other: the file that a key may belong in instead.
        rules: asked for each section whose values are all right.
        init: the command that writes such a file.
        files: whether the files that it names must be there.
    """
    walk = _Walk(kind, folder, other, files)
    plain = walk.table(kind, data, "")
    wrong = {problem.key.partition(".")[0] for problem in walk.problems}
    for field in msgspec.structs.fields(kind):
        rule = (rules or {}).get(field.encode_name)
        if rule is not None and field.encode_name in plain and field.encode_name not in wrong:
            walk.problems += rule(msgspec.convert(plain[field.encode_name], field.type, strict=True))
    refuse(file, walk.problems, init)
    return msgspec.convert(plain, kind, strict=True)


def keys(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Dotted path of every value that a file of this kind may hold."""
    for field in _fields(kind):
        inner = _struct_of(field.type)
        if inner is None:
            yield prefix + field.encode_name
        else:
            yield from keys(inner, f"{prefix}{field.encode_name}.")


class _Walk:
    def __init__(
        self, root: type[msgspec.Struct], folder: Path, other: Schema | None, files: bool = True
    ) -> None:
        self.root = root
        self.files = files
        self.folder = folder
        self.other = other
        self.problems: list[Problem] = []

    def table(self, kind: type[msgspec.Struct], data: Any, key: str) -> dict[str, Any]:
        """A table's values as plain data, paths made absolute; errors go to ``problems``."""
        if not isinstance(data, dict):
            self._wrong(key, data, f"a table, [{key}]")
            return {}
        prefix = f"{key}." if key else ""
        plain: dict[str, Any] = {}
        fields = {field.encode_name: field for field in _fields(kind)}
        for name in (name for name in data if name not in fields):
            what = "is no section of this file" if isinstance(data[name], dict) else "is no key of this file"
            self.problems.append(Problem(prefix + name, what, self._advice(name, key, kind)))
        for (name, field), hint in zip(fields.items(), msgspec.structs.fields(kind), strict=True):
            inner = _struct_of(field.type)
            if inner is not None and (name in data or field.default is not None):
                plain[name] = self.table(inner, data.get(name, {}), prefix + name)
            elif (several := self._tables(field.type, data.get(name), prefix + name)) is not None:
                plain[name] = several
            elif name in data:
                plain[name] = self._value(hint.type, field.type, data[name], prefix + name)
            elif _path_kind(field.type) and isinstance(field.default, str):
                plain[name] = self._value(hint.type, field.type, field.default, prefix + name)
            elif field.required:
                self.problems.append(Problem(prefix + name, f"is missing; allowed: {_describe(field.type)}"))
        return plain

    def _tables(self, info: inspect.Type, value: Any, key: str) -> Any:
        """A list of tables, or tables under names, walked one by one; None: the value is neither."""
        match _bare(info):
            case inspect.VarTupleType(item_type=item) if isinstance(value, list) and value:
                if (kind := _struct_of(item)) is not None:
                    return [self.table(kind, one, f"{key}[{at}]") for at, one in enumerate(value)]
            case inspect.DictType(value_type=item) if isinstance(value, dict):
                if (kind := _struct_of(item)) is not None:
                    return {name: self.table(kind, one, f"{key}.{name}") for name, one in value.items()}
        return None

    def _value(self, hint: Any, info: inspect.Type, value: Any, key: str) -> Any:
        try:
            plain = msgspec.convert(value, hint, strict=True)
        except (msgspec.ValidationError, OverflowError) as error:
            self._wrong(key, value, _describe(info), str(error))
            return value
        if isinstance(plain, float) and not math.isfinite(plain):
            self._wrong(key, value, _describe(info))
        path = _path_kind(info)
        return plain if path is None else self._path(path, plain, key)

    def _path(self, kind: str, value: str, key: str) -> str:
        try:
            path = (self.folder / Path(value).expanduser()).resolve()
            there, is_file = path.exists(), path.is_file()
        except (RuntimeError, OSError, ValueError) as error:  # "~nobody", a loop of links, a NUL
            self.problems.append(Problem(key, f"received {shown(value)}, which is no path here: {error}"))
            return value
        if kind == "base":
            local = there or value.startswith((".", "~", "/")) or value.count("/") > 1
            return str(path) if local else value
        if kind == "file" and self.files and not is_file:
            what = "which is no file" if there else "which does not exist"
            hint = f"looked at {path}; paths start at the config file"
            self.problems.append(Problem(key, f"received {shown(value)}, {what}", hint))
        if kind == "folder" and is_file:
            self.problems.append(Problem(key, f"received {shown(value)}, which is a file", "name a folder"))
        return str(path)

    def _wrong(self, key: str, value: Any, allowed: str, detail: str = "") -> None:
        item = detail.partition("`$[")[2].partition("]")[0]
        if item.isdigit() and isinstance(value, list):
            key, value, allowed = f"{key}[{item}]", value[int(item)], allowed.partition(", each ")[2]
        self.problems.append(Problem(key, f"received {shown(value)}; allowed: {allowed}"))

    def _advice(self, name: str, table: str, kind: type[msgspec.Struct]) -> str:
        """Where an unknown key belongs, or what it was probably meant to be."""
        if not table and self.other is not None and name in {f.encode_name for f in _fields(self.other.kind)}:
            own = "".join(f"; here it is [{found}]" for found in _sections(self.root) if _last(found) == name)
            return f"[{name}] belongs in {self.other.name}, which {self.other.owner} owns{own}"
        here = [key for key in keys(self.root) if _last(key) == name]
        if here:
            return "here it is " + " or ".join(here)
        there = [key for key in keys(self.other.kind) if _last(key) == name] if self.other is not None else []
        if there and self.other is not None:
            return f"{' or '.join(there)} belongs in {self.other.name}, which {self.other.owner} owns"
        siblings = [field.encode_name for field in _fields(kind)]
        meant = nearest(name, siblings)
        if meant is not None:
            return f'did you mean "{meant}"?'
        where = f"[{table}]" if table else "the file"
        return f"{where} holds {', '.join(siblings)}"


def _sections(kind: type[msgspec.Struct]) -> dict[str, None]:
    return dict.fromkeys(key.rpartition(".")[0] for key in keys(kind))


def _fields(kind: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)  # noqa: S101  narrows the type, checks no input
    return info.fields


def _bare(info: inspect.Type) -> inspect.Type:
    """The type without ``None`` and without notes."""
    if isinstance(info, inspect.UnionType):
        parts = [part for part in info.types if not isinstance(part, inspect.NoneType)]
        return _bare(parts[0]) if len(parts) == 1 else info
    return info


def _struct_of(info: inspect.Type) -> type[msgspec.Struct] | None:
    bare = _bare(info)
    return bare.cls if isinstance(bare, inspect.StructType) else None


def _path_kind(info: inspect.Type) -> str | None:
    bare = _bare(info)
    return (bare.extra or {}).get("path") if isinstance(bare, inspect.Metadata) else None


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _describe(info: inspect.Type) -> str:
    """What a type allows, in words."""
    match _bare(info):
        case inspect.Metadata(type=inner, extra_json_schema=schema):
            return (schema or {}).get("description") or _describe(inner)
        case inspect.IntType() as number:
            return "an integer" + _bounds(number)
        case inspect.FloatType() as number:
            return "a finite number" + _bounds(number)
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType(max_length=longest):
            return "text" if longest is None else f"text of at most {longest} characters"
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(shown(value) for value in values)
        case inspect.VarTupleType(item_type=item, min_length=least, max_length=most):
            size = f"{least or 0} to {most} values" if most is not None else f"at least {least or 0} values"
            return f"a list of {size}, each {_describe(item)}"
        case inspect.UnionType(types=types):
            return " or ".join(_describe(one) for one in types if not isinstance(one, inspect.NoneType))
        case bare:
            return type(bare).__name__


def _bounds(number: inspect.IntType | inspect.FloatType) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = [
        f"{word} {getattr(number, name):.12g}"
        for name, word in words.items()
        if getattr(number, name) not in (None, MOST)  # which is so large that nobody needs to be told
    ]
    return " " + ", ".join(limits) if limits else ""
