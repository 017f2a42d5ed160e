"""The tables, and how an older store becomes one of today."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKeyConstraint,
    Index,
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

SCHEMA = 7
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
    Column("bytes", BigInteger, nullable=False),
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
    Column("optimizer", Text),
    Column("pruned_at", Float(53)),
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
    Column("selection", String(16)),
    Column("schedule", String(16)),
    Column("wanted", Integer),
    Column("quorum", Integer),
    Column("closed_by", String(16)),
    Column("held", Text),
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
    Column("bytes", BigInteger),
    Column("samples", Integer),
    Column("train_s", Float(53)),
    Column("upload_s", Float(53)),
    Column("shaped_s", Float(53)),
    Column("duplicate_bytes", BigInteger, nullable=False),
    Column("refusal", Text),
    Column("receipt", Text),
    Column("received_at", Float(53)),
    Column("builds_on", Integer),
    Column("counts_in", Integer),
    Column("staleness", Integer),
    Column("weight", Float(53)),
    Column("norms", Text),
    Column("set_aside", Text),
    ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.number"]),
)
participations_by_state = Index("participations_by_state", participations.c.run, participations.c.state)
participations_counted = Index("participations_counted", participations.c.run, participations.c.counts_in)

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
    Column("bytes_up", BigInteger, nullable=False),
    Column("chunks_up", BigInteger, nullable=False),
    Column("duplicate_bytes", BigInteger, nullable=False),
    Column("bytes_down", BigInteger, nullable=False),
    Column("chunks_down", BigInteger, nullable=False),
    Column("foreign", BigInteger, nullable=False),
)


def _evaluations_tell_more(connection: Connection) -> None:
    for name, kind in (("f1", "FLOAT"), ("perplexity", "FLOAT"), ("tokens", "INTEGER")):
        connection.execute(text(f"ALTER TABLE versions ADD COLUMN {name} {kind}"))


def _the_planner_learns(connection: Connection) -> None:
    for table, name in (("versions", "utilities"), ("devices", "learned")):
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {name} TEXT"))


def _updates_may_be_late(connection: Connection) -> None:
    for name in ("selection", "schedule", "closed_by"):
        connection.execute(text(f"ALTER TABLE rounds ADD COLUMN {name} VARCHAR(16)"))
    for name in ("wanted", "quorum"):
        connection.execute(text(f"ALTER TABLE rounds ADD COLUMN {name} INTEGER"))
    for name, kind in (("builds_on", "INTEGER"), ("counts_in", "INTEGER"), ("staleness", "INTEGER")):
        connection.execute(text(f"ALTER TABLE participations ADD COLUMN {name} {kind}"))
    connection.execute(text("ALTER TABLE participations ADD COLUMN weight FLOAT"))
    # Until then an update counted in its own round or in none.
    of_round = "WHERE rounds.run = participations.run AND rounds.number = participations.round"
    connection.execute(
        text(f"UPDATE participations SET builds_on = (SELECT rounds.builds_on FROM rounds {of_round})")  # noqa: S608
    )
    connection.execute(
        text(
            "UPDATE participations SET counts_in = round, staleness = 0, weight = 1 WHERE state = 'received' "  # noqa: S608
            f"AND EXISTS (SELECT 1 FROM rounds {of_round} AND rounds.state NOT IN ('waiting', 'open'))"
        )
    )
    for index in (participations_by_state, participations_counted):
        index.create(connection)


def _merges_keep_state(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE versions ADD COLUMN optimizer TEXT"))
    connection.execute(text("ALTER TABLE participations ADD COLUMN norms TEXT"))


def _merges_go_on_without_what_is_bad(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE rounds ADD COLUMN held TEXT"))
    connection.execute(text("ALTER TABLE participations ADD COLUMN set_aside TEXT"))


def _versions_are_pruned(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE versions ADD COLUMN pruned_at FLOAT"))


STEPS: dict[int, Callable[[Connection], None]] = {
    1: _evaluations_tell_more,
    2: _the_planner_learns,
    3: _updates_may_be_late,
    4: _merges_keep_state,
    5: _merges_go_on_without_what_is_bad,
    6: _versions_are_pruned,
}
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
