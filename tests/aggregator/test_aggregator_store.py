"""What any store must do. Another database is another parameter here."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from aggregator.state import tables
from aggregator.state.base import (
    DeviceRow,
    ParticipationRow,
    RoundRow,
    RunRow,
    Store,
    VersionRow,
)
from aggregator.state.folder import StateFolder, check_objects, open_store
from aggregator.state.memory import MemoryStore
from aggregator.state.sql import SqlStore, sqlite_url
from edge_sdk.errors import StateError
from edge_sdk.transport.objects import ObjectStore

RUN = RunRow("demo", "fedquad", "{}", "{}", "/base", "f" * 64, 10, False, 1.0)
OBJECT = "a" * 64


def in_a_file(folder: Path) -> Store:
    return SqlStore(sqlite_url(folder / "server.sqlite"))


def in_memory(folder: Path) -> Store:
    return MemoryStore()


@pytest.fixture(params=[in_a_file, in_memory])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    opened: Store = request.param(tmp_path)
    opened.add_run(RUN)
    yield opened
    opened.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[SqlStore]:
    opened = SqlStore(sqlite_url(tmp_path / "server.sqlite"))
    opened.add_run(RUN)
    yield opened
    opened.close()


def part(round: int, device: str, state: str = "offered", **values: Any) -> ParticipationRow:
    return ParticipationRow("demo", round, device, state, "{}", 2.0, **values)  # type: ignore[arg-type]


def test_rows_come_back_as_they_went(store: Store) -> None:
    round_row = RoundRow("demo", 1, "open", builds_on=0, deadline_s=1.5, open_s=0.25)
    row = part(1, "one")
    version = VersionRow("demo", 0, 0, OBJECT, 10, None, "global", 3.0)
    device = DeviceRow("demo", "one", 3, True, "{}", None, 1e6, None, 4.0)
    store.add_round(round_row)
    store.add_participation(row)
    store.add_version(version)
    store.put_device(device)
    assert store.run("demo") == RUN and store.runs() == [RUN] and store.run("other") is None
    assert store.rounds("demo") == [round_row] and store.last_round("demo") == round_row
    assert store.participation("demo", 1, "one") == row and store.participations("demo") == [row]
    assert store.version("demo", 0) == version and store.versions("demo") == [version]
    assert store.devices("demo") == [device]
    store.set_round("demo", 1, state="merging")
    store.set_participation("demo", 1, "one", state="received", object=OBJECT)
    store.set_version("demo", 0, accuracy=0.5)
    store.set_run("demo", finished=True)
    store.put_device(replace(device, online=False))
    assert store.last_round("demo") == replace(round_row, state="merging")
    assert store.participations("demo", 1) == [replace(row, state="received", object=OBJECT)]
    assert store.version("demo", 0) == replace(version, accuracy=0.5)
    assert store.run("demo") == replace(RUN, finished=True)
    assert store.devices("demo") == [replace(device, online=False)]


def test_a_device_takes_part_once_in_a_round(store: Store) -> None:
    store.add_round(RoundRow("demo", 1, "open"))
    store.add_participation(part(1, "one"))
    with pytest.raises(StateError, match="already"):
        store.add_participation(part(1, "one"))


def test_no_participation_without_its_round(store: Store) -> None:
    with pytest.raises(StateError, match="refer"):
        store.add_participation(part(9, "one"))
    for add in (
        lambda: store.add_round(RoundRow("other", 1, "open")),
        lambda: store.add_version(VersionRow("other", 0, 0, OBJECT, 10, None, "global", 3.0)),
    ):
        with pytest.raises(StateError, match="refer"):
            add()


def test_changing_what_is_not_there_is_an_error(store: Store) -> None:
    with pytest.raises(StateError, match="no row"):
        store.set_round("demo", 7, state="open")


def test_a_transaction_is_all_or_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.transaction():
        store.add_round(RoundRow("demo", 1, "open"))
        with store.transaction():
            store.set_run("demo", finished=True)
        raise RuntimeError
    assert store.rounds("demo") == [] and store.run("demo") == RUN
    store.add_round(RoundRow("demo", 1, "open"))
    assert len(store.rounds("demo")) == 1


def test_the_ledger_adds_up(store: Store) -> None:
    store.count("demo", "one", {"bytes_up": 5, "chunks_up": 1})
    store.count("demo", "one", {"bytes_up": 7, "foreign": 2})
    row = store.ledger("demo")[0]
    assert (row.bytes_up, row.chunks_up, row.foreign, row.bytes_down) == (12, 1, 2, 0)


def test_objects_are_versions_and_updates_that_no_closed_round_has_merged(store: Store) -> None:
    store.add_version(VersionRow("demo", 0, 0, OBJECT, 10, None, "global", 3.0))
    store.add_round(RoundRow("demo", 1, "closed"))
    store.add_round(RoundRow("demo", 2, "merging"))
    for device, state, counts_in in (
        ("a", "received", 1),
        ("b", "received", 2),
        ("c", "received", None),
        ("d", "sending", None),
        ("e", "refused", None),
    ):
        store.add_participation(part(1, device, state, object=device * 64, counts_in=counts_in))
    assert store.objects() == {OBJECT, "b" * 64, "c" * 64}


def test_what_is_awaited_what_waits_and_what_counts(store: Store) -> None:
    for number in (1, 2, 3):
        store.add_round(RoundRow("demo", number, "open"))
    store.add_participation(part(1, "b", "received", counts_in=2, builds_on=0, staleness=1, weight=0.7))
    store.add_participation(part(2, "b", "received", counts_in=2))
    store.add_participation(part(2, "a", "received", counts_in=2))
    store.add_participation(part(2, "c", "chosen"))
    store.add_participation(part(3, "d", "sending"))
    store.add_participation(part(3, "a", "received"))
    store.add_participation(part(3, "e", "missed"))
    store.add_participation(part(1, "e", "offered"))

    def places(rows: Sequence[ParticipationRow]) -> list[tuple[str, int]]:
        return [(row.device, row.round) for row in rows]

    assert places(store.awaited("demo")) == [("e", 1), ("c", 2), ("d", 3)]
    assert places(store.awaited("demo", "c")) == [("c", 2)] and store.awaited("demo", "b") == []
    assert places(store.uncounted("demo")) == [("a", 3)]
    assert places(store.counted("demo", 2)) == [("a", 2), ("b", 1), ("b", 2)]
    assert [row.late for row in store.counted("demo", 2)] == [False, True, False]
    assert store.states("demo", 2) == {"a": "received", "b": "received", "c": "chosen"}
    newest = store.newest_received("demo")
    assert {device: row.round for device, row in newest.items()} == {"a": 3, "b": 2}
    assert store.awaited("other") == [] and store.newest_received("other") == {}


def test_a_second_store_sees_what_is_committed(database: SqlStore, tmp_path: Path) -> None:
    store = database
    reader = SqlStore(sqlite_url(tmp_path / "server.sqlite"), read_only=True)
    with store.transaction():
        store.set_run("demo", rounds=11)
        assert reader.run("demo") == RUN, "a reader waits for nobody"
    assert reader.run("demo") == replace(RUN, rounds=11)
    with pytest.raises(StateError):
        reader.set_run("demo", rounds=12)
    reader.close()


def test_sqlite_is_durable(database: SqlStore) -> None:
    with database.transaction():
        settings = {
            name: database._connected.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    SqlStore(sqlite_url(tmp_path / "server.sqlite")).close()
    connection = sqlite3.connect(tmp_path / "server.sqlite")
    connection.execute("UPDATE schema_version SET version = 99")
    connection.commit()
    connection.close()
    with pytest.raises(StateError, match="later version"):
        SqlStore(sqlite_url(tmp_path / "server.sqlite"))


FIRST = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
CREATE TABLE runs (run VARCHAR(64) NOT NULL, method TEXT NOT NULL, mathematics TEXT NOT NULL,
    record TEXT NOT NULL, base_folder TEXT NOT NULL, fingerprint VARCHAR(64) NOT NULL,
    rounds INTEGER NOT NULL, finished BOOLEAN NOT NULL, created_at FLOAT NOT NULL, PRIMARY KEY (run));
CREATE TABLE versions (run VARCHAR(64) NOT NULL, number INTEGER NOT NULL, round INTEGER NOT NULL,
    object VARCHAR(64) NOT NULL, bytes INTEGER NOT NULL, parent INTEGER, branch VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL, accuracy FLOAT, loss FLOAT, examples INTEGER, evaluation_error TEXT,
    PRIMARY KEY (run, number), FOREIGN KEY(run) REFERENCES runs (run));
CREATE TABLE rounds (run VARCHAR(64) NOT NULL, number INTEGER NOT NULL, state VARCHAR(16) NOT NULL,
    builds_on INTEGER, version INTEGER, outcome VARCHAR(16), deadline_s FLOAT, wait_s FLOAT NOT NULL,
    open_s FLOAT NOT NULL, merge_s FLOAT NOT NULL, evaluating_s FLOAT NOT NULL, evaluation_s FLOAT NOT NULL,
    slowest_train_s FLOAT, shaped_upload_s FLOAT, critical_s FLOAT, opened_at FLOAT, closed_at FLOAT,
    merged_at FLOAT, evaluated_at FLOAT, PRIMARY KEY (run, number), FOREIGN KEY(run) REFERENCES runs (run));
CREATE TABLE participations (run VARCHAR(64) NOT NULL, round INTEGER NOT NULL, device VARCHAR(64) NOT NULL,
    state VARCHAR(16) NOT NULL, offer TEXT NOT NULL, offered_at FLOAT NOT NULL, choice TEXT, decline TEXT,
    announce TEXT, object VARCHAR(64), bytes INTEGER, samples INTEGER, train_s FLOAT, upload_s FLOAT,
    shaped_s FLOAT, duplicate_bytes INTEGER NOT NULL, refusal TEXT, receipt TEXT, received_at FLOAT,
    PRIMARY KEY (run, round, device),
    FOREIGN KEY(run, round) REFERENCES rounds (run, number));
CREATE TABLE devices (run VARCHAR(64) NOT NULL, device VARCHAR(64) NOT NULL, session INTEGER NOT NULL,
    online BOOLEAN NOT NULL, status TEXT, refusal TEXT, up_bps FLOAT, down_bps FLOAT, seen_at FLOAT NOT NULL,
    PRIMARY KEY (run, device));
CREATE TABLE ledger (run VARCHAR(64) NOT NULL, device VARCHAR(64) NOT NULL, bytes_up INTEGER NOT NULL,
    chunks_up INTEGER NOT NULL, duplicate_bytes INTEGER NOT NULL, bytes_down INTEGER NOT NULL,
    chunks_down INTEGER NOT NULL, "foreign" INTEGER NOT NULL, PRIMARY KEY (run, device));
INSERT INTO schema_version VALUES (1);
INSERT INTO runs VALUES ('demo', 'fedquad', '{}', '{}', '/base', 'f', 10, 0, 1.0);
INSERT INTO versions VALUES ('demo', 0, 0, 'aa', 10, NULL, 'global', 3.0, 0.5, 1.0, 8, NULL);
INSERT INTO rounds (run, number, state, builds_on, wait_s, open_s, merge_s, evaluating_s, evaluation_s)
    VALUES ('demo', 1, 'closed', 0, 0, 1, 0, 0, 0), ('demo', 2, 'open', 1, 0, 1, 0, 0, 0);
INSERT INTO participations (run, round, device, state, offer, offered_at, object, duplicate_bytes)
    VALUES ('demo', 1, 'one', 'received', '{}', 2.0, 'bb', 0),
           ('demo', 1, 'two', 'missed', '{}', 2.0, NULL, 0),
           ('demo', 2, 'one', 'received', '{}', 2.0, 'cc', 0);
INSERT INTO devices VALUES ('demo', 'one', 3, 1, NULL, NULL, 1e6, NULL, 4.0);
INSERT INTO ledger VALUES ('demo', 'one', 5, 1, 0, 0, 0, 0);
"""
"""The tables of the first version, with a run in the middle of its second round."""


def shape(connection: sqlite3.Connection) -> dict[str, Any]:
    """Columns, by table, and indexes, as the database has them."""
    tables_of = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    indexes = connection.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    columns = {
        name: {row[1] for row in connection.execute(f"PRAGMA table_info({name})")} for (name,) in tables_of
    }
    return {"columns": columns, "indexes": {name for (name,) in indexes}}


@pytest.mark.parametrize("version", range(1, tables.SCHEMA))
def test_a_store_of_any_older_version_is_brought_forward(version: int, tmp_path: Path) -> None:
    path = tmp_path / "server.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FIRST)
    engine = create_engine(sqlite_url(path))
    with engine.begin() as older:
        for number in range(1, version):
            tables.STEPS[number](older)
        older.execute(tables.schema_version.update().values(version=version))
    engine.dispose()
    with pytest.raises(StateError, match="earlier version"):
        SqlStore(sqlite_url(path), read_only=True)

    store = SqlStore(sqlite_url(path))
    assert store.versions("demo") == [
        VersionRow("demo", 0, 0, "aa", 10, None, "global", 3.0, accuracy=0.5, loss=1.0, examples=8)
    ]
    assert [(row.number, row.state, row.selection) for row in store.rounds("demo")] == [
        (1, "closed", None),
        (2, "open", None),
    ]
    (counted,), (waiting,) = store.counted("demo", 1), store.uncounted("demo")
    assert (counted.device, counted.builds_on, counted.staleness, counted.weight) == ("one", 0, 0, 1.0)
    assert (waiting.device, waiting.round, waiting.builds_on) == ("one", 2, 1)
    assert store.objects() == {"aa", "cc"}
    store.set_version("demo", 0, perplexity=2.0)
    store.put_device(replace(store.devices("demo")[0], learned="{}"))
    store.close()

    with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(tmp_path / "new.sqlite")) as new:
        SqlStore(sqlite_url(tmp_path / "new.sqlite")).close()
        assert shape(old) == shape(new)


def test_no_statement_is_of_one_database_alone(database: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the store says, tables included, can be said to PostgreSQL too."""
    dialect, said = postgresql.dialect(), []
    original = Connection.execute

    def execute(self: Connection, statement: Any, *args: Any, **values: Any) -> Any:
        said.append(str(statement.compile(dialect=dialect)))
        return original(self, statement, *args, **values)

    monkeypatch.setattr(Connection, "execute", execute)
    database.add_round(RoundRow("demo", 1, "open"))
    database.add_participation(part(1, "one"))
    database.set_participation("demo", 1, "one", state="chosen")
    database.put_device(DeviceRow("demo", "one"))
    database.count("demo", "one", {"bytes_up": 1})
    for name in ("versions", "rounds", "participations", "devices", "ledger", "awaited", "uncounted"):
        getattr(database, name)("demo")
    database.counted("demo", 1)
    database.newest_received("demo")
    database.objects()
    assert len(said) > 12
    for table in tables.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))
    assert "BIGINT" in str(CreateTable(tables.ledger).compile(dialect=dialect)), "the sums of a long run"


def test_damage_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "server.sqlite").write_bytes(b"no database at all" * 1000)
    with pytest.raises(StateError, match="state_dir"):
        SqlStore(sqlite_url(tmp_path / "server.sqlite"))


def test_reading_before_there_is_a_run(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no run"):
        open_store(StateFolder(tmp_path), read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_an_accepted_object_that_is_gone_is_an_alarm(store: Store, tmp_path: Path) -> None:
    objects = ObjectStore(tmp_path / "objects")
    check_objects(store, objects)
    store.add_version(VersionRow("demo", 0, 0, OBJECT, 10, None, "global", 3.0))
    with pytest.raises(StateError, match="missing"):
        check_objects(store, objects)
