"""Small files of /proc and /sys: they come, go and fail while they are read."""

from __future__ import annotations

import math
from pathlib import Path

__all__ = ["number_in", "number_or_why", "text_in", "text_or_why"]

_MOST_BYTES = 1 << 20
"""Of a file; those of many processors are long, and none is longer."""


def text_in(path: Path) -> str:
    """The text without its end (device trees end in NUL); empty where it cannot be read."""
    return text_or_why(path)[0]


def number_in(path: Path) -> float | None:
    """The number that the file consists of; None where it holds another thing or cannot be read."""
    return number_or_why(path)[0]


def text_or_why(path: Path) -> tuple[str, str]:
    """The text, and, where it is empty, why."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode(errors="replace").strip("\0 \n\t")
    except FileNotFoundError:
        return "", f"{path.name} is not there"
    except OSError as error:
        return "", f"{path.name} cannot be read: {error.strerror or error}"
    return text, "" if text else f"{path.name} is empty"


def number_or_why(path: Path) -> tuple[float | None, str]:
    """The number that the file consists of, and, where it is None, why."""
    text, why = text_or_why(path)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number, ""
    return None, why or f"{path.name} holds {text[:40]!r}, which is no number"
