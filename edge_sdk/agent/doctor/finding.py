"""What ``edge-agent doctor`` says: one record a finding, each with what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from edge_sdk.errors import EdgeError
from edge_sdk.protocol.base import NotNegative, Record

__all__ = ["Finding", "exit_code", "of_error"]

Level = Literal["ok", "note", "warning", "error", "skipped"]


class Finding(Record, frozen=True, kw_only=True):
    """``note``: works, and something better is to be had. ``warning``: works, and may surprise."""

    id: str
    level: Level
    text: str
    fix: str = ""
    exit_code: NotNegative = 0
    """Of an error: what the commands that meet it end with."""


def of_error(name: str, error: EdgeError) -> Finding:
    return Finding(id=name, level="error", text=error.message, fix=error.hint, exit_code=error.exit_code)


def exit_code(findings: Iterable[Finding]) -> int:
    """That of the first error: findings come in the order in which one rests on another."""
    return next((finding.exit_code for finding in findings if finding.level == "error"), 0)
