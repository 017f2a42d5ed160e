"""What the planner knows of a device and made of it, for the reading commands."""

from __future__ import annotations

from typing import Any

import msgspec

from aggregator.planner.lessons import Lessons
from aggregator.state.base import DeviceRow, ParticipationRow, Store
from edge_sdk.protocol.wire import Choice, Offer

__all__ = ["last_parts", "planned_facts"]


def last_parts(store: Store, run: str) -> dict[str, ParticipationRow]:
    """Each device's part in the newest round that it was asked in, of the present one and the one before."""
    last = store.last_round(run)
    found: dict[str, ParticipationRow] = {}
    if last is not None:
        for number in (last.number - 1, last.number):
            found |= {one.device: one for one in store.participations(run, number)}
    return found


def planned_facts(row: DeviceRow, part: ParticipationRow | None) -> dict[str, Any]:
    """``learned``: averages of what the device reported, and what its rounds corrected. ``plan``: what was
    recommended to it last, what it took, and which budget bound it; None where it was not asked lately."""
    lessons = Lessons() if row.learned is None else msgspec.json.decode(row.learned, type=Lessons)
    learned = {name: value for name, value in msgspec.to_builtins(lessons).items() if name != "of"}
    if part is None:
        return {"learned": learned, "plan": None}
    offer = msgspec.json.decode(part.offer, type=Offer)
    choice = None if part.choice is None else msgspec.json.decode(part.choice, type=Choice)
    plan = {
        "round": part.round,
        "state": part.state,
        "candidates": len(offer.candidates),
        "recommended": next((one.id for one in offer.candidates if one.recommended), None),
        "chosen": None if choice is None else choice.candidate.id,
        "binding": None if choice is None else choice.binding,
        "attempt": None if choice is None else choice.attempt,
    }
    return {"learned": learned, "plan": plan}
