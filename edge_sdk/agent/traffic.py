"""What goes over the link: counted for the run and for the local day, and held to a day's allowance.

Payload bytes of messages count, as in the ledger; what the broker's protocol and TLS add does not. Small
records always go and are counted: what waits is bulk.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec
from msgspec.structs import replace

from edge_sdk.agent.record import AgentRecord
from edge_sdk.clock import Clock
from edge_sdk.protocol.base import NotNegative, Record

__all__ = ["Traffic"]

_KEPT_DAYS = 31
_DAY_S = 86_400.0
_MOST_DAYS = 2
"""On which a newer day than the clock's goes on, where no run of the agent lasts for a day's length."""
_WAYS = ("bytes_up", "bytes_down")
_SET_YEAR = 2025
"""A clock that tells an earlier year is not set yet, as on a board that has no battery for it."""


class _Doubt(Record, frozen=True, kw_only=True):
    """What the agent went through with a clock that was not to be believed; over restarts, too."""

    days: tuple[str, ...] = ()
    """That the clock told, being set, since it is behind the newest known one."""
    ledger: str = ""
    """Of the day that took what was counted meanwhile: ``bytes_up`` and ``bytes_down``."""
    bytes_up: NotNegative = 0
    bytes_down: NotNegative = 0


class Traffic:
    """A clock that is not set, or was put back, opens no new allowance: the newest day that is known goes on,
    for a day's length at most, or until the clock tells a third day. What was counted meanwhile is of the day
    that it then turns out to be.

    Args:
        most_mb: both ways together, on one day; None: no limit.
    """

    def __init__(self, record: AgentRecord, clock: Clock, most_mb: float | None) -> None:
        self._record = record
        self._clock = clock
        self.most_mb = most_mb
        self._day = ""
        self._sure = True
        self._doubt = msgspec.json.decode(record.get("traffic.doubt") or "{}", type=_Doubt)
        self._back_since: float | None = None

    def count(self, run: str, **counters: int) -> None:
        """Adds to the ledger of the run, and what of it went over the link to that of the day."""
        moved: dict[str, int] = {name: counters[name] for name in _WAYS if name in counters}
        with self._record.counting():
            day = self._today()
            self._record.count(run, **counters)
            self._record.count(day, **moved)
            if day != self._day:
                self._record.keep_days(_KEPT_DAYS)
            if moved and not self._sure:
                sums = {name: getattr(self._doubt, name) + amount for name, amount in moved.items()}
                self._keep(replace(self._doubt, ledger=day, **sums))
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
        rest_s = next_day.timestamp() - now.timestamp()
        if self._back_since is None:
            return rest_s
        back_s = max(1.0, self._back_since + _DAY_S - self._clock.monotonic())
        last = now.year >= _SET_YEAR and len(self._doubt.days) == _MOST_DAYS
        return min(rest_s, back_s) if last else back_s

    def _today(self) -> str:
        """The day that counts now, by its ledger's name."""
        wall, now = datetime.fromtimestamp(self._clock.wall()), self._clock.monotonic()
        day, newest, doubt = f"day {wall:%Y-%m-%d}", self._record.newest_day(), self._doubt
        is_set = wall.year >= _SET_YEAR
        if newest > day:
            self._back_since = now if self._back_since is None else self._back_since
            if is_set and day not in doubt.days:
                doubt = replace(doubt, days=(*doubt.days, day))
            if len(doubt.days) <= _MOST_DAYS and now < self._back_since + _DAY_S:
                self._sure = False
                self._keep(doubt)
                return newest
            # the clock is right after all, and was wrong then
            if not self._record.read_only:
                self._record.forget_days_after(day)
            doubt = _Doubt()
        self._back_since, self._sure = None, is_set
        if is_set:
            if doubt.ledger not in ("", day) and not self._record.read_only:
                self._record.count(day, bytes_up=doubt.bytes_up, bytes_down=doubt.bytes_down)
            doubt = _Doubt()
        self._keep(doubt)
        return day

    def _keep(self, doubt: _Doubt) -> None:
        if doubt != self._doubt and not self._record.read_only:
            text = msgspec.json.encode(doubt).decode()
            self._record.put("traffic.doubt", None if doubt == _Doubt() else text)
        self._doubt = doubt
