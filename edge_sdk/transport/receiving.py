"""An object that comes in chunks: what of it is held, durably, across crashes.

It does no I/O on a network: the caller carries frames and ``Have`` records. What ``Have`` tells is the only
acknowledgement that a sender gets.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from pathlib import Path
from types import TracebackType

from edge_sdk.errors import ContainerError, ProtocolError, StateError
from edge_sdk.protocol.frames import Chunk
from edge_sdk.protocol.wire import Have
from edge_sdk.transport.chunks import chunk_count, ranges_of
from edge_sdk.transport.objects import ObjectStore, sync_folder

__all__ = ["ObjectReceiver", "drop_partial", "sweep_partials"]

_HEADER = struct.Struct("<4sIQQ")
_MAGIC = b"HAV1"
_MOST_RANGES = 4096
_PART, _HAVE = ".part", ".have"


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
        drop_partial(self._folder, self.digest)

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


def drop_partial(folder: Path, digest: str) -> None:
    """Removes the partial files of one object."""
    for suffix in (_HAVE, _PART):
        (folder / f"{digest}{suffix}").unlink(missing_ok=True)


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
