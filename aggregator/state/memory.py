"""The store in memory, for tests and simulation: the same rules, and nothing outlives the process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from aggregator.state.base import (
    AWAITED,
    DeviceRow,
    LedgerRow,
    ParticipationRow,
    ParticipationState,
    RoundRow,
    RunRow,
    VersionRow,
)
from edge_sdk.errors import StateError

__all__ = ["MemoryStore"]

_R = TypeVar("_R", RunRow, VersionRow, RoundRow, ParticipationRow, DeviceRow, LedgerRow)
_Table = dict[tuple[Any, ...], _R]


class MemoryStore:
    """``Store`` in dicts. A transaction that fails leaves everything as it was."""

    def __init__(self) -> None:
        self._runs: _Table[RunRow] = {}
        self._versions: _Table[VersionRow] = {}
        self._rounds: _Table[RoundRow] = {}
        self._participations: _Table[ParticipationRow] = {}
        self._devices: _Table[DeviceRow] = {}
        self._ledger: _Table[LedgerRow] = {}
        self._depth = 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._depth += 1
        before = [table.copy() for table in self._tables] if self._depth == 1 else []
        try:
            yield
        except BaseException:
            for table, rows in zip(self._tables, before, strict=False):
                table.clear()
                table.update(rows)
            raise
        finally:
            self._depth -= 1

    # Runs

    def run(self, run: str) -> RunRow | None:
        return self._runs.get((run,))

    def runs(self) -> Sequence[RunRow]:
        return sorted(self._runs.values(), key=lambda row: row.created_at)

    def add_run(self, row: RunRow) -> None:
        _add(self._runs, (row.run,), row)

    def set_run(self, run: str, **values: Any) -> None:
        _set(self._runs, (run,), values)

    # Versions

    def add_version(self, row: VersionRow) -> None:
        _need(self._runs, (row.run,))
        _add(self._versions, (row.run, row.number), row)

    def set_version(self, run: str, number: int, **values: Any) -> None:
        _set(self._versions, (run, number), values)

    def version(self, run: str, number: int) -> VersionRow | None:
        return self._versions.get((run, number))

    def versions(self, run: str) -> Sequence[VersionRow]:
        return _of(self._versions, run)

    # Rounds

    def add_round(self, row: RoundRow) -> None:
        _need(self._runs, (row.run,))
        _add(self._rounds, (row.run, row.number), row)

    def set_round(self, run: str, number: int, **values: Any) -> None:
        _set(self._rounds, (run, number), values)

    def last_round(self, run: str) -> RoundRow | None:
        rows = self.rounds(run)
        return rows[-1] if rows else None

    def rounds(self, run: str) -> Sequence[RoundRow]:
        return _of(self._rounds, run)

    # Participations

    def add_participation(self, row: ParticipationRow) -> None:
        _need(self._rounds, (row.run, row.round))
        _add(self._participations, (row.run, row.round, row.device), row)

    def set_participation(self, run: str, round: int, device: str, **values: Any) -> None:
        _set(self._participations, (run, round, device), values)

    def participation(self, run: str, round: int, device: str) -> ParticipationRow | None:
        return self._participations.get((run, round, device))

    def participations(self, run: str, round: int | None = None) -> Sequence[ParticipationRow]:
        return [row for row in _of(self._participations, run) if round in (None, row.round)]

    def states(self, run: str, round: int) -> dict[str, ParticipationState]:
        return {row.device: row.state for row in self.participations(run, round)}

    def awaited(self, run: str, device: str | None = None) -> Sequence[ParticipationRow]:
        rows = _of(self._participations, run)
        return [row for row in rows if row.state in AWAITED and device in (None, row.device)]

    def uncounted(self, run: str) -> Sequence[ParticipationRow]:
        rows = _of(self._participations, run)
        return [row for row in rows if row.state == "received" and row.counts_in is None]

    def counted(self, run: str, round: int) -> Sequence[ParticipationRow]:
        rows = _of(self._participations, run)
        counted = (row for row in rows if row.counts_in == round and row.state == "received")
        return sorted(counted, key=lambda row: (row.device, row.round))

    def newest_received(self, run: str) -> Mapping[str, ParticipationRow]:
        return {row.device: row for row in _of(self._participations, run) if row.state == "received"}

    # Devices and the ledger

    def put_device(self, row: DeviceRow) -> None:
        self._devices[row.run, row.device] = row

    def devices(self, run: str) -> Sequence[DeviceRow]:
        return _of(self._devices, run)

    def count(self, run: str, device: str, counts: Mapping[str, int]) -> None:
        row = self._ledger.get((run, device)) or LedgerRow(run, device)
        more = {name: asdict(row)[name] + count for name, count in counts.items()}
        self._ledger[run, device] = replace(row, **more)

    def ledger(self, run: str) -> Sequence[LedgerRow]:
        return _of(self._ledger, run)

    def objects(self) -> set[str]:
        closed = {key for key, row in self._rounds.items() if row.state == "closed"}
        newest = {run: self._versions[run, number] for run, number in sorted(self._versions)}
        states = [json.loads(row.optimizer) for row in newest.values() if row.optimizer is not None]
        kept = {digest for held in states for digest in held.values()}
        return (
            kept
            | {row.object for row in self._versions.values() if row.kept}
            | {
                row.object
                for row in self._participations.values()
                if row.object is not None
                and row.state == "received"
                and (row.run, row.counts_in) not in closed
            }
        )

    def close(self) -> None: ...

    @property
    def _tables(self) -> list[dict[tuple[Any, ...], Any]]:
        return [
            self._runs,
            self._versions,
            self._rounds,
            self._participations,
            self._devices,
            self._ledger,
        ]


def _of(table: _Table[_R], run: str) -> list[_R]:
    return [table[key] for key in sorted(key for key in table if key[0] == run)]


def _add(table: _Table[_R], key: tuple[Any, ...], row: _R) -> None:
    if key in table:
        raise StateError(f"{type(row).__name__} holds {key} already")
    table[key] = row


def _need(table: _Table[Any], key: tuple[Any, ...]) -> None:
    if key not in table:
        raise StateError(f"there is no {key} to refer to")


def _set(table: _Table[_R], key: tuple[Any, ...], values: Mapping[str, Any]) -> None:
    row = table.get(key)
    if row is None:
        raise StateError(f"there is no row {key}")
    unknown = set(values) - {field.name for field in fields(row)}
    if unknown:
        raise StateError(f"{type(row).__name__} holds no {', '.join(sorted(unknown))}")
    table[key] = replace(row, **values)
