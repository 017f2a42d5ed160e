"""How long a device is awaited whose update has not come: as long as its work moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aggregator.participations import Participations
from aggregator.round_port import RoundsPort
from aggregator.state.base import ParticipationRow
from edge_sdk.clock import Clock
from edge_sdk.protocol.wire import Status

__all__ = ["Patience"]

_LEAST_S, _MOST_S = 1.0, 5.0
"""Between two looks at who is still."""


class Patience:
    """Ends participations from which nothing comes, so that their devices are free for other work.

    In the present round of a synchronous schedule its deadline does that. All others end when their device
    says that it has forgotten them, when nothing was heard of them for as long as their own deadline was, or
    when the version that they build on is too old.

    Args:
        buffered: the schedule is; no participation then ends with its round.
    """

    def __init__(
        self, participations: Participations, port: RoundsPort, clock: Clock, *, buffered: bool
    ) -> None:
        self._participations = participations
        self._port = port
        self._clock = clock
        self._buffered = buffered
        self._look_at: float | None = None

    def look(self) -> None:
        """Gives up whoever is still for too long. Does nothing where it looked a moment ago."""
        now = self._clock.monotonic()
        if self._look_at is not None and now < self._look_at:
            return
        gone, rest = self._participations.give_up_the_still(also_present=self._buffered)
        self._look_at = None if rest is None else now + min(_MOST_S, max(_LEAST_S, rest))
        self._tell(gone, "nothing was heard of it for as long as its deadline was")

    def wait_s(self) -> float | None:
        """After how many seconds to look again; None: nobody is awaited."""
        return None if self._look_at is None else max(0.0, self._look_at - self._clock.monotonic())

    def on_status(self, status: Status) -> None:
        self._tell(self._participations.on_status(status), "its device has forgotten it")

    def too_old(self, versions: int) -> Callable[[], None]:
        """Gives up, in the caller's transaction, whoever builds on a version before that one.

        Returns what tells of it, once that is durable.
        """
        gone = self._participations.give_up(versions)
        return lambda: self._tell(gone, "too many versions were made since it was offered")

    def _tell(self, gone: Sequence[ParticipationRow], why: str) -> None:
        for row in gone:
            self._port.emit("update.given_up", device=row.device, round=row.round, message=why)
        if gone:
            self._port.given_up([row.device for row in gone])
