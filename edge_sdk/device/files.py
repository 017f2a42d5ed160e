"""Small files of /proc and /sys: they come, go and fail while they are read."""

from __future__ import annotations

from pathlib import Path

__all__ = ["number_in", "text_in"]


def text_in(path: Path) -> str:
    """The text without its end (device trees end in NUL); empty where it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \n\t")
    except OSError:
        return ""


def number_in(path: Path) -> float | None:
    """The number that the file consists of; None where it holds another thing or cannot be read."""
    try:
        return float(text_in(path))
    except ValueError:
        return None
