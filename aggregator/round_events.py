"""What is told of a round as it goes on: the fields of its events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aggregator.state.base import ParticipationRow, RoundRow, VersionRow
from edge_sdk.protocol.trainer import Evaluated

__all__ = ["closed", "done", "found", "made", "opened"]


def opened(row: RoundRow, total: int, devices: Sequence[str]) -> dict[str, Any]:
    return {
        "round": row.number,
        "rounds": total,
        "version": row.builds_on,
        "devices": list(devices),
        "selection": row.selection,
        "schedule": row.schedule,
        "wanted": row.wanted,
        "quorum": row.quorum,
        "deadline_s": row.deadline_s,
    }


def closed(
    row: RoundRow,
    counted: Sequence[ParticipationRow],
    missed: Sequence[ParticipationRow],
    awaited: Sequence[ParticipationRow],
) -> dict[str, Any]:
    """``awaited``: whose updates will be late."""
    return {
        "round": row.number,
        "closed_by": row.closed_by,
        "received": [one.device for one in counted if one.round == row.number],
        "late": [one.device for one in counted if one.round != row.number],
        "missed": [one.device for one in missed],
        "awaited": [one.device for one in awaited],
        "open_s": row.open_s,
    }


def made(row: RoundRow, version: VersionRow, updates: int) -> dict[str, Any]:
    return {
        "version": version.number,
        "round": row.number,
        "bytes": version.bytes,
        "full": version.parent is None,
        "updates": updates,
        "seconds": row.merge_s,
    }


def found(reply: Evaluated) -> dict[str, Any]:
    """What an evaluation found, by the names of a version's columns."""
    names = ("accuracy", "loss", "examples", "f1", "perplexity", "tokens")
    return {name: getattr(reply, name) for name in names}


def done(row: RoundRow) -> dict[str, Any]:
    names = ("outcome", "version", "open_s", "merge_s", "evaluation_s", "slowest_train_s", "overhead_s")
    return {"round": row.number, **{name: getattr(row, name) for name in names}}
