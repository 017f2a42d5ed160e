"""The agent's states: three small axes, because the facts are concurrent.

*Permission* (may work be started), *round* (what is being done for the aggregator), and, per *outbox item*,
how far its transfer is. Whether there is a connection is a flag; whether the model is loaded belongs to the
trainer. Each axis is a table: per cell what moves it on, what is on disk there, and what every occasion
does. The core looks its reactions up here; nothing reacts that the table does not name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ITEM",
    "OCCASIONS",
    "PERMISSION",
    "ROUND",
    "Action",
    "Cell",
    "ItemState",
    "Occasion",
    "Permission",
    "Reaction",
    "RoundState",
]

Permission = Literal["running", "paused", "gated", "stopped"]
RoundState = Literal["idle", "choosing", "fetching", "training", "packing"]
ItemState = Literal["queued", "sending", "awaiting-receipt"]

Occasion = Literal[
    "pause",
    "resume",
    "stop",
    "gate-failed",
    "gate-passed",
    "trainer-death",
    "disconnect",
    "connect",
    "offer",
    "offer-again",
    "deadline",
]
"""What can happen in any state. ``offer``: of a round not seen before; ``offer-again``: of one that was.
``connect``: the connection is back, or the aggregator started anew."""

OCCASIONS: tuple[Occasion, ...] = (
    "pause", "resume", "stop", "gate-failed", "gate-passed", "trainer-death", "disconnect", "connect",
    "offer", "offer-again", "deadline",
)  # fmt: skip

Action = Literal[
    "stay",
    "enter",
    "pass",
    "refuse",
    "take",
    "replace",
    "repeat",
    "interrupt",
    "judge",
    "give-up",
    "announce",
    "requeue",
]
"""stay: nothing. enter: go to ``to`` and tell the aggregator. pass: the next axis decides. refuse: decline.
take: put the offer on disk. replace: give the present round up for the offered one. repeat: say again what
was said. interrupt: end the training; the round's row stays,
and whoever may run again trains it again. judge: memory, or not, or too often. give-up: decline the round.
announce: say the choice again, and start the transfer from its announce. requeue: forget what is under
way."""


@dataclass(frozen=True)
class Reaction:
    """What an occasion does in a cell, and the state it leads to; None: the action decides."""

    action: Action
    to: str | None


@dataclass(frozen=True)
class Cell:
    """One state of one axis."""

    moved_by: str
    on_disk: str
    on: Mapping[Occasion, Reaction]


def _cell(state: str, moved_by: str, on_disk: str, **reactions: tuple[Action, str | None]) -> Cell:
    """A cell in which every occasion that is not named changes nothing."""
    on = {occasion: Reaction("stay", state) for occasion in OCCASIONS}
    for name, (action, to) in reactions.items():
        occasion = name.replace("_", "-")
        if occasion not in on:
            raise ValueError(f"{occasion!r} is no occasion")
        on[occasion] = Reaction(action, to)
    return Cell(moved_by, on_disk, on)


PERMISSION: dict[Permission, Cell] = {
    "running": _cell(
        "running",
        "start and resume lead here; pause, a failed gate and stop lead away",
        "nothing: a started agent runs",
        pause=("enter", "paused"),
        gate_failed=("enter", "gated"),
        stop=("enter", "stopped"),
        offer=("pass", "running"),
        offer_again=("pass", "running"),
    ),
    "paused": _cell(
        "paused",
        "pause leads here; resume leads to running, or to gated while a gate fails",
        "nothing: a restarted agent runs; who pauses over restarts pauses again",
        resume=("enter", "running"),
        stop=("enter", "stopped"),
        offer=("refuse", "paused"),
        offer_again=("pass", "paused"),
    ),
    "gated": _cell(
        "gated",
        "a failed gate leads here; the gate passing leads to running",
        "nothing: gates are read again at every start",
        pause=("enter", "paused"),
        gate_passed=("enter", "running"),
        stop=("enter", "stopped"),
        offer=("refuse", "gated"),
        offer_again=("pass", "gated"),
    ),
    "stopped": _cell(
        "stopped",
        "stop and fatal errors lead here; nothing leads away: start another agent on the folder",
        "everything that the other axes say",
    ),
}

ROUND: dict[RoundState, Cell] = {
    "idle": _cell(
        "idle",
        "an offer",
        "the answers given to earlier offers",
        offer=("take", "choosing"),
        offer_again=("repeat", "idle"),
    ),
    "choosing": _cell(
        "choosing",
        "permission to run and the trainer's fit: budgets are measured, a candidate is chosen",
        "the offer and when it was received",
        offer=("replace", "choosing"),
        offer_again=("repeat", "choosing"),
        deadline=("give-up", "idle"),
    ),
    "fetching": _cell(
        "fetching",
        "the last missing object of the offer's versions",
        "offer, choice, objects held and the chunks of those on their way",
        connect=("repeat", "fetching"),
        offer=("replace", "choosing"),
        offer_again=("repeat", "fetching"),
        deadline=("give-up", "idle"),
    ),
    "training": _cell(
        "training",
        "the trainer's files; out of memory leads to a smaller choice in the same state, or to idle",
        "offer, choice, versions; what the trainer wrote so far counts for nothing",
        pause=("interrupt", "training"),
        stop=("interrupt", "training"),
        gate_failed=("interrupt", "training"),
        trainer_death=("judge", None),
        connect=("repeat", "training"),
        offer=("replace", "choosing"),
        offer_again=("repeat", "training"),
        deadline=("give-up", "idle"),
    ),
    "packing": _cell(
        "packing",
        "the adoption of update, residual and outbox row in one transaction",
        "offer, choice, where the trainer's files lie and what it measured",
        connect=("repeat", "packing"),
        offer=("replace", "choosing"),
        offer_again=("repeat", "packing"),
        deadline=("give-up", "idle"),
    ),
}

ITEM: dict[ItemState, Cell] = {
    "queued": _cell(
        "queued",
        "a connection and a ready aggregator: it is announced, and the aggregator's Have starts it",
        "the update's file and its announce",
        connect=("announce", "queued"),
    ),
    "sending": _cell(
        "sending",
        "the Have that covers every chunk; a receipt or a refusal",
        "the same, and how many bytes went out",
        disconnect=("requeue", "queued"),
        connect=("announce", "queued"),
    ),
    "awaiting-receipt": _cell(
        "awaiting-receipt",
        "the receipt, with which the device forgets it, or a refusal, which moves it to owed or drops it",
        "the same",
        disconnect=("requeue", "queued"),
        connect=("announce", "queued"),
    ),
}
