"""Objects on their way: updates coming in, versions going out. Frames and records only; no decisions."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from aggregator.state.base import Store, VersionRow
from edge_sdk.errors import ProtocolError, StateError
from edge_sdk.faults import reached
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.frames import HEADER_BYTES, Chunk, transfer_id
from edge_sdk.protocol.wire import Announce, Have
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.transport.receiving import ObjectReceiver, drop_partial
from edge_sdk.transport.sending import ObjectSender

__all__ = ["Downloads", "Ledger", "Upload", "Uploads"]

_MOST_WINDOW = 16
"""Chunks that one device may have under way from the server, whatever it asks for."""
_SILENCE_S = 120.0
"""A device that has not said for so long what it holds does not want it any more; it may ask again."""


class Ledger:
    """Counts what travels and writes it to the store now and then: a crash loses the last few seconds.

    Args:
        totals: counts of all devices, for whoever watches.
    """

    def __init__(self, store: Store, run: str, totals: Counter[str]) -> None:
        self._store, self._run, self._totals = store, run, totals
        self._counts: dict[str, Counter[str]] = {}

    def add(self, device: str, **counts: int) -> None:
        self._counts.setdefault(device, Counter()).update(counts)
        self._totals.update(counts)

    def save(self) -> None:
        if not self._counts:
            return
        with self._store.transaction():
            for device, counts in self._counts.items():
                self._store.count(self._run, device, counts)
        self._counts.clear()


@dataclass
class Upload:
    """An update on its way in. ``began`` is the monotonic time of its first announce."""

    announce: Announce
    receiver: ObjectReceiver
    window: int
    began: float
    told: bool = False
    """The device knows how far we are."""


class Uploads:
    """Receives updates: one at a time per device, each device in a folder of its own.

    Args:
        folder: where partial objects lie; they survive a restart.
        send: hands a record to a device.
    """

    def __init__(
        self,
        namespace: str,
        folder: Path,
        objects: ObjectStore,
        ledger: Ledger,
        send: Callable[[str, Record], bool],
    ) -> None:
        self._namespace = namespace
        self._folder = folder
        self._objects = objects
        self._ledger = ledger
        self._send = send
        self._uploads: dict[str, Upload] = {}

    def __getitem__(self, device: str) -> Upload | None:
        return self._uploads.get(device)

    def begin(self, announce: Announce, window: int, now: float) -> Upload:
        """Starts an upload or goes on with it. Raises StateError where there is no room for it."""
        upload = self._uploads.get(announce.device)
        if upload is not None and upload.announce.object != announce.object:
            self.forget(announce.device)
            upload = None
        if upload is None:
            receiver = ObjectReceiver.open(
                self._folder / announce.device, announce.object, announce.bytes, announce.chunk_bytes
            )
            upload = self._uploads[announce.device] = Upload(announce, receiver, window, now)
        upload.announce, upload.told = announce, False
        return upload

    def on_chunk(self, device: str, chunk: Chunk) -> bool:
        """Takes a chunk in; False: it is of no upload under way. Raises ProtocolError, StateError."""
        upload = self._uploads.get(device)
        if upload is None or chunk.transfer != self._transfer(upload.announce):
            return False
        size = len(chunk.payload)
        new = upload.receiver.accept(chunk)
        reached("chunk.durable")
        self._ledger.add(device, bytes_up=size, chunks_up=1, duplicate_bytes=0 if new else size)
        upload.told = False
        return True

    def complete(self) -> list[Upload]:
        """The uploads of which every chunk is held, by device."""
        return [
            self._uploads[device]
            for device in sorted(self._uploads)
            if self._uploads[device].receiver.complete
        ]

    def tell(self) -> None:
        """Tells every device whose upload moved what is held: one record for all chunks of a batch."""
        for device, upload in self._uploads.items():
            if not upload.told:
                upload.told = self._send(device, upload.receiver.have(device, upload.window))

    def finish(self, upload: Upload) -> Path:
        """The object, verified and durable. Raises ContainerError where it is not what was announced."""
        del self._uploads[upload.announce.device]
        path = upload.receiver.finish(self._objects)
        shutil.rmtree(self._folder / upload.announce.device, ignore_errors=True)
        return path

    def forget(self, device: str) -> None:
        """Ends an upload and removes what was received."""
        upload = self._uploads.pop(device, None)
        if upload is not None:
            upload.receiver.discard()
        shutil.rmtree(self._folder / device, ignore_errors=True)

    def forget_object(self, device: str, digest: str) -> None:
        """As ``forget``, of this object alone: what was received of another one stays."""
        upload = self._uploads.get(device)
        if upload is not None and upload.announce.object == digest:
            self.forget(device)
        else:
            drop_partial(self._folder / device, digest)

    def keep_only(self, devices: set[str]) -> None:
        """Removes the partial files of all other devices: of rounds that are over."""
        for folder in [entry for entry in self._folder.iterdir() if entry.name not in devices]:
            self.forget(folder.name)

    def close(self) -> None:
        """Lets go of the files; what was received stays."""
        for upload in self._uploads.values():
            upload.receiver.close()
        self._uploads.clear()

    def _transfer(self, announce: Announce) -> bytes:
        channel = f"up/{announce.run}/{announce.round}"
        return transfer_id(self._namespace, announce.device, channel, announce.object)


@dataclass
class _Download:
    """``heard``: monotonic time of the device's last word on it."""

    sender: ObjectSender
    chunk_bytes: int
    heard: float


class Downloads:
    """Sends version objects to the devices that ask for them, a frame each in turn.

    Args:
        find: the version whose object has this digest; None: not an object that devices may have.
        send: hands a frame to a device.
    """

    def __init__(
        self,
        namespace: str,
        objects: ObjectStore,
        ledger: Ledger,
        find: Callable[[str], VersionRow | None],
        send: Callable[[str, bytes], bool],
    ) -> None:
        self._namespace = namespace
        self._objects = objects
        self._ledger = ledger
        self._find = find
        self._send = send
        self._downloads: dict[tuple[str, str], _Download] = {}
        """By device and object."""

    @property
    def objects(self) -> set[str]:
        """Digests of what is being fetched."""
        return {digest for _, digest in self._downloads}

    def on_have(self, device: str, have: Have, now: float) -> None:
        """A device asks for an object or acknowledges chunks of it.

        Raises ProtocolError for an object that is no version of the run, or of another size.
        """
        key = device, have.object
        download = self._downloads.get(key)
        if download is None or download.chunk_bytes != have.chunk_bytes:
            version = self._find(have.object)
            if version is None or version.bytes != have.bytes:
                raise ProtocolError(
                    f"device {device!r} asks for {have.object[:12]}, which is no version of this run"
                )
            transfer = transfer_id(self._namespace, device, "down", have.object)
            sender = ObjectSender(transfer, self._objects.path(have.object), have.bytes, have.chunk_bytes)
            download = self._downloads[key] = _Download(sender, have.chunk_bytes, now)
        window = min(have.window, _MOST_WINDOW)
        download.sender.on_have(msgspec.structs.replace(have, window=window), now)
        download.heard = now
        if download.sender.complete:
            del self._downloads[key]

    def pump(self, now: float) -> None:
        """Sends what may go out now."""
        for key in [key for key, one in self._downloads.items() if now - one.heard > _SILENCE_S]:
            del self._downloads[key]
        busy = [(key, one.sender) for key, one in self._downloads.items()]
        while busy:
            still = []
            for key, sender in busy:
                device, _ = key
                try:
                    frame = sender.next_frame(now)
                except StateError:
                    del self._downloads[key]
                    raise
                if frame is None:
                    continue
                if not self._send(device, frame):
                    self.mark_lost()
                    return
                self._ledger.add(device, bytes_down=len(frame) - HEADER_BYTES, chunks_down=1)
                still.append((key, sender))
            busy = still

    def due(self, now: float) -> float | None:
        """When the next chunk has to be repeated."""
        times = [due for one in self._downloads.values() if (due := one.sender.due(now)) is not None]
        return min(times, default=None)

    def mark_lost(self, device: str | None = None) -> None:
        """The link is gone, the device's or the server's own: devices ask again when they are back."""
        for key in [key for key in self._downloads if device in (None, key[0])]:
            del self._downloads[key]
