"""What any store must do. Another database is another parameter here."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

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
from aggregator.state.sql import SqlStore, sqlite_url
from edge_sdk.errors import StateError
from edge_sdk.transport.objects import ObjectStore

RUN = RunRow("demo", "fedquad", "{}", "{}", "/base", "f" * 64, 10, False, 1.0)
OBJECT = "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened: Store = SqlStore(sqlite_url(tmp_path / "server.sqlite"))
    opened.add_run(RUN)
    yield opened
    opened.close()


def test_rows_come_back_as_they_went(store: Store) -> None:
    round_row = RoundRow("demo", 1, "open", builds_on=0, deadline_s=1.5, open_s=0.25)
    part = ParticipationRow("demo", 1, "one", "offered", "{}", 2.0)
    version = VersionRow("demo", 0, 0, OBJECT, 10, None, "global", 3.0)
    device = DeviceRow("demo", "one", 3, True, "{}", None, 1e6, None, 4.0)
    store.add_round(round_row)
    store.add_participation(part)
    store.add_version(version)
    store.put_device(device)
    assert store.run("demo") == RUN and store.runs() == [RUN] and store.run("other") is None
    assert store.rounds("demo") == [round_row] and store.last_round("demo") == round_row
    assert store.participation("demo", 1, "one") == part and store.participations("demo") == [part]
    assert store.version("demo", 0) == version and store.versions("demo") == [version]
    assert store.devices("demo") == [device]
    store.set_round("demo", 1, state="merging")
    store.set_participation("demo", 1, "one", state="received", object=OBJECT)
    store.set_version("demo", 0, accuracy=0.5)
    store.set_run("demo", finished=True)
    store.put_device(replace(device, online=False))
    assert store.last_round("demo") == replace(round_row, state="merging")
    assert store.participations("demo", 1) == [replace(part, state="received", object=OBJECT)]
    assert store.version("demo", 0) == replace(version, accuracy=0.5)
    assert store.run("demo") == replace(RUN, finished=True)
    assert store.devices("demo") == [replace(device, online=False)]


def test_a_device_takes_part_once_in_a_round(store: Store) -> None:
    store.add_round(RoundRow("demo", 1, "open"))
    store.add_participation(ParticipationRow("demo", 1, "one", "offered", "{}", 2.0))
    with pytest.raises(StateError, match="participations"):
        store.add_participation(ParticipationRow("demo", 1, "one", "offered", "{}", 3.0))


def test_no_participation_without_its_round(store: Store) -> None:
    with pytest.raises(StateError):
        store.add_participation(ParticipationRow("demo", 9, "one", "offered", "{}", 2.0))


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


def test_objects_are_versions_and_updates_of_rounds_that_are_not_closed(store: Store) -> None:
    store.add_version(VersionRow("demo", 0, 0, OBJECT, 10, None, "global", 3.0))
    for number, state in ((1, "closed"), (2, "open")):
        store.add_round(RoundRow("demo", number, state))  # type: ignore[arg-type]
        for device, taken in (("one", "received"), ("two", "sending")):
            digest = f"{number}{taken[0]}".ljust(64, "0")
            store.add_participation(
                ParticipationRow("demo", number, device, taken, "{}", 2.0, object=digest)  # type: ignore[arg-type]
            )
    assert store.objects() == {OBJECT, "2r".ljust(64, "0")}


def test_a_second_store_sees_what_is_committed(store: Store, tmp_path: Path) -> None:
    reader = SqlStore(sqlite_url(tmp_path / "server.sqlite"), read_only=True)
    with store.transaction():
        store.set_run("demo", rounds=11)
        assert reader.run("demo") == RUN, "a reader waits for nobody"
    assert reader.run("demo") == replace(RUN, rounds=11)
    with pytest.raises(StateError):
        reader.set_run("demo", rounds=12)
    reader.close()


def test_sqlite_is_durable(store: Store, tmp_path: Path) -> None:
    assert isinstance(store, SqlStore)
    with store.transaction():
        settings = {
            name: store._connected.exec_driver_sql(f"PRAGMA {name}").scalar()
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


def test_an_older_store_is_brought_forward(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "server.sqlite")
    opened = SqlStore(url)
    opened.add_run(RUN)
    version = VersionRow("demo", 0, 0, OBJECT, 10, None, "global", 3.0, accuracy=0.5)
    opened.add_version(version)
    opened.close()
    connection = sqlite3.connect(tmp_path / "server.sqlite")
    for name in ("f1", "perplexity", "tokens", "utilities"):
        connection.execute(f"ALTER TABLE versions DROP COLUMN {name}")
    connection.execute("ALTER TABLE devices DROP COLUMN learned")
    connection.execute("UPDATE schema_version SET version = 1")
    connection.commit()
    connection.close()
    with pytest.raises(StateError, match="earlier version"):
        SqlStore(url, read_only=True)
    opened = SqlStore(url)
    with opened.transaction():
        assert tables.check_version(opened._connected) == tables.SCHEMA
    assert opened.versions("demo") == [version]
    opened.set_version("demo", 0, perplexity=2.0)
    opened.put_device(DeviceRow("demo", "one", learned="{}"))
    opened.close()
    opened = SqlStore(url, read_only=True)
    assert opened.versions("demo") == [replace(version, perplexity=2.0)]
    assert opened.devices("demo")[0].learned == "{}"
    opened.close()


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
