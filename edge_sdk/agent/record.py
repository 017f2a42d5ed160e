"""What the agent must not lose: one SQLite file in the state folder, in WAL mode.

States and choices are synced to disk before they are told to anybody. Counters are committed too, but not
synced one by one: they survive any death of the process, and at worst lose a second to a power cut.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_sdk.agent.states import RoundState
from edge_sdk.errors import StateError
from edge_sdk.protocol.base import Digest, Name, NotNegative, Positive, Record
from edge_sdk.protocol.measure import Fit, Measured
from edge_sdk.protocol.spec import Levers, Setting
from edge_sdk.protocol.trainer import Described
from edge_sdk.protocol.wire import Choice, Decline, Offer, Run, VersionRef
from edge_sdk.transport.outbox import Outbox

__all__ = ["AgentRecord", "Knowledge", "Lesson", "Owed", "Packed", "RoundRow", "Shortfall", "disk_error"]

SCHEMA = 1
_KEPT_ROUNDS = 64
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rounds (run TEXT NOT NULL, round INTEGER NOT NULL, row TEXT NOT NULL, PRIMARY KEY (run, round));
CREATE TABLE versions (number INTEGER PRIMARY KEY, ref TEXT NOT NULL);
CREATE TABLE owed (object TEXT PRIMARY KEY, round INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE ledger (run TEXT NOT NULL, key TEXT NOT NULL, value INTEGER NOT NULL, PRIMARY KEY (run, key))
    WITHOUT ROWID;
CREATE TABLE knowledge (key TEXT PRIMARY KEY, row TEXT NOT NULL) WITHOUT ROWID;
"""


class Packed(Record, frozen=True, kw_only=True):
    """The trainer's files of a round, before they are adopted."""

    update: str
    residual: str | None = None
    samples: Positive
    measured: Measured
    owed: tuple[Digest, ...] = ()
    """What the trainer added to the residual, and so is owed no more."""
    boot: str = ""


class RoundRow(Record, frozen=True, kw_only=True):
    """One round of one run, from its offer to its end. ``state`` None: answered, nothing left to do."""

    run: Name
    """The run's nonce."""
    round: Positive
    state: RoundState | None
    offer: Offer
    received: float
    """On the monotonic clock of boot ``boot``."""
    boot: str
    answer: Choice | Decline | None = None
    failures: NotNegative = 0
    """Deaths and failures of the trainer with the present choice, memory not being the cause."""
    kills: NotNegative = 0
    """Unexplained SIGKILLs of the trainer in this round."""
    packed: Packed | None = None
    outcome: str = ""
    """``received``, ``owed``, ``dropped``: what became of the update."""
    resent: NotNegative = 0


class Shortfall(Record, frozen=True, kw_only=True):
    """A training that ran out of memory although the choice reckoned that it would fit."""

    setting: Setting
    kept_mb: float = 0.0
    """Room for kept hidden states that it was given besides."""
    budget_mb: float
    """What was taken to be free for it."""
    lasting: bool
    """The budget was the owner's limit, which does not change by itself."""
    at: float
    """Wall clock."""


class Lesson(Record, frozen=True, kw_only=True):
    """What this device's rounds with some levers took of what its probe says; see ``agent.learning``."""

    levers: Levers
    quantized: bool
    peaks: tuple[float, ...]
    """Of the last rounds, measured over predicted by the probe alone; the newest last."""
    peak: float = 1.0
    step: float = 1.0
    rounds: NotNegative = 0
    at: float
    """Wall clock."""


class Knowledge(Record, frozen=True, kw_only=True):
    """What the trainer found out about this machine, base and data; its key says what makes it void."""

    described: Described
    fit: Fit | None = None
    """As probed."""
    shortfalls: tuple[Shortfall, ...] = ()
    lessons: tuple[Lesson, ...] = ()
    """Of this fit; a new one begins without."""


class Owed(Record, frozen=True, kw_only=True):
    """An update that was never merged and is still in the object store."""

    object: Digest
    round: NotNegative


def disk_error(place: Path, error: OSError | sqlite3.Error, key: str = "agent.state_dir") -> StateError:
    """What to show where the disk refuses: full, not writable, broken."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return StateError(
        f"{place} cannot be used: {why}",
        f"free disk space, or set {key} to a folder that this user may write",
    )


_R = TypeVar("_R", bound=Record)


class AgentRecord:
    """The agent's durable state. One thread uses it; ``read`` elsewhere opens the file for itself.

    Raises StateError for a file that is damaged or that a newer agent wrote.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._run: Run | None = None
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            if read_only:
                self._db.execute("PRAGMA query_only=1")
            else:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA cache_size=-256")
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            if found == 0 and read_only:
                raise StateError(f"the state file {path} is only being made", "try again in a moment")
            if found == 0:
                with self.transaction():
                    for statement in _TABLES.split(";\n"):
                        if statement.strip():
                            self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={SCHEMA}")
            elif found != SCHEMA:
                raise StateError(
                    f"the state file {path} has schema {found}; this version of the agent reads {SCHEMA}",
                    "use the version of edge-sdk that wrote it, or another agent.state_dir",
                )
            (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(str(verdict))
            self.outbox = Outbox(self._db)
        except sqlite3.OperationalError as error:
            raise disk_error(path, error) from error
        except sqlite3.Error as error:
            raise StateError(
                f"the state file {path} is damaged: {error}",
                "move the state folder away; the agent joins anew with an empty one",
            ) from error

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and on disk afterwards."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def counting(self) -> Iterator[None]:
        """As ``transaction``, for counters: in the file at once, synced with the next state."""
        self._db.execute("PRAGMA synchronous=NORMAL")
        try:
            with self.transaction():
                yield
        finally:
            self._db.execute("PRAGMA synchronous=FULL")

    # -- single values ------------------------------------------------------------------------------

    def get(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, value: str | None) -> None:
        if value is None:
            self._db.execute("DELETE FROM meta WHERE key=?", (key,))
        else:
            self._db.execute("REPLACE INTO meta VALUES (?, ?)", (key, value))

    def next_session(self) -> int:
        """Counts the agent's starts."""
        session = int(self.get("session") or 0) + 1
        self.put("session", str(session))
        return session

    @property
    def run(self) -> Run | None:
        """The run that all the rest is about."""
        if self._run is None:
            text = self.get("run")
            self._run = None if text is None else self._decode(text, Run)
        return self._run

    @property
    def residual(self) -> Digest | None:
        """Object that holds the error-feedback residual."""
        return self.get("residual")

    def begin_run(self, run: Run) -> int:
        """Another run: its record takes the place of the old one, with all that belonged to that.

        Returns how many updates of the old run were dropped. What was learnt of the machine stays.
        """
        with self.transaction():
            items = self.outbox.items()
            for item in items:
                self.outbox.remove(*item.key)
            for table in ("rounds", "versions", "owed"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608
            self.put("residual", None)
            self.put("run", _encode(run))
        self._run = run
        return len(items)

    # -- rounds -------------------------------------------------------------------------------------

    def save_round(self, row: RoundRow) -> None:
        self._db.execute("REPLACE INTO rounds VALUES (?, ?, ?)", (row.run, row.round, _encode(row)))

    def round(self, run: str, number: int) -> RoundRow | None:
        found = self._db.execute("SELECT row FROM rounds WHERE run=? AND round=?", (run, number)).fetchone()
        return None if found is None else self._decode(found[0], RoundRow)

    def rounds(self) -> list[RoundRow]:
        found = self._db.execute("SELECT row FROM rounds ORDER BY round").fetchall()
        return [self._decode(text, RoundRow) for (text,) in found]

    def forget_old_rounds(self) -> None:
        self._db.execute(
            "DELETE FROM rounds WHERE round <= (SELECT max(round) FROM rounds) - ?", (_KEPT_ROUNDS,)
        )

    # -- versions, owed, knowledge, ledger ------------------------------------------------------------

    def versions(self) -> dict[int, VersionRef]:
        """The versions held, by number."""
        found = self._db.execute("SELECT ref FROM versions ORDER BY number").fetchall()
        refs = [self._decode(text, VersionRef) for (text,) in found]
        return {ref.number: ref for ref in refs}

    def add_version(self, ref: VersionRef) -> None:
        self._db.execute("REPLACE INTO versions VALUES (?, ?)", (ref.number, _encode(ref)))

    def remove_version(self, number: int) -> None:
        self._db.execute("DELETE FROM versions WHERE number=?", (number,))

    def owed(self) -> list[Owed]:
        found = self._db.execute("SELECT object, round FROM owed ORDER BY round").fetchall()
        return [Owed(object=digest, round=number) for digest, number in found]

    def add_owed(self, owed: Owed) -> None:
        self._db.execute("REPLACE INTO owed VALUES (?, ?)", (owed.object, owed.round))

    def remove_owed(self, digest: Digest) -> None:
        self._db.execute("DELETE FROM owed WHERE object=?", (digest,))

    def knowledge(self, key: str) -> Knowledge | None:
        found = self._db.execute("SELECT row FROM knowledge WHERE key=?", (key,)).fetchone()
        return None if found is None else self._decode(found[0], Knowledge)

    def save_knowledge(self, key: str, knowledge: Knowledge) -> None:
        self._db.execute("REPLACE INTO knowledge VALUES (?, ?)", (key, _encode(knowledge)))

    def count(self, run: str, **amounts: int) -> None:
        """Adds to the ledger of a run."""
        self._db.executemany(
            "INSERT INTO ledger VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
            [(run, key, amount) for key, amount in amounts.items() if amount],
        )

    def ledger(self, run: str) -> dict[str, int]:
        return dict(self._db.execute("SELECT key, value FROM ledger WHERE run=?", (run,)).fetchall())

    def newest_day(self) -> str:
        """The newest day of which there is a ledger, ``day 2026-01-31``; empty: there is none."""
        query = "SELECT run FROM ledger WHERE run >= 'day ' AND run < 'day!' ORDER BY run DESC LIMIT 1"
        row = self._db.execute(query).fetchone()
        return "" if row is None else str(row[0])

    def forget_days_after(self, day: str) -> None:
        self._db.execute("DELETE FROM ledger WHERE run > ? AND run < 'day!'", (day,))

    def keep_days(self, most: int) -> None:
        """Forgets the traffic of all but the newest days, whose ledgers are named ``day 2026-01-31``."""
        days = "SELECT DISTINCT run FROM ledger WHERE run LIKE 'day %' ORDER BY run DESC LIMIT ?"
        self._db.execute(f"DELETE FROM ledger WHERE run LIKE 'day %' AND run NOT IN ({days})", (most,))  # noqa: S608

    def objects(self) -> set[Digest]:
        """Every object that something still refers to."""
        digests = {ref.object for ref in self.versions().values()}
        digests |= self.outbox.objects()
        digests |= {owed.object for owed in self.owed()}
        if self.residual is not None:
            digests.add(self.residual)
        return digests

    def _decode(self, text: str, kind: type[_R]) -> _R:
        try:
            return msgspec.json.decode(text, type=kind)
        except msgspec.MsgspecError as error:
            raise StateError(
                f"the state file {self.path} holds a {kind.__name__} that cannot be read: {error}",
                "move the state folder away; the agent joins anew with an empty one",
            ) from error


def _encode(record: Record) -> str:
    return msgspec.json.encode(record).decode()
