"""From the trainer's files to an item of the outbox: all of it durable, or none."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from edge_sdk.agent.context import Context
from edge_sdk.agent.record import Packed, RoundRow
from edge_sdk.faults import reached
from edge_sdk.protocol.model import Fingerprint
from edge_sdk.protocol.wire import Announce, Choice

__all__ = ["adopt_update", "lies_whole", "sweep_objects"]


def lies_whole(context: Context, packed: Packed) -> bool:
    """Whether the trainer's files can be taken as they are.

    Not after a power cut, as they were not synced, nor half adopted: the same choice makes them again.
    """
    return packed.boot == context.boot and all(file.is_file() for file in _files(packed))


def adopt_update(
    context: Context, row: RoundRow, packed: Packed, choice: Choice, fingerprint: Fingerprint
) -> Announce:
    """Adopts update, residual and outbox row in one transaction, which also ends the round.

    Raises OSError where the disk has no room; the files stay where they were then.
    """
    offer = row.offer
    # The update last: once it is gone from its place, the residual is in the store.
    adopted: list[tuple[str, int]] = []
    for file in reversed(_files(packed)):
        if adopted:
            reached("residual.adopted")
        adopted.append(context.store.adopt(file))
    reached("update.adopted")
    digest, size = adopted[-1]
    announce = Announce(
        device=context.device, run=offer.run, round=offer.round, nonce=offer.nonce,
        fingerprint=fingerprint.digest, object=digest, bytes=size, chunk_bytes=offer.chunk_bytes,
        builds_on=offer.versions[-1].number, samples=packed.samples, candidate=choice.candidate,
        measured=packed.measured,
    )  # fmt: skip
    record = context.record
    with record.transaction():
        record.outbox.add(announce)
        if offer.spec.error_feedback:
            record.put("residual", adopted[0][0] if packed.residual is not None else None)
        for one in packed.owed:
            record.remove_owed(one)
        record.save_round(replace(row, state=None))
        record.forget_old_rounds()
    reached("update.queued")
    return announce


def sweep_objects(context: Context) -> None:
    """Keeps the two newest versions with what they build on, and the objects that something refers to."""
    record = context.record
    with record.transaction():
        held = record.versions()
        kept: set[int] = set()
        for number in sorted(held)[-2:]:
            at: int | None = number
            while at in held and at not in kept:
                kept.add(at)
                at = held[at].parent
        for number in held.keys() - kept:
            record.remove_version(number)
    context.store.sweep(record.objects())


def _files(packed: Packed) -> list[Path]:
    return [Path(path) for path in (packed.update, packed.residual) if path is not None]
