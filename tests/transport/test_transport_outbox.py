"""The outbox: rows in the agent's own database."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.errors import StateError
from edge_sdk.protocol.measure import Measured
from edge_sdk.protocol.spec import Candidate
from edge_sdk.protocol.wire import Announce
from edge_sdk.transport.outbox import Outbox


def announce(round: int = 1, digest: str = "a" * 64) -> Announce:
    return Announce(
        device="dev",
        run="run",
        round=round,
        nonce="n",
        fingerprint="f" * 64,
        object=digest,
        bytes=5000,
        chunk_bytes=1024,
        builds_on=0,
        samples=10,
        candidate=Candidate(id="c", depth=2),
        measured=Measured(rest_mb=1, peak_mb=2, train_s=3, step_s=0.1, steps=5, loss_first=2, loss_last=1),
    )


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(tmp_path / "agent.db")
    connection.execute("PRAGMA journal_mode=WAL")
    yield connection
    connection.close()


def test_an_item_goes_in_moves_on_and_out(connection: sqlite3.Connection) -> None:
    outbox = Outbox(connection)
    with connection:
        outbox.add(announce(), residual="b" * 64)
        outbox.add(announce(2))
        outbox.add(announce())  # the same again is no other
    with connection:
        outbox.set_state("run", 1, "sending")
        outbox.count_sent("run", 1, 1024, 1)
        outbox.count_sent("run", 1, 1024, 1)
    first, second = outbox.items()
    assert first.key == ("run", 1)
    assert (first.state, first.bytes_sent, first.chunks_sent) == ("sending", 2048, 2)
    assert first.announce == announce()
    assert first.residual == "b" * 64
    assert (second.state, second.bytes_sent, second.residual) == ("queued", 0, None)
    assert outbox.objects() == {"a" * 64, "b" * 64}
    with connection:
        assert outbox.remove("run", 1)
        assert not outbox.remove("run", 1)
    assert outbox.get("run", 1) is None
    assert outbox.get("run", 2) == second


def test_another_object_for_the_same_round_is_refused(connection: sqlite3.Connection) -> None:
    outbox = Outbox(connection)
    outbox.add(announce())
    with pytest.raises(StateError, match="already has update aaaa"):
        outbox.add(announce(digest="c" * 64))


def test_unknown_items_and_states_are_told(connection: sqlite3.Connection) -> None:
    outbox = Outbox(connection)
    with pytest.raises(StateError, match="not in the outbox"):
        outbox.count_sent("run", 7, 1, 1)
    outbox.add(announce())
    connection.execute("UPDATE outbox SET state = 'flying'")
    with pytest.raises(StateError, match="unknown state 'flying'"):
        outbox.items()


def test_the_caller_owns_the_transaction(connection: sqlite3.Connection) -> None:
    outbox = Outbox(connection)
    with pytest.raises(RuntimeError), connection:
        outbox.add(announce())
        raise RuntimeError
    assert outbox.items() == []


def test_what_was_sent_is_known_after_kill_9(tmp_path: Path, connection: sqlite3.Connection) -> None:
    outbox = Outbox(connection)
    with connection:
        outbox.add(announce())
    code = (
        "import sqlite3, sys\n"
        "from edge_sdk.transport.outbox import Outbox\n"
        "connection = sqlite3.connect(sys.argv[1])\n"
        "outbox = Outbox(connection)\n"
        "for _ in range(3):\n"
        "    with connection:\n"
        "        outbox.count_sent('run', 1, 1024, 1)\n"
        "outbox.count_sent('run', 1, 1024, 1)\n"  # never committed
        "print('sent', flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "agent.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"sent\n"
        os.kill(child.pid, signal.SIGKILL)
    item = outbox.get("run", 1)
    assert item is not None
    assert (item.bytes_sent, item.chunks_sent) == (3072, 3)
