"""What the server takes from a device, and what it refuses: before any byte of it.

Every check gives a ``Refusal`` that says what was received and what was expected, or None. The device
keeps an update that was refused for its run, round or version (it is owed), and drops one that was refused
for what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from edge_sdk.protocol.spec import Candidate
from edge_sdk.protocol.wire import Announce, Offer, Refusal, RefusalReason, Run, Status

__all__ = ["Claim", "check_announce", "check_origin", "refuse", "same_work"]

_PREDICTIONS = ("peak_mb", "seconds", "bytes_up", "bytes_down", "gain", "recommended")


@dataclass(frozen=True)
class Claim:
    """What an announce is held against."""

    offer: Offer | None
    """What the device was offered in that round; None: nothing."""
    late: bool
    """The round took its updates without this one."""
    renewed_by: str
    """The merge rule that made all slots anew since; "": the slots are still those that it is a change of."""
    limit_bytes: int
    max_samples: int
    status: Status | None
    """The last that its device reported."""


def refuse(announce: Announce, reason: RefusalReason, message: str, hint: str = "") -> Refusal:
    return Refusal(
        device=announce.device,
        run=announce.run,
        round=announce.round,
        object=announce.object,
        reason=reason,
        message=message,
        hint=hint,
    )


def check_origin(announce: Announce, device: str, run: Run) -> Refusal | None:
    """Whose update it is, and of which run.

    Args:
        device: who sent it, as the topic says: only that is guarded by the broker.
    """
    if announce.device != device:
        refusal = refuse(
            announce,
            "identity",
            f"device {device!r} announced an update of device {announce.device!r}",
            "a device sends only its own updates",
        )
        return msgspec.structs.replace(refusal, device=device)
    if announce.run != run.run:
        return refuse(announce, "run", f"the update is of run {announce.run!r}; this is run {run.run!r}")
    if announce.nonce != run.nonce:
        return refuse(announce, "run", f"the update is of an earlier run that was called {run.run!r} too")
    if announce.fingerprint != run.fingerprint.digest:
        return refuse(
            announce,
            "fingerprint",
            f"the update was made with fingerprint {announce.fingerprint[:12]}, "
            f"the run has {run.fingerprint.digest[:12]}",
            "the device reads the run again and compares its base model",
        )
    return None


def check_announce(announce: Announce, claim: Claim) -> Refusal | None:
    """Whether an update of this run may be sent, judged before any byte of it."""
    offer = claim.offer
    if offer is None:
        return refuse(announce, "round", f"this device was offered nothing in round {announce.round}")
    if claim.renewed_by:
        return refuse(
            announce,
            "version",
            f"round {announce.round} was merged without it, and the merge rule {claim.renewed_by} makes all "
            "slots anew in every round",
            "what it changes is no more: the device drops it and takes part in the next round",
        )
    if claim.late:
        return refuse(
            announce,
            "round",
            f"round {announce.round} closed before this update was complete",
            "the device keeps it and adds it to its next one",
        )
    if announce.builds_on != offer.versions[-1].number:
        return refuse(
            announce,
            "version",
            f"the update builds on version {announce.builds_on}, "
            f"round {announce.round} on version {offer.versions[-1].number}",
        )
    if announce.bytes > claim.limit_bytes:
        return refuse(
            announce,
            "size",
            f"an update of {announce.bytes} bytes is above the limit of {claim.limit_bytes}",
            "raise transfer.max_update_mb in run.toml",
        )
    if announce.chunk_bytes > offer.chunk_bytes:
        return refuse(
            announce,
            "size",
            f"chunks of {announce.chunk_bytes} bytes are above the {offer.chunk_bytes} of the offer",
        )
    if not any(same_work(announce.candidate, offered) for offered in offer.candidates):
        return refuse(
            announce,
            "shape",
            f"candidate {announce.candidate.id!r}, depth {announce.candidate.depth}, was not offered as such",
            "a device trains one of the offered candidates, unchanged",
        )
    return _check_samples(announce, claim)


def same_work(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates ask for the same mathematics; predictions may differ."""
    names = [name for name in Candidate.__struct_fields__ if name not in _PREDICTIONS]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _check_samples(announce: Announce, claim: Claim) -> Refusal | None:
    """The sample count weighs in the merge: a device must not give itself a weight at will. It has as many as
    it told of when it joined; of one that told nothing, as many as it can have drawn."""
    candidate = announce.candidate
    drawn = candidate.steps * candidate.micro_batch * candidate.accumulation
    has = drawn if claim.status is None else claim.status.samples
    if announce.samples > min(has, claim.max_samples):
        return refuse(
            announce,
            "samples",
            f"the update claims {announce.samples} samples; its device told of {has}, "
            f"and {claim.max_samples} at most count",
        )
    return None
