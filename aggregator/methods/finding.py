"""From the word in ``run.method`` to a method: built-in, installed by another package, or by its path."""

from __future__ import annotations

import difflib
import importlib
import re
from importlib.metadata import EntryPoint, entry_points

from aggregator.methods.base import Method
from edge_sdk.errors import ConfigError, EdgeError

__all__ = ["BUILT_IN", "GROUP", "find_method", "method_names"]

GROUP = "edge_sdk.methods"
"""Entry point group in which other packages offer methods."""

BUILT_IN = {
    "fedavg": "aggregator.methods.fedavg:METHOD",
    "fedquad": "aggregator.methods.fedquad:METHOD",
}
_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")


def method_names() -> tuple[str, ...]:
    """Names of the built-in and installed methods."""
    return tuple(sorted({*BUILT_IN, *_installed()}))


def find_method(name: str) -> Method:
    """The method called ``name``: a built-in one, an entry point of ``GROUP``, or ``package.module:name``.

    What is found may be a ``Method`` or something that gives one when called without arguments.

    Raises:
        ConfigError: there is none (names those there are, and the nearest), or it cannot be imported.
    """
    if name in BUILT_IN:
        return _load(name, BUILT_IN[name])
    installed = _installed()
    if name in installed:
        return _load(name, installed[name].value)
    if _PATH.match(name):
        return _load(name, name)
    known = method_names()
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(
        f"run.method: there is no method {name!r}; there are {', '.join(known)}",
        (f"did you mean {near[0]!r}? " if near else "")
        + "a method of your own is named package.module:name, or installed as an entry point of "
        + GROUP,
    )


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(name: str, path: str) -> Method:
    module_name, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
        if not isinstance(found, Method) and callable(found):
            found = found()
    except EdgeError:
        raise
    except Exception as error:  # whatever a user's module does when it is imported
        raise ConfigError(
            f"run.method: {name!r} cannot be had from {path!r}: {type(error).__name__}: {error}",
            "the aggregator must be able to import it: install it, or put its folder on PYTHONPATH",
        ) from error
    if not isinstance(found, Method):
        raise ConfigError(
            f"run.method: {path!r} is a {type(found).__name__}, not a method",
            "name an instance of aggregator.methods.base.Method, or a function that makes one",
        )
    return found
