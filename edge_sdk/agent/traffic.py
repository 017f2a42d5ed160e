"""What goes over the link: counted for the run and for the local day, and held to a day's allowance.

Payload bytes of messages count, as in the ledger; what the broker's protocol and TLS add does not. Small
records always go and are counted: what waits is bulk.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from edge_sdk.agent.record import AgentRecord
from edge_sdk.clock import Clock

__all__ = ["Traffic"]

_KEPT_DAYS = 31
_DAY_S = 86_400.0
_SET_YEAR = 2025
"""A clock that tells an earlier year is not set yet, as on a board that has no battery for it."""


class Traffic:
    """A clock that is not set, or was put back, opens no new allowance: the newest day that is known goes on,
    for a day's length at most. What was counted meanwhile is of the day that it then turns out to be.

    Args:
        most_mb: both ways together, on one day; None: no limit.
    """

    def __init__(self, record: AgentRecord, clock: Clock, most_mb: float | None) -> None:
        self._record = record
        self._clock = clock
        self.most_mb = most_mb
        self._day = ""
        self._sure = True
        self._unsure = {"bytes_up": 0, "bytes_down": 0}
        self._back_since: float | None = None

    def count(self, run: str, **counters: int) -> None:
        """Adds to the ledger of the run, and what of it went over the link to that of the day."""
        moved: dict[str, int] = {name: counters[name] for name in self._unsure if name in counters}
        with self._record.counting():
            day = self._today()
            self._record.count(run, **counters)
            self._record.count(day, **moved)
            if day != self._day:
                self._record.keep_days(_KEPT_DAYS)
        self._day = day
        if not self._sure:
            self._unsure = {name: amount + moved.get(name, 0) for name, amount in self._unsure.items()}

    @property
    def used(self) -> int:
        """Bytes of today."""
        return sum(self._record.ledger(self._today()).values())

    @property
    def left(self) -> float:
        """Bytes that may still go today."""
        return float("inf") if self.most_mb is None else max(0.0, self.most_mb * 1e6 - self.used)

    @property
    def tomorrow_s(self) -> float:
        """Seconds until the next local day."""
        if self._back_since is not None:
            return max(1.0, self._back_since + _DAY_S - self._clock.monotonic())
        now = datetime.fromtimestamp(self._clock.wall())
        next_day = datetime.combine(now.date() + timedelta(days=1), datetime.min.time())
        return next_day.timestamp() - now.timestamp()

    def _today(self) -> str:
        """The day that counts now, by its ledger's name."""
        wall, now = datetime.fromtimestamp(self._clock.wall()), self._clock.monotonic()
        day, newest = f"day {wall:%Y-%m-%d}", self._record.newest_day()
        if newest > day and self._back_since is None:
            self._back_since = now
        elif newest > day and now >= (self._back_since or 0.0) + _DAY_S:
            self._record.forget_days_after(day)  # the clock is right after all, and was wrong then
            self._unsure, newest = dict.fromkeys(self._unsure, 0), ""
        back = newest > day
        if not back:
            self._back_since = None
        self._sure = not back and wall.year >= _SET_YEAR
        if self._sure and any(self._unsure.values()):
            if day != self._day:
                self._record.count(day, **self._unsure)
            self._unsure = dict.fromkeys(self._unsure, 0)
        return newest if back else day
