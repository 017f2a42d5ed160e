"""Answers devices that measure their link: bytes on demand, and a word for bytes received. None are kept.

What a device may use is bounded: its own share, which fills again over minutes, and one share of all devices
together, so that a fleet that starts at once, or one device that means ill, takes little from the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from edge_sdk.clock import Clock
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.frames import Chunk, encode_chunk, link_transfer
from edge_sdk.protocol.wire import Ping, Pong
from edge_sdk.transport.link_meter import MOST_WAY_BYTES
from edge_sdk.transport.shaping import TokenBucket

__all__ = ["LINK_BYTES", "Echo"]

LINK_BYTES = MOST_WAY_BYTES
"""Each way, for one measurement."""
_RECORD_BYTES = 512
"""What a record is counted as: it costs more than its bytes."""
_SHARE_BYTES = 2 * LINK_BYTES + 200_000
_FILLS_IN_S = 600.0
_ALL_BYTES, _ALL_BPS = 16_000_000, 8 * 8_000_000.0
_MOST_DEVICES = 4096
_MOST_REFUSALS = 8
"""That are said to a device in a row; what it asks beyond is not answered."""


@dataclass
class _Share:
    bucket: TokenBucket
    refusals: int = 0


class Echo:
    """See the module.

    Args:
        say: hands a record to a device; send: a frame.
        emit: told once when a device used up its share.
    """

    def __init__(
        self,
        namespace: str,
        clock: Clock,
        say: Callable[[str, Record], bool],
        send: Callable[[str, bytes], bool],
        emit: Callable[..., None],
    ) -> None:
        self._namespace = namespace
        self._clock = clock
        self._say, self._send, self._emit = say, send, emit
        self._shares: dict[str, _Share] = {}
        self._all = TokenBucket(_ALL_BPS, clock, _ALL_BYTES)
        self._filler = b""

    def on_ping(self, device: str, ping: Ping) -> None:
        if not self._grant(device, ping.number, ping.wants + _RECORD_BYTES):
            return
        if not ping.wants:
            self._say(device, Pong(device=device, number=ping.number))
            return
        if len(self._filler) < ping.wants:
            self._filler = os.urandom(ping.wants)
        transfer = link_transfer(self._namespace, device)
        self._send(device, encode_chunk(transfer, ping.number, 0, memoryview(self._filler)[: ping.wants]))

    def on_chunk(self, device: str, chunk: Chunk) -> bool:
        """Whether it is a frame of a link's measurement; it is answered then."""
        if chunk.transfer != link_transfer(self._namespace, device):
            return False
        size = len(chunk.payload)
        if self._grant(device, chunk.index, size + _RECORD_BYTES):
            self._say(device, Pong(device=device, number=chunk.index, bytes=size))
        return True

    def _grant(self, device: str, number: int, size: int) -> bool:
        share = self._share(device)
        if share.bucket.wait(size) > 0:
            why = "this device used up what it may measure its link with; there is more in some minutes"
        elif self._all.wait(size) > 0:
            why = "too many devices measure their links now; try again in a minute"
        else:
            share.bucket.spend(size)
            self._all.spend(size)
            share.refusals = 0
            return True
        share.refusals += 1
        if share.refusals == 1:
            self._emit("link.refused", device=device, message=why)
        if share.refusals <= _MOST_REFUSALS:
            self._say(device, Pong(device=device, number=number, refused=why))
        return False

    def _share(self, device: str) -> _Share:
        share = self._shares.get(device)
        if share is None:
            if len(self._shares) >= _MOST_DEVICES:
                self._forget()
            bucket = TokenBucket(8 * _SHARE_BYTES / _FILLS_IN_S, self._clock, _SHARE_BYTES)
            share = self._shares[device] = _Share(bucket)
        return share

    def _forget(self) -> None:
        """Those whose share is full again; where there is none, the one seen first."""
        full = [device for device, share in self._shares.items() if share.bucket.wait(_SHARE_BYTES) <= 0]
        for device in full or [next(iter(self._shares))]:
            del self._shares[device]
