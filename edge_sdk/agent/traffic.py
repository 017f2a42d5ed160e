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


class Traffic:
    """Args:
    most_mb: both ways together, on one day; None: no limit.
    """

    def __init__(self, record: AgentRecord, clock: Clock, most_mb: float | None) -> None:
        self._record = record
        self._clock = clock
        self.most_mb = most_mb
        self._day = ""

    def count(self, run: str, **counters: int) -> None:
        """Adds to the ledger of the run, and what of it went over the link to that of the day."""
        day = self._today()
        with self._record.counting():
            self._record.count(run, **counters)
            moved = {name: counters[name] for name in ("bytes_up", "bytes_down") if name in counters}
            self._record.count(day, **moved)
            if day != self._day:
                self._record.keep_days(_KEPT_DAYS)
        self._day = day

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
        now = datetime.fromtimestamp(self._clock.wall())
        next_day = datetime.combine(now.date() + timedelta(days=1), datetime.min.time())
        return next_day.timestamp() - now.timestamp()

    def _today(self) -> str:
        return f"day {datetime.fromtimestamp(self._clock.wall()):%Y-%m-%d}"
