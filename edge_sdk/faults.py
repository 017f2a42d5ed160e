"""Places where a test may end the process, as ``kill -9`` does: between any two things that must be durable.

``EDGE_SDK_KILL_AT=update.stored`` kills at the first time that the place is reached, ``update.stored:3`` at
the third. Without it, and in every real run, ``reached`` does nothing. A test within one process puts its own
function in the place of the kill with ``arm``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["AGENT_PLACES", "AGGREGATOR_PLACES", "VARIABLE", "arm", "reached"]

VARIABLE = "EDGE_SDK_KILL_AT"

AGGREGATOR_PLACES = (
    "run.made",
    "version.durable",
    "round.open",
    "round.offered",
    "choice.noted",
    "decline.noted",
    "update.awaited",
    "chunk.durable",
    "update.complete",
    "update.durable",
    "update.counted",
    "update.receipted",
    "round.closed",
    "merge.begun",
    "version.stored",
    "version.told",
    "evaluation.begun",
    "evaluation.come",
    "round.done",
    "round.next",
    "versions.pruned",
    "round.swept",
    "run.finished",
)
"""In the order of a round. Where two things happen one after the other, the place lies between them:

- ``run.made``: the run's row is there, nobody knows.
- ``version.durable``: a version's object is there, no row names it. ``version.stored``: it has its row,
  nobody was told. ``version.told``: everybody was.
- ``round.open``: the offers are rows, none was sent. ``round.offered``: all were.
- ``choice.noted``, ``decline.noted``: the device's word is a row.
- ``update.awaited``: the announce is a row, the device has no credit. ``chunk.durable``: a chunk is on disk,
  the device was not told. ``update.complete``: so are all, under no name yet. ``update.durable``: the update
  has its name, no row. ``update.counted``: it has its row, no receipt was sent. ``update.receipted``: it was.
- ``round.closed``: what counts is decided, nobody was told. ``merge.begun``: everybody was.
- ``evaluation.begun``: the trainer was asked. ``evaluation.come``: it answered, nothing is written.
- ``round.done``: all of the round is written. ``round.next``: so is the next round's row.
  ``versions.pruned``: so is which versions nobody needs any more, their files are there. ``round.swept``:
  these and all else that nobody needs are gone. ``run.finished``: the run's end is a row.
"""

AGENT_PLACES = (
    "run.joined",
    "trainer.known",
    "status.said",
    "offer.kept",
    "choice.kept",
    "choice.said",
    "fetch.begun",
    "fetch.chunk",
    "fetch.whole",
    "fetch.kept",
    "version.held",
    "round.fetched",
    "training.asked",
    "training.done",
    "update.packed",
    "residual.adopted",
    "update.adopted",
    "update.queued",
    "update.announced",
    "chunk.counted",
    "chunk.sent",
    "update.sent",
    "receipt.come",
    "receipt.kept",
    "final.held",
    "agent.leaving",
)
"""Likewise, in the agent:

- ``run.joined``: the run is in the record, the trainer was not asked. ``trainer.known``: what it found is.
- ``offer.kept``: the offer is in the record, nothing is chosen. ``choice.kept``: the choice is, nobody knows.
- ``fetch.chunk``: a chunk is on disk, the server was not told. ``fetch.whole``: so are all, under no name.
  ``fetch.kept``: the version has its name, no row. ``version.held``: it has its row.
- ``training.done``: the trainer answered, nothing is in the record. ``update.packed``: its files are.
- ``residual.adopted``: the residual has its name, the update has not. ``update.adopted``: both have, no row
  names them. ``update.queued``: the outbox has the update.
- ``chunk.counted``: a chunk is counted, and did not go. ``update.sent``: the server holds all, there is no
  receipt. ``receipt.come``: it came, nothing is in the record. ``receipt.kept``: the update is forgotten, its
  file lies there.
- ``final.held``: the final version is here, the server does not know. ``agent.leaving``: no goodbye was said.
"""

_at, _, _count = os.environ.get(VARIABLE, "").partition(":")
_left = int(_count) if _count.isdigit() else 1


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_act: Callable[[], None] = _kill


def reached(place: str) -> None:
    """The process is at ``place``. Does nothing unless a test named it."""
    global _left
    if place != _at:
        return
    _left -= 1
    if _left == 0:
        _act()


@contextmanager
def arm(place: str, act: Callable[[], None], times: int = 1) -> Iterator[None]:
    """Within the block, ``act`` is called when ``place`` is reached for the ``times``-th time."""
    global _at, _left, _act
    if place not in (*AGGREGATOR_PLACES, *AGENT_PLACES):
        raise ValueError(f"{place!r} is no place; there are {', '.join((*AGGREGATOR_PLACES, *AGENT_PLACES))}")
    before = _at, _left, _act
    _at, _left, _act = place, times, act
    try:
        yield
    finally:
        _at, _left, _act = before
