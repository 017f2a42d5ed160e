"""How fast a device's link through the broker is, each way, and how long there and back takes.

Neither does I/O nor starts a timer: the caller hands in what arrives and calls ``tick`` when it is due.
Frames go out as many at a time as a window holds, and grow until the window is worth a good tenth of a
second; the rate is what was answered in the later half of the time: neither the round trip nor the slow
beginning counts. A way ends once its rate is steady, or its bytes or seconds are used up.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from edge_sdk.protocol.base import Record
from edge_sdk.protocol.frames import Chunk, encode_chunk, link_transfer
from edge_sdk.protocol.measure import Link
from edge_sdk.protocol.wire import Ping, Pong

__all__ = ["MOST_WAY_BYTES", "LinkMeter"]

Way = Literal["down", "up"]

MOST_WAY_BYTES = 2_000_000
_MOST_WAY_S = 4.0
_PINGS = 5
_SILENCE_S = 3.0
"""Without any answer for so long, there is none."""
_WINDOW = 6
_FIRST_BYTES, _MOST_BYTES = 1024, 128 * 1024
"""Of a frame's payload."""
_WINDOW_S = 0.15
"""What a window should take, at the least; more where the round trip is longer."""
_STEADY_S, _STEADY_TRIPS, _STEADY_SAMPLES, _STEADY = 0.4, 8, 10, 0.1
"""To end before the time: how long it lasted, in seconds and in round trips, how many answers there were, and
how little the rates of two halves differ."""


@dataclass
class _Course:
    """One way's measurement: what is under way, and what was answered when."""

    way: Way
    began: float
    size: int = _FIRST_BYTES
    handed: int = 0
    flights: dict[int, int] = field(default_factory=dict)
    answers: list[tuple[float, int]] = field(default_factory=list)
    """Time, and payload that had been answered by then."""

    def answered(self, size: int, now: float) -> None:
        self.answers.append((now, size + (self.answers[-1][1] if self.answers else 0)))

    def bytes_per_s(self, share: tuple[float, float] = (0.5, 1.0)) -> float | None:
        """Answered between two points of the time from the first to the last answer."""
        if len(self.answers) < 3:
            return None
        first, last = self.answers[0][0], self.answers[-1][0]
        start, end = (first + part * (last - first) for part in share)
        inside = [answer for answer in self.answers if start <= answer[0] <= end]
        if len(inside) < 2 or inside[-1][0] <= inside[0][0]:
            return None
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])

    def spread(self) -> float | None:
        """How much the rates of the two halves differ, over the rate of both."""
        whole, one, other = (
            self.bytes_per_s(),
            self.bytes_per_s((0.25, 0.625)),
            self.bytes_per_s((0.625, 1.0)),
        )
        return abs(one - other) / whole if whole and one and other else None

    def steady(self, trip: float) -> bool:
        """A window that still grows looks steady for a round trip: the halves must be longer than that."""
        least = max(_STEADY_S, _STEADY_TRIPS * trip)
        if len(self.answers) < _STEADY_SAMPLES or self.answers[-1][0] - self.answers[0][0] < least:
            return False
        spread = self.spread()
        return spread is not None and spread < _STEADY


class LinkMeter:
    """Measures once. ``done`` tells the end; then ``link`` holds what was found and ``reasons`` what was not.

    Args:
        say: sends a record to the aggregator; send: a frame. False: not connected, which ends it.
        wait: seconds until so many bytes may be sent (the owner's limit); whoever sends spends them.
        ways: those to be measured; the round trip always is.
        most_bytes: of payload each way; what the aggregator allows, or less.
    """

    def __init__(
        self,
        namespace: str,
        device: str,
        *,
        say: Callable[[Record], bool],
        send: Callable[[bytes], bool],
        wait: Callable[[int], float],
        ways: Sequence[Way] = ("down", "up"),
        most_bytes: int = MOST_WAY_BYTES,
        random: Random | None = None,
    ) -> None:
        self.done = False
        self.reasons: dict[str, str] = {}
        self.spread: dict[str, float] = {}
        self.bytes_up = self.bytes_down = 0
        """Payload that went each way."""
        self._transfer = link_transfer(namespace, device)
        self._device, self._say, self._send, self._wait = device, say, send, wait
        self._ways = list(ways)
        self._most_bytes = min(most_bytes, MOST_WAY_BYTES)
        # An answer to an earlier measurement must not be taken for one to this.
        self._number = (random or Random()).randrange(1 << 31)  # noqa: S311
        self._filler = os.urandom(_MOST_BYTES)  # nothing on the way can make it smaller
        self._ping: tuple[int, float] | None = None
        self._trips: list[float] = []
        self._course: _Course | None = None
        self._late: set[int] = set()
        """What the ended way still had under way: on a slow link it would stand before the next one's."""
        self._rates: dict[Way, float] = {}
        self._heard: float | None = None

    @property
    def link(self) -> Link:
        return Link(
            up_bps=self._rates.get("up"),
            down_bps=self._rates.get("down"),
            rtt_ms=1000 * statistics.median(self._trips) if self._trips else None,
            source="measured" if self._trips else "unknown",
        )

    def tick(self, now: float) -> float | None:
        """Sends what may go. Returns the time at which to call again; None: it is done."""
        if self.done:
            return None
        if self._heard is None:
            self._heard = now
        if self._waits() and now >= self._heard + _SILENCE_S:
            self._end("the aggregator did not answer" if not self._trips else "the aggregator fell silent")
            return None
        if len(self._trips) < _PINGS:
            if self._ping is None:
                self._ping = (self._next(), now)
                if not self._say(Ping(device=self._device, number=self._ping[0])):
                    self._end("there is no connection")
                    return None
            return self._heard + _SILENCE_S
        return self._tick_course(now)

    def on_pong(self, pong: Pong, now: float) -> None:
        """Takes an answer; one that nobody waits for changes nothing."""
        course = self._course
        if self._ping is not None and pong.number == self._ping[0]:
            sent, self._ping = self._ping[1], None
            self._heard = now
            if pong.refused:
                self._end(pong.refused)
            else:
                self._trips.append(now - sent)
        elif course is not None and pong.number in course.flights:
            size = course.flights.pop(pong.number)
            if pong.refused:
                self._close(course, pong.refused)
            elif course.way == "up" and pong.bytes == size:
                self._answered(course, size, now)

    def on_chunk(self, chunk: Chunk, now: float) -> bool:
        """Whether it is a frame of a link's measurement, be it of this one or of an earlier one."""
        if chunk.transfer != self._transfer:
            return False
        course = self._course
        self._heard = now
        self._late.discard(chunk.index)
        if course is not None and course.way == "down":
            size = course.flights.pop(chunk.index, None)
            if size == len(chunk.payload):
                self.bytes_down += size
                self._answered(course, size, now)
        return True

    def lost(self) -> None:
        """The connection is gone, and with it what was under way."""
        if not self.done:
            self._end("the connection was lost meanwhile")

    def stop(self, reason: str) -> None:
        """Whoever called has no more time for it; what was found so far counts."""
        if not self.done:
            self._end(reason)

    # -- one way --------------------------------------------------------------------------------------

    def _tick_course(self, now: float) -> float | None:
        while True:
            if self._course is None:
                if not self._ways:
                    self.done = True
                    return None
                if self._late and self._heard is not None and now < self._heard + _SILENCE_S:
                    return self._heard + _SILENCE_S
                self._course = _Course(self._ways.pop(0), now)
            course, end = self._course, self._course.began + _MOST_WAY_S
            spent = course.handed >= self._most_bytes and not course.flights
            if course.steady(statistics.median(self._trips)) or spent or now >= end:
                self._close(course, f"no two answers within {_MOST_WAY_S:g} s")
                continue
            due = self._fill(course, now)
            if self.done:
                return None
            if course.flights and self._heard is not None:
                due = min(due, self._heard + _SILENCE_S)
            return min(due, end)

    def _fill(self, course: _Course, now: float) -> float:
        while len(course.flights) < _WINDOW and course.handed < self._most_bytes:
            size = min(course.size, self._most_bytes - course.handed)
            wait = self._wait(size) if course.way == "up" else 0.0
            if wait > 0:
                course.size = max(_FIRST_BYTES, course.size // 2)  # less at a time keeps closer to the limit
                return now + wait
            number = self._next()
            if course.way == "up":
                sent = self._send(encode_chunk(self._transfer, number, 0, memoryview(self._filler)[:size]))
                self.bytes_up += size if sent else 0
            else:
                sent = self._say(Ping(device=self._device, number=number, wants=size))
            if not sent:
                self._end("there is no connection")
                return now
            if not course.flights:
                self._heard = now
            course.flights[number] = size
            course.handed += size
        return course.began + _MOST_WAY_S

    def _answered(self, course: _Course, size: int, now: float) -> None:
        self._heard = now
        course.answered(size, now)
        trip = statistics.median(self._trips)
        rate = course.bytes_per_s((0.5, 1.0))
        wanted = 2.0 * course.size if rate is None else rate * max(_WINDOW_S, 2 * trip) / _WINDOW
        course.size = max(_FIRST_BYTES, min(int(wanted), 2 * course.size, _MOST_BYTES))

    def _close(self, course: _Course, reason: str) -> None:
        """Ends a way; ``reason``: why there is no rate, where there is none."""
        rate, spread = course.bytes_per_s(), course.spread()
        if rate:
            self._rates[course.way] = 8 * rate
            if spread is not None:
                self.spread[f"{course.way}_bps"] = spread
        else:
            self.reasons[f"{course.way}_bps"] = reason
        self._late = set(course.flights) if course.way == "down" else set()
        self._course = None

    def _waits(self) -> bool:
        return self._ping is not None or (self._course is not None and bool(self._course.flights))

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _end(self, reason: str) -> None:
        if self._course is not None:
            self._close(self._course, reason)
        if not self._trips:
            self.reasons["rtt_ms"] = reason
        for way in self._ways:
            self.reasons[f"{way}_bps"] = reason
        self._ways.clear()
        self.done = True
