"""Objects in chunks: what goes out within the receiver's window, and what is held durably.

Neither side does I/O on a network or starts a timer: the caller carries frames and ``Have`` records, and
asks again at ``due``. The receiver's word is the only acknowledgement; a broker's is none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from edge_sdk.errors import ContainerError, ProtocolError, StateError
from edge_sdk.protocol.frames import Chunk, encode_chunk
from edge_sdk.protocol.wire import Have
from edge_sdk.transport.chunks import chunk_count, mark, ranges_of
from edge_sdk.transport.objects import ObjectStore, sync_folder

__all__ = ["ObjectReceiver", "ObjectSender", "chunk_count", "sweep_partials"]

_LEAST_TIMEOUT_S = 4.0
_BLIND_TIMEOUT_S = 60.0
"""Before anything tells how fast the link is; also where the doubling of shorter ones ends."""
_PATIENCE = 4
_MOST_RANGES = 4096
_PART, _HAVE = ".part", ".have"


class ObjectSender:
    """Sends one object. Nothing goes out before the first ``Have``, nor beyond its window.

    A connection that lives loses next to nothing, and on a slow one a repeat only waits behind what it
    repeats. So what is under way goes again only once nothing moved, neither out nor acknowledged, for the
    longest of 4 s, 4 x the smoothed time between acknowledgements, and 4 x the time of a whole window at
    ``rate_bps``; for 60 s where neither is known. Every repeat without an acknowledgement doubles it.

    Args:
        rate_bps: bits per second of the link, where known.
    """

    def __init__(
        self, transfer: bytes, path: Path, size: int, chunk_bytes: int, *, rate_bps: float | None = None
    ) -> None:
        self._transfer, self._path = transfer, path
        self._size, self._chunk_bytes = size, chunk_bytes
        self._count = chunk_count(size, chunk_bytes)
        self._held = bytearray(self._count)
        self._missing = self._count
        self._next = 0
        self._flights: dict[int, None] = {}
        """Chunks under way, in the order of their first sending."""
        self._overdue: list[int] = []
        self._moved = 0.0
        self._repeats = 0
        self._link_bps = rate_bps
        self._window = 0
        self._believe_all = True
        self._gap: float | None = None
        self._gap_since = 0.0
        self._busy_since: float | None = None
        self._busy_s = 0.0
        self._acknowledged = 0
        self.bytes_sent = 0
        """Payload bytes handed out, repeats included."""
        self.chunks_sent = 0

    @property
    def complete(self) -> bool:
        """The receiver said that it holds everything."""
        return self._missing == 0

    @property
    def in_flight(self) -> int:
        """Chunks sent and not yet acknowledged."""
        return len(self._flights)

    @property
    def rate_bps(self) -> float | None:
        """Acknowledged bits per second while something was under way; None before two chunks."""
        if self._busy_s <= 0 or self._acknowledged < 2 * self._chunk_bytes:
            return None
        return 8 * self._acknowledged / self._busy_s

    def on_have(self, have: Have, now: float) -> None:
        """Takes the receiver's word. Raises ProtocolError where it speaks of another object.

        A shorter list than before is believed only when nothing is under way: the receiver lost its
        partial file then, while otherwise it is an older record that arrived late.
        """
        if have.bytes != self._size or have.chunk_bytes != self._chunk_bytes:
            raise ProtocolError(
                f"the receiver speaks of {have.bytes} bytes in chunks of {have.chunk_bytes}, "
                f"the object has {self._size} in chunks of {self._chunk_bytes}"
            )
        held = mark(have.ranges, self._count)
        self._acknowledge([index for index in self._flights if held[index]], now)
        if self._believe_all or not self._flights:
            self._believe_all = False
            self._held = held
        else:
            for index, one in enumerate(held):
                if one:
                    self._held[index] = 1
        self._missing = self._held.count(0)
        self._next = 0
        self._window = have.window

    def next_frame(self, now: float) -> bytes | None:
        """The next frame that may go out now, overdue ones first; None: wait for ``Have`` or ``due``.

        Raises StateError when the object on disk is gone or shorter than announced.
        """
        if self._window == 0:
            return None
        if self._flights and self._moved + self._timeout() <= now:
            self._overdue = list(self._flights)
            self._repeats += 1
            self._moved = now
        while self._overdue:
            index = self._overdue.pop(0)
            if index in self._flights:
                return self._frame(index, now)
        if len(self._flights) >= self._window:
            return None
        while self._next < self._count:
            index = self._next
            if not self._held[index] and index not in self._flights:
                frame = self._frame(index, now)
                if not self._flights:
                    self._gap_since = now
                self._flights[index] = None
                if self._busy_since is None:
                    self._busy_since = now
                return frame
            self._next += 1
        return None

    def mark_lost(self) -> None:
        """After a reconnect: what was under way may be gone. Sends nothing before the next ``Have``."""
        self._flights.clear()
        self._overdue.clear()
        self._repeats = 0
        self._window = 0
        self._believe_all = True
        self._busy_since = None

    def still_leaving(self, now: float) -> None:
        """The transport has not got rid yet of what was handed to it: none of that is overdue."""
        self._moved = now

    def due(self, now: float) -> float | None:
        """Monotonic time at which chunks are sent again; None: nothing is under way."""
        if not self._flights or self._window == 0:
            return None
        return now if self._overdue else max(now, self._moved + self._timeout())

    def _timeout(self) -> float:
        known = []
        if self._gap is not None:
            known.append(self._gap)
        if self._link_bps:
            known.append(8 * self._window * self._chunk_bytes / self._link_bps)
        timeout = max(_LEAST_TIMEOUT_S, _PATIENCE * max(known)) if known else _BLIND_TIMEOUT_S
        return min(timeout * 2.0 ** min(self._repeats, 8), max(timeout, _BLIND_TIMEOUT_S))

    def _acknowledge(self, indexes: Sequence[int], now: float) -> None:
        if not indexes:
            return
        for index in indexes:
            del self._flights[index]
            self._acknowledged += self._length(index)
        gap = now - self._gap_since
        # Up at once, down slowly: a repeat that came too early must not come a second time.
        self._gap = gap if self._gap is None else max(gap, 0.875 * self._gap + 0.125 * gap)
        self._gap_since = self._moved = now
        self._repeats = 0
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = now if self._flights else None

    def _length(self, index: int) -> int:
        return min(self._chunk_bytes, self._size - index * self._chunk_bytes)

    def _frame(self, index: int, now: float) -> bytes:
        offset, length = index * self._chunk_bytes, self._length(index)
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                payload = file.read(length)
        except OSError as error:
            raise StateError(f"the object {self._path} cannot be read: {error.strerror}") from error
        if len(payload) != length:
            raise StateError(f"the object {self._path} is shorter than the {self._size} bytes announced")
        frame = encode_chunk(self._transfer, index, offset, payload)
        self.bytes_sent += length
        self.chunks_sent += 1
        self._moved = now
        return frame


_HEADER = struct.Struct("<4sIQQ")
_MAGIC = b"HAV1"


class ObjectReceiver:
    """Receives one object into ``{digest}.part``, and knows in ``{digest}.have`` which chunks it holds.

    Order of writing: the bytes of some chunks, fdatasync once for all of them, then their bytes in the
    ``.have`` file. So what ``have`` claims is durable, and a crash at any point loses at most chunks that
    nobody was told of.
    The ``.have`` file begins with magic, chunk size, object size and the count of duplicate bytes.
    """

    def __init__(self, folder: Path, digest: str, size: int, chunk_bytes: int) -> None:
        """Use ``open``."""
        self.digest, self.size, self.chunk_bytes = digest, size, chunk_bytes
        self._folder = folder
        self._part_path, self._have_path = folder / f"{digest}{_PART}", folder / f"{digest}{_HAVE}"
        self._held = bytearray(chunk_count(size, chunk_bytes))
        self._part = self._have = -1
        self._unsynced: list[int] = []
        self.duplicate_bytes = 0
        """Payload bytes that arrived more than once; survives a restart."""
        self.received_bytes = 0
        """Bytes of the object that are held, those of earlier sessions included."""

    @classmethod
    def open(cls, folder: Path, digest: str, size: int, chunk_bytes: int) -> ObjectReceiver:
        """Starts, or goes on with what lies in ``folder`` for the same object, size and chunk size.

        Raises ProtocolError for sizes outside the contract, StateError where there is no room for it.
        """
        receiver = cls(folder, digest, size, chunk_bytes)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            receiver._open()
        except OSError as error:
            receiver.close()
            raise StateError(
                f"an object of {size} bytes cannot be received into {folder}: {error.strerror}",
                "free space on that file system" if error.errno == errno.ENOSPC else "",
            ) from error
        return receiver

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._part = os.open(self._part_path, flags, 0o600)
        self._have = os.open(self._have_path, flags, 0o600)
        expected = (_MAGIC, self.chunk_bytes, self.size)
        head = os.pread(self._have, _HEADER.size, 0)
        if (
            len(head) == _HEADER.size
            and _HEADER.unpack(head)[:3] == expected
            and os.fstat(self._part).st_size == self.size
        ):
            self.duplicate_bytes = _HEADER.unpack(head)[3]
            held = os.pread(self._have, len(self._held), _HEADER.size)
            self._held[: len(held)] = bytes(1 if one == 1 else 0 for one in held)
            self.received_bytes = sum(self._length(i) for i, one in enumerate(self._held) if one)
            return
        os.ftruncate(self._have, 0)
        os.fsync(self._have)  # the old claims must be gone for good before the old bytes go
        os.ftruncate(self._part, 0)
        try:
            os.posix_fallocate(self._part, 0, self.size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                self.discard()
                raise
            os.ftruncate(self._part, self.size)
        os.fsync(self._part)
        _write(self._have, _HEADER.pack(*expected, 0), 0)
        sync_folder(self._folder)

    def __enter__(self) -> ObjectReceiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Chunks held durably, as half-open ranges in order."""
        durable = bytearray(self._held)
        for index in self._unsynced:
            durable[index] = 0
        return tuple(ranges_of(durable))

    @property
    def complete(self) -> bool:
        """Every chunk came; ``finish`` makes all of them durable."""
        return 0 not in self._held

    def accept(self, chunk: Chunk) -> bool:
        """Writes one chunk down, for ``have`` to make durable. False: it was held already.

        Raises ProtocolError where it is no chunk of this object, StateError when the disk refuses it.
        """
        index = chunk.index
        if index >= len(self._held):
            raise ProtocolError(f"chunk {index} of an object that has {len(self._held)}")
        if chunk.offset != index * self.chunk_bytes or len(chunk.payload) != self._length(index):
            raise ProtocolError(
                f"chunk {index} at offset {chunk.offset} with {len(chunk.payload)} bytes does not fit "
                f"an object of {self.size} bytes in chunks of {self.chunk_bytes}"
            )
        try:
            if self._held[index]:
                self.duplicate_bytes += len(chunk.payload)
                header = _HEADER.pack(_MAGIC, self.chunk_bytes, self.size, self.duplicate_bytes)
                _write(self._have, header, 0)
                return False
            _write(self._part, chunk.payload, chunk.offset)
        except OSError as error:
            raise StateError(
                f"chunk {index} cannot be written to {self._folder}: {error.strerror}"
            ) from error
        self._held[index] = 1
        self._unsynced.append(index)
        self.received_bytes += len(chunk.payload)
        return True

    @property
    def unsynced(self) -> int:
        """Chunks written down that the sender must not be told of yet."""
        return len(self._unsynced)

    def sync(self) -> None:
        """Makes durable what came since the last time. Raises StateError when the disk refuses it."""
        if not self._unsynced:
            return
        try:
            os.fdatasync(self._part)
            for index in self._unsynced:
                _write(self._have, b"\x01", _HEADER.size + index)
        except OSError as error:
            raise StateError(
                f"{len(self._unsynced)} chunks cannot be written to {self._folder}: {error.strerror}"
            ) from error
        self._unsynced.clear()

    def have(self, device: str, window: int) -> Have:
        """The record that tells the sender what is held, and how much more may be under way.

        What it tells is durable. Raises StateError when the disk refuses that.
        """
        self.sync()
        return Have(
            device=device,
            object=self.digest,
            bytes=self.size,
            chunk_bytes=self.chunk_bytes,
            ranges=self.ranges[:_MOST_RANGES],
            window=window,
        )

    def finish(self, store: ObjectStore) -> Path:
        """Verifies the whole object and moves it into ``store``; returns its path there.

        Raises ContainerError when its bytes are not those of its name: the partial file is removed then.
        StateError: chunks are missing.
        """
        if not self.complete:
            raise StateError(
                f"object {self.digest[:12]} is not complete: {self._held.count(0)} chunks missing"
            )
        self._unsynced.clear()  # the whole file is synced before it gets its name
        self.close()
        try:
            store.adopt(self._part_path, expect=self.digest)
        except ContainerError:
            self.discard()
            raise
        self._have_path.unlink(missing_ok=True)
        return store.path(self.digest)

    def discard(self) -> None:
        """Forgets everything received."""
        self._unsynced.clear()
        self.close()
        self._have_path.unlink(missing_ok=True)
        self._part_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the files; ``open`` goes on where it stopped."""
        with contextlib.suppress(StateError):
            self.sync()
        for descriptor in (self._part, self._have):
            if descriptor >= 0:
                os.close(descriptor)
        self._part = self._have = -1

    def _length(self, index: int) -> int:
        return min(self.chunk_bytes, self.size - index * self.chunk_bytes)


def sweep_partials(folder: Path, keep: set[str]) -> list[str]:
    """Removes the partial files of all objects but those in ``keep``; returns the digests removed."""
    gone: set[str] = set()
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.suffix in (_PART, _HAVE) and entry.stem not in keep:
            entry.unlink(missing_ok=True)
            gone.add(entry.stem)
    return sorted(gone)


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
