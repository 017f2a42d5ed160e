"""The tables, and how an older store becomes one of today."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    select,
    text,
)

from edge_sdk.errors import StateError

__all__ = [
    "SCHEMA",
    "check_current",
    "check_version",
    "devices",
    "ledger",
    "metadata",
    "migrate",
    "participations",
    "rounds",
    "runs",
    "versions",
]

SCHEMA = 3
"""Version of the tables. A change raises it and appends a function to ``STEPS``."""

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

runs = Table(
    "runs",
    metadata,
    Column("run", String(64), primary_key=True),
    Column("method", Text, nullable=False),
    Column("mathematics", Text, nullable=False),
    Column("record", Text, nullable=False),
    Column("base_folder", Text, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("finished", Boolean, nullable=False),
    Column("created_at", Float(53), nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("run", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("round", Integer, nullable=False),
    Column("object", String(64), nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("parent", Integer),
    Column("branch", String(64), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("accuracy", Float(53)),
    Column("loss", Float(53)),
    Column("examples", Integer),
    Column("f1", Float(53)),
    Column("perplexity", Float(53)),
    Column("tokens", Integer),
    Column("evaluation_error", Text),
    Column("utilities", Text),
    ForeignKeyConstraint(["run"], ["runs.run"]),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("builds_on", Integer),
    Column("version", Integer),
    Column("outcome", String(16)),
    Column("deadline_s", Float(53)),
    Column("wait_s", Float(53), nullable=False),
    Column("open_s", Float(53), nullable=False),
    Column("merge_s", Float(53), nullable=False),
    Column("evaluating_s", Float(53), nullable=False),
    Column("evaluation_s", Float(53), nullable=False),
    Column("slowest_train_s", Float(53)),
    Column("shaped_upload_s", Float(53)),
    Column("critical_s", Float(53)),
    Column("opened_at", Float(53)),
    Column("closed_at", Float(53)),
    Column("merged_at", Float(53)),
    Column("evaluated_at", Float(53)),
    ForeignKeyConstraint(["run"], ["runs.run"]),
)

# The primary key is the rule that a device counts once in a round.
participations = Table(
    "participations",
    metadata,
    Column("run", String(64), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("offer", Text, nullable=False),
    Column("offered_at", Float(53), nullable=False),
    Column("choice", Text),
    Column("decline", Text),
    Column("announce", Text),
    Column("object", String(64)),
    Column("bytes", Integer),
    Column("samples", Integer),
    Column("train_s", Float(53)),
    Column("upload_s", Float(53)),
    Column("shaped_s", Float(53)),
    Column("duplicate_bytes", Integer, nullable=False),
    Column("refusal", Text),
    Column("receipt", Text),
    Column("received_at", Float(53)),
    ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.number"]),
)

devices = Table(
    "devices",
    metadata,
    Column("run", String(64), primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("session", Integer, nullable=False),
    Column("online", Boolean, nullable=False),
    Column("status", Text),
    Column("refusal", Text),
    Column("up_bps", Float(53)),
    Column("down_bps", Float(53)),
    Column("seen_at", Float(53), nullable=False),
    Column("learned", Text),
)

ledger = Table(
    "ledger",
    metadata,
    Column("run", String(64), primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("bytes_up", Integer, nullable=False),
    Column("chunks_up", Integer, nullable=False),
    Column("duplicate_bytes", Integer, nullable=False),
    Column("bytes_down", Integer, nullable=False),
    Column("chunks_down", Integer, nullable=False),
    Column("foreign", Integer, nullable=False),
)


def _evaluations_tell_more(connection: Connection) -> None:
    for name, kind in (("f1", "FLOAT"), ("perplexity", "FLOAT"), ("tokens", "INTEGER")):
        connection.execute(text(f"ALTER TABLE versions ADD COLUMN {name} {kind}"))


def _the_planner_learns(connection: Connection) -> None:
    for table, name in (("versions", "utilities"), ("devices", "learned")):
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {name} TEXT"))


STEPS: dict[int, Callable[[Connection], None]] = {1: _evaluations_tell_more, 2: _the_planner_learns}
"""From version n to n + 1: ``STEPS[n](connection)``."""


def migrate(connection: Connection) -> None:
    """Makes the tables, or brings older ones forward, in the caller's transaction.

    Raises StateError for tables of a later version than this program knows.
    """
    if not inspect(connection).has_table(schema_version.name):
        metadata.create_all(connection)
        connection.execute(schema_version.insert().values(version=SCHEMA))
        return
    found = check_version(connection)
    for version in range(found, SCHEMA):
        STEPS[version](connection)
    if found != SCHEMA:
        connection.execute(schema_version.update().values(version=SCHEMA))


def check_current(connection: Connection) -> None:
    """For those who only read. Raises StateError where the store is not of this program's version."""
    found = check_version(connection)
    if found != SCHEMA:
        raise StateError(
            f"the state was written by an earlier version of this program: schema {found}, read is {SCHEMA}",
            "start `edge-aggregator run` once: it brings the state forward",
        )


def check_version(connection: Connection) -> int:
    """The store's version. Raises StateError where it is later than this program's."""
    found = connection.execute(select(schema_version.c.version)).scalar_one()
    if found > SCHEMA:
        raise StateError(
            f"the state was written by a later version of this program: schema {found}, known is {SCHEMA}",
            "install that version, or use another run.state_dir",
        )
    return int(found)
