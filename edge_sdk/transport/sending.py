"""An object that goes out in chunks, within the receiver's window.

It does no I/O on a network and starts no timer: the caller carries frames and ``Have`` records, and asks
again at ``due``. The receiver's word is the only acknowledgement; a broker's is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import ProtocolError, StateError
from edge_sdk.protocol.frames import encode_chunk
from edge_sdk.protocol.wire import Have
from edge_sdk.transport.chunks import chunk_count, mark

__all__ = ["ObjectSender"]

_LEAST_TIMEOUT_S = 4.0
_BLIND_TIMEOUT_S = 60.0
"""Before anything tells how fast the link is; also where the doubling of shorter ones ends."""
_PATIENCE = 4


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
