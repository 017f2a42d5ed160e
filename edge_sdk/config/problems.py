"""What is wrong with a file: collected, so that one look at the errors is enough to mend them all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from edge_sdk.errors import ConfigError

__all__ = ["Problem", "nearest", "refuse", "shown"]


class Problem(NamedTuple):
    """One error: the key's dotted path, what is wrong with it, what to do."""

    key: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.text} ({self.hint})" if self.hint else f"{self.key}: {self.text}"


def refuse(file: object, problems: Sequence[Problem], init: str | None = None) -> None:
    """Raises one ConfigError that holds all ``problems``: one line for one, a line each for several.

    ``init``: the command that writes such a file.
    """
    if len(problems) == 1:
        (problem,) = problems
        raise ConfigError(f"{file}: {problem.key}: {problem.text}", problem.hint)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        hint = f"`{init}` writes a file to compare with" if init else ""
        raise ConfigError(f"{file}: {len(problems)} errors:{lines}", hint)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of ``words`` that ``word`` was probably meant to be."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return found[0] if found else None


def shown(value: Any) -> str:
    """A received value for an error text: as TOML or JSON would have it, cut where it is long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..." ({len(value)} characters)'
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return str(value)[:80]
