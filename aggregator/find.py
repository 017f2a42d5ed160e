"""Implementations by their word: those of a package of ours, those that others install, or by their path."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from importlib.metadata import entry_points
from typing import TypeVar

from edge_sdk.errors import ConfigError

__all__ = ["find", "names"]

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")
_T = TypeVar("_T")


def find(name: str, kind: type[_T], *, key: str, package: str, attribute: str, group: str) -> _T:
    """The ``kind`` that is called ``name``.

    Args:
        key: of the config file that names it, for errors.
        package: each module of it that has ``attribute`` offers one, under its own name.
        group: entry points in which other packages offer more.

    Raises:
        ConfigError: there is none, it cannot be imported, or it is something else.
    """
    own = _own(package, attribute)
    installed = {point.name: point.value for point in entry_points(group=group)}
    if name in own:
        found = own[name]
    elif name in installed or _PATH.match(name):
        found = _load(name, installed.get(name, name), key)
    else:
        known = sorted({*own, *installed})
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"{key}: there is no {name!r}; there are {', '.join(known)}",
            (f"did you mean {near[0]!r}? " if near else "")
            + f"one of your own is named package.module:name, or installed as an entry point of {group}",
        )
    if not isinstance(found, kind):
        raise ConfigError(f"{key}: {name!r} is a {type(found).__name__}, not a {kind.__name__}")
    return found


def names(package: str, attribute: str, group: str) -> tuple[str, ...]:
    """Those that can be named without a path."""
    return tuple(sorted({*_own(package, attribute), *(point.name for point in entry_points(group=group))}))


def _own(package: str, attribute: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        one = getattr(importlib.import_module(f"{package}.{module.name}"), attribute, None)
        if one is not None:
            found[one.name] = one
    return found


def _load(name: str, path: str, key: str) -> object:
    module, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a user's module does when it is imported
        raise ConfigError(
            f"{key}: {name!r} cannot be had from {path!r}: {type(error).__name__}: {error}",
            "the aggregator must be able to import it: install it, or put its folder on PYTHONPATH",
        ) from error
    return found
