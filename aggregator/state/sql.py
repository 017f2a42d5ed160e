"""The store on SQL: SQLite by default, any other database of SQLAlchemy by URL with the same code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    Connection,
    Engine,
    Select,
    Table,
    and_,
    create_engine,
    event,
    func,
    insert,
    or_,
    select,
    union,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from aggregator.state import tables
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

__all__ = ["SqlStore", "sqlite_url"]

_R = TypeVar("_R")
_BUSY_S = 10


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


class SqlStore:
    """``Store`` on a database. Used by one thread at a time.

    On SQLite: WAL with ``synchronous=FULL`` (a commit survives a power cut), ``BEGIN IMMEDIATE`` (two
    writers wait for each other instead of failing half way). Readers of other processes are not disturbed.

    Args:
        url: SQLAlchemy URL; ``sqlite_url`` makes one of a path.
        read_only: for commands that look on: nothing is created, migrated or written.
    """

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        self._connection: Connection | None = None
        self._depth = 0
        self._read_only = read_only
        try:
            self._engine = create_engine(url)
            if self._engine.dialect.name == "sqlite":
                _prepare_sqlite(self._engine, read_only)
            with self.transaction():
                if read_only:
                    tables.check_current(self._connected)
                else:
                    tables.migrate(self._connected)
        except SQLAlchemyError as error:
            raise _failure(error) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable at the end of the outermost one."""
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        try:
            with self._engine.begin() as connection:
                self._connection, self._depth = connection, 1
                yield
        except SQLAlchemyError as error:
            raise _failure(error) from error
        finally:
            self._connection, self._depth = None, 0

    # Runs

    def run(self, run: str) -> RunRow | None:
        return self._one(RunRow, select(tables.runs).where(tables.runs.c.run == run))

    def runs(self) -> Sequence[RunRow]:
        return self._all(RunRow, select(tables.runs).order_by(tables.runs.c.created_at))

    def add_run(self, row: RunRow) -> None:
        self._insert(tables.runs, row)

    def set_run(self, run: str, **values: Any) -> None:
        self._update(tables.runs, {"run": run}, values)

    # Versions

    def add_version(self, row: VersionRow) -> None:
        self._insert(tables.versions, row)

    def set_version(self, run: str, number: int, **values: Any) -> None:
        self._update(tables.versions, {"run": run, "number": number}, values)

    def version(self, run: str, number: int) -> VersionRow | None:
        t = tables.versions
        return self._one(VersionRow, select(t).where(t.c.run == run, t.c.number == number))

    def versions(self, run: str) -> Sequence[VersionRow]:
        t = tables.versions
        return self._all(VersionRow, select(t).where(t.c.run == run).order_by(t.c.number))

    # Rounds

    def add_round(self, row: RoundRow) -> None:
        self._insert(tables.rounds, row)

    def set_round(self, run: str, number: int, **values: Any) -> None:
        self._update(tables.rounds, {"run": run, "number": number}, values)

    def last_round(self, run: str) -> RoundRow | None:
        t = tables.rounds
        return self._one(RoundRow, select(t).where(t.c.run == run).order_by(t.c.number.desc()).limit(1))

    def rounds(self, run: str) -> Sequence[RoundRow]:
        t = tables.rounds
        return self._all(RoundRow, select(t).where(t.c.run == run).order_by(t.c.number))

    # Participations

    def add_participation(self, row: ParticipationRow) -> None:
        self._insert(tables.participations, row)

    def set_participation(self, run: str, round: int, device: str, **values: Any) -> None:
        self._update(tables.participations, {"run": run, "round": round, "device": device}, values)

    def participation(self, run: str, round: int, device: str) -> ParticipationRow | None:
        t = tables.participations
        return self._one(
            ParticipationRow, select(t).where(t.c.run == run, t.c.round == round, t.c.device == device)
        )

    def participations(self, run: str, round: int | None = None) -> Sequence[ParticipationRow]:
        t = tables.participations
        query = select(t).where(t.c.run == run).order_by(t.c.round, t.c.device)
        return self._all(ParticipationRow, query if round is None else query.where(t.c.round == round))

    def states(self, run: str, round: int) -> Mapping[str, ParticipationState]:
        t = tables.participations
        query = select(t.c.device, t.c.state).where(t.c.run == run, t.c.round == round).order_by(t.c.device)
        with self.transaction():
            return {row.device: row.state for row in self._connected.execute(query)}

    def awaited(self, run: str, device: str | None = None) -> Sequence[ParticipationRow]:
        t = tables.participations
        query = select(t).where(t.c.run == run, t.c.state.in_(sorted(AWAITED)))
        if device is not None:
            query = query.where(t.c.device == device)
        return self._all(ParticipationRow, query.order_by(t.c.round, t.c.device))

    def uncounted(self, run: str) -> Sequence[ParticipationRow]:
        t = tables.participations
        query = select(t).where(t.c.run == run, t.c.state == "received", t.c.counts_in.is_(None))
        return self._all(ParticipationRow, query.order_by(t.c.round, t.c.device))

    def counted(self, run: str, round: int) -> Sequence[ParticipationRow]:
        t = tables.participations
        query = select(t).where(t.c.run == run, t.c.counts_in == round, t.c.state == "received")
        return self._all(ParticipationRow, query.order_by(t.c.device, t.c.round))

    def newest_received(self, run: str) -> Mapping[str, ParticipationRow]:
        t = tables.participations
        received = and_(t.c.run == run, t.c.state == "received")
        last = select(t.c.device, func.max(t.c.round).label("round")).where(received).group_by(t.c.device)
        newest = last.subquery()
        of_newest = and_(newest.c.device == t.c.device, newest.c.round == t.c.round)
        rows = self._all(ParticipationRow, select(t).join(newest, of_newest).where(received))
        return {row.device: row for row in rows}

    # Devices and the ledger

    def put_device(self, row: DeviceRow) -> None:
        self._put(tables.devices, {"run": row.run, "device": row.device}, asdict(row))

    def devices(self, run: str) -> Sequence[DeviceRow]:
        t = tables.devices
        return self._all(DeviceRow, select(t).where(t.c.run == run).order_by(t.c.device))

    def count(self, run: str, device: str, counts: Mapping[str, int]) -> None:
        t = tables.ledger
        with self.transaction():
            before = self._one(LedgerRow, select(t).where(t.c.run == run, t.c.device == device))
            values = asdict(before or LedgerRow(run, device))
            for name, more in counts.items():
                values[name] += more
            self._put(t, {"run": run, "device": device}, values)

    def ledger(self, run: str) -> Sequence[LedgerRow]:
        t = tables.ledger
        return self._all(LedgerRow, select(t).where(t.c.run == run).order_by(t.c.device))

    def objects(self) -> set[str]:
        updates, rounds = tables.participations, tables.rounds
        merging = and_(rounds.c.run == updates.c.run, rounds.c.number == updates.c.counts_in)
        needed = select(updates.c.object).outerjoin(rounds, merging)
        not_merged = or_(updates.c.counts_in.is_(None), rounds.c.state != "closed")
        with self.transaction():
            query = union(
                needed.where(updates.c.state == "received", not_merged),
                select(tables.versions.c.object).where(tables.versions.c.pruned_at.is_(None)),
            )
            kept = set(self._connected.execute(query).scalars())
            return kept | self._optimizer_states()

    def close(self) -> None:
        self._engine.dispose()

    # How

    def _optimizer_states(self) -> set[str]:
        t = tables.versions
        newest = select(t.c.run, func.max(t.c.number).label("number")).group_by(t.c.run).subquery()
        query = select(t.c.optimizer).join(
            newest, and_(t.c.run == newest.c.run, t.c.number == newest.c.number)
        )
        found = self._connected.execute(query.where(t.c.optimizer.is_not(None))).scalars()
        return {digest for states in found for digest in json.loads(states).values()}

    @property
    def _connected(self) -> Connection:
        if self._connection is None:
            raise StateError("the store was used outside a transaction")
        return self._connection

    def _all(self, kind: type[_R], query: Select[Any]) -> list[_R]:
        with self.transaction():
            return [kind(**row) for row in self._connected.execute(query).mappings()]

    def _one(self, kind: type[_R], query: Select[Any]) -> _R | None:
        rows = self._all(kind, query)
        return rows[0] if rows else None

    def _insert(self, table: Table, row: Any) -> None:
        with self.transaction():
            try:
                self._connected.execute(insert(table).values(asdict(row)))
            except IntegrityError as error:
                key = {column.name: getattr(row, column.name) for column in table.primary_key}
                raise StateError(f"{table.name} holds {key} already, or lacks what it refers to") from error

    def _update(self, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        with self.transaction():
            where = and_(*(table.c[name] == value for name, value in key.items()))
            if self._connected.execute(update(table).where(where).values(dict(values))).rowcount != 1:
                raise StateError(f"{table.name} holds no row {dict(key)}")

    def _put(self, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Update, else insert: plain SQL, so that no dialect is needed. There is one writer."""
        with self.transaction():
            where = and_(*(table.c[name] == value for name, value in key.items()))
            if self._connected.execute(update(table).where(where).values(dict(values))).rowcount == 0:
                self._connected.execute(insert(table).values(dict(values)))


def _prepare_sqlite(engine: Engine, read_only: bool) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        # The driver's own idea of when to begin is switched off; ours is below.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_S * 1000}")
        cursor.execute("PRAGMA foreign_keys=ON")
        if read_only:
            cursor.execute("PRAGMA query_only=ON")
        else:
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _failure(error: SQLAlchemyError) -> StateError:
    cause = getattr(error, "orig", None) or error
    return StateError(
        f"the state store failed: {cause}",
        "see that the disk has room and that run.state_dir is writable and undamaged",
    )
