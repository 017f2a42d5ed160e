"""The outbox: finished updates that wait for their receipt, as rows of the agent's own database.

The caller owns the transactions, so that an update, its row and its residual become durable together.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal, get_args

from edge_sdk.errors import StateError
from edge_sdk.protocol.wire import Announce, decode_as, encode

__all__ = ["Outbox", "OutboxItem", "OutboxState"]

OutboxState = Literal["queued", "sending", "awaiting-receipt"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    object TEXT NOT NULL,
    announce BLOB NOT NULL,
    residual TEXT,
    state TEXT NOT NULL,
    bytes_sent INTEGER NOT NULL DEFAULT 0,
    chunks_sent INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (run, round)
)
"""
_COLUMNS = "announce, residual, state, bytes_sent, chunks_sent"


@dataclass(frozen=True)
class OutboxItem:
    """One update. ``announce`` is as it was added; ``bytes_sent`` counts payload bytes, repeats included."""

    announce: Announce
    residual: str | None
    """Object that holds the residual that was adopted with this update."""
    state: OutboxState
    bytes_sent: int
    chunks_sent: int

    @property
    def key(self) -> tuple[str, int]:
        return self.announce.run, self.announce.round


class Outbox:
    """At most one item for each run and round. Never commits: wrap calls in ``with connection:``."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute(_SCHEMA)

    def add(self, announce: Announce, residual: str | None = None) -> None:
        """Queues an update. Raises StateError where another object is queued for the same run and round."""
        before = self.get(announce.run, announce.round)
        if before is not None:
            if before.announce.object == announce.object:
                return
            raise StateError(
                f"round {announce.round} of run {announce.run} already has update "
                f"{before.announce.object[:12]} in the outbox",
            )
        self._connection.execute(
            "INSERT INTO outbox (run, round, object, announce, residual, state)"
            " VALUES (?, ?, ?, ?, ?, 'queued')",
            (announce.run, announce.round, announce.object, encode(announce), residual),
        )

    def items(self) -> list[OutboxItem]:
        """All items, in the order in which they were added."""
        rows = self._connection.execute(f"SELECT {_COLUMNS} FROM outbox ORDER BY rowid")  # noqa: S608
        return [_item(row) for row in rows]

    def get(self, run: str, round: int) -> OutboxItem | None:
        row = self._connection.execute(
            f"SELECT {_COLUMNS} FROM outbox WHERE run = ? AND round = ?",  # noqa: S608
            (run, round),
        ).fetchone()
        return None if row is None else _item(row)

    def set_state(self, run: str, round: int, state: OutboxState) -> None:
        self._update("state = ?", (state,), run, round)

    def count_sent(self, run: str, round: int, size: int, chunks: int) -> None:
        """Adds to what went out for this item; commit it before the bytes go, and a crash counts too much
        rather than too little."""
        self._update("bytes_sent = bytes_sent + ?, chunks_sent = chunks_sent + ?", (size, chunks), run, round)

    def remove(self, run: str, round: int) -> bool:
        """False: there was no such item."""
        cursor = self._connection.execute("DELETE FROM outbox WHERE run = ? AND round = ?", (run, round))
        return cursor.rowcount > 0

    def objects(self) -> set[str]:
        """Every object that an item needs; the store must keep them."""
        rows = self._connection.execute("SELECT object, residual FROM outbox")
        return {name for row in rows for name in row if name is not None}

    def _update(self, setting: str, values: tuple[object, ...], run: str, round: int) -> None:
        cursor = self._connection.execute(
            f"UPDATE outbox SET {setting} WHERE run = ? AND round = ?",  # noqa: S608
            (*values, run, round),
        )
        if cursor.rowcount == 0:
            raise StateError(f"round {round} of run {run} is not in the outbox")


def _item(row: tuple[bytes, str | None, str, int, int]) -> OutboxItem:
    announce, residual, state, bytes_sent, chunks_sent = row
    for known in get_args(OutboxState):
        if state == known:
            return OutboxItem(decode_as(announce, Announce), residual, known, bytes_sent, chunks_sent)
    raise StateError(
        f"the outbox holds an item in the unknown state {state!r}", "the state folder is damaged"
    )
