"""Taking updates in: announce judged, bytes received, content judged, stored, and only then receipted."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from aggregator.fleet import Fleet
from aggregator.norms import Norms
from aggregator.rounds import Rounds
from aggregator.state.base import AWAITED, ParticipationRow, Store
from aggregator.storage import NoRoomError, out_of_room
from aggregator.transfers import Ledger, Upload, Uploads
from aggregator.validation import Claim, check_announce, check_origin, refuse
from edge_sdk.errors import ContainerError, StateError
from edge_sdk.faults import reached
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.frames import Chunk
from edge_sdk.protocol.wire import Announce, Offer, Receipt, Refusal, Run
from edge_sdk.transport.objects import ObjectStore

__all__ = ["Intake"]

_CORRUPT_TRIES = 3
"""An update whose bytes are not those of its name is sent again so often; then the device drops it."""


class Intake:
    """From an announce to a receipt or a refusal.

    Args:
        renews: the merge rule, where it makes all slots anew each round; "": slots go on.
        check: judges a complete container; gives a Refusal, or how large its changes are.
        send: hands a record to a device.
        emit: tells what happened.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        objects: ObjectStore,
        uploads: Uploads,
        ledger: Ledger,
        rounds: Rounds,
        fleet: Fleet,
        *,
        limit_bytes: int,
        max_samples: int,
        window: int,
        renews: str,
        check: Callable[[Path, Announce], Refusal | Norms],
        send: Callable[[str, Record], bool],
        emit: Callable[..., None],
    ) -> None:
        self._run = run
        self._store = store
        self._objects = objects
        self._uploads = uploads
        self._ledger = ledger
        self._rounds = rounds
        self._fleet = fleet
        self._limit_bytes = limit_bytes
        self._max_samples = max_samples
        self._window = window
        self._renews = renews
        self._check = check
        self._send = send
        self._emit = emit
        self._corrupt: Counter[tuple[str, str]] = Counter()

    def recover(self) -> None:
        """After a start: what lies complete is taken in, what nobody waits for is removed.

        Raises StateError where something that was accepted is gone.
        """
        waited_for = set()
        for row in self._rounds.participations.awaited():
            if row.state != "sending" or row.announce is None or row.object is None:
                continue
            waited_for.add(row.device)
            if self._objects.has(row.object):
                # The crash came between the object and its row.
                announce = msgspec.json.decode(row.announce, type=Announce)
                self._judge(announce, self._objects.path(row.object), 0, None)
        self._uploads.keep_only(waited_for)
        self._objects.sweep(self._store.objects())

    def on_announce(self, announce: Announce, device: str, now: float) -> None:
        """A device has an update for us, or asks how far its transfer is."""
        refusal = check_origin(announce, device, self._run)
        if refusal is not None:
            self._refuse(refusal)
            return
        row = self._rounds.participations.find(announce.round, device)
        if row is not None and self._answer_again(row, announce):
            return
        refusal = check_announce(announce, self._claim(row, announce))
        if refusal is not None:
            # What is half received of another object goes on, and still counts.
            self._uploads.forget_object(device, announce.object)
            if row is None or row.state != "sending" or row.object == announce.object:
                self._rounds.participations.on_refused(announce, refusal)
            self._refuse(refusal)
            return
        upload = self._uploads[device]
        if upload is None or upload.announce.object != announce.object:
            self._emit("upload.started", device=device, round=announce.round, bytes=announce.bytes)
        try:
            self._uploads.begin(announce, self._window, now)
        except StateError as error:
            self._no_room(announce, error)
            return
        self._rounds.participations.on_sending(announce)

    def on_chunk(self, device: str, chunk: Chunk) -> bool:
        """False where the chunk belongs to no upload under way. Raises ProtocolError."""
        try:
            return self._uploads.on_chunk(device, chunk)
        except StateError as error:
            upload = self._uploads[device]
            if upload is not None:
                self._no_room(upload.announce, error)
            return True

    def _no_room(self, announce: Announce, error: StateError) -> None:
        """The device keeps the update. Raises NoRoomError where it is room that is wanted."""
        self._refuse(refuse(announce, "storage", error.message, error.hint))
        if out_of_room(error, math.inf):
            raise NoRoomError(error.message, error.hint, announce.bytes) from error

    def settle(self, now: float) -> None:
        """Tells every sender how far it is, and takes in what is complete."""
        self._uploads.tell()
        for upload in self._uploads.complete():
            self._finish(upload, now)

    def on_missed(self, devices: list[str]) -> None:
        """Nothing of these is awaited any more: who is still sending need not go on."""
        for device in devices:
            upload = self._uploads[device]
            if upload is not None:
                row = self._rounds.participations.find(upload.announce.round, device)
                late = dataclasses.replace(self._claim(row, upload.announce), late=True)
                refusal = check_announce(upload.announce, late)
                if refusal is not None:
                    self._refuse(refusal)
            self._uploads.forget(device)

    def _answer_again(self, row: ParticipationRow, announce: Announce) -> bool:
        """Says once more what was decided about this device's update; True where there was a decision."""
        if row.state == "received" and row.receipt is not None:
            if row.object == announce.object:
                self._send(row.device, msgspec.json.decode(row.receipt, type=Receipt))
            else:
                self._refuse(
                    refuse(
                        announce,
                        "duplicate",
                        f"another update of round {announce.round} counts already for this device",
                        "it is dropped: what it learned from the same rows is in the other one",
                    )
                )
            return True
        if row.state == "refused" and row.object == announce.object and row.refusal is not None:
            self._send(row.device, msgspec.json.decode(row.refusal, type=Refusal))
            return True
        return False

    def _claim(self, row: ParticipationRow | None, announce: Announce) -> Claim:
        return Claim(
            offer=None if row is None else msgspec.json.decode(row.offer, type=Offer),
            late=row is not None and row.state not in AWAITED,
            renewed_by=self._renews if self._rounds.is_late(announce.round) else "",
            limit_bytes=self._limit_bytes,
            max_samples=self._max_samples,
            status=self._fleet.reported(announce.device),
        )

    def _finish(self, upload: Upload, now: float) -> None:
        announce = upload.announce
        reached("update.complete")
        try:
            path = self._uploads.finish(upload)
        except ContainerError as error:
            key = announce.device, announce.object
            self._corrupt[key] += 1
            refusal = refuse(announce, "corrupt", error.message, error.hint)
            if self._corrupt[key] >= _CORRUPT_TRIES:
                self._rounds.participations.on_refused(announce, refusal)
            self._refuse(refusal)
            return
        self._judge(announce, path, upload.receiver.duplicate_bytes, now - upload.began)

    def _judge(self, announce: Announce, path: Path, duplicate_bytes: int, upload_s: float | None) -> None:
        """The object is durable, and nobody was told: it is stored and receipted, or refused and removed."""
        row = self._rounds.participations.find(announce.round, announce.device)
        judged = check_announce(announce, self._claim(row, announce)) or self._check(path, announce)
        if isinstance(judged, Refusal):
            self._rounds.participations.on_refused(announce, judged)
            if announce.object not in self._store.objects():
                self._objects.remove(announce.object)
            self._refuse(judged)
            return
        reached("update.durable")
        late = self._rounds.is_late(announce.round)
        with self._store.transaction():
            self._ledger.save()
            receipt = self._rounds.participations.on_received(announce, duplicate_bytes, upload_s)
            norms = msgspec.json.encode(judged).decode()
            self._store.set_participation(announce.run, announce.round, announce.device, norms=norms)
        reached("update.counted")
        self._send(announce.device, receipt)
        reached("update.receipted")
        self._emit(
            "update.received",
            device=announce.device,
            round=announce.round,
            bytes=announce.bytes,
            duplicate_bytes=duplicate_bytes,
            samples=announce.samples,
            upload_s=upload_s,
            late=late,
            **_measured(announce),
        )

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.device, refusal)
        self._emit(
            "update.refused",
            device=refusal.device,
            round=refusal.round,
            reason=refusal.reason,
            message=refusal.message,
        )


def _measured(announce: Announce) -> dict[str, Any]:
    measured, candidate = announce.measured, announce.candidate
    return {
        "depth": candidate.depth,
        "quantized_layers": candidate.quantized_layers,
        "predicted_peak_mb": candidate.peak_mb,
        "measured_peak_mb": measured.peak_mb,
        "train_s": measured.train_s,
        "loss_last": measured.loss_last,
    }
