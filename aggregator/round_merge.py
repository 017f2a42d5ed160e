"""The merge of a round whatever some of its updates are: the bad ones are set aside, and the rest is merged.

Nothing that was acknowledged is dropped without a word. What is set aside has its cause in its row, written
before the merge goes on without it, so that a server that was killed in between merges the same rest. Where
all are bad, or the fault is none of theirs, nobody can say what to leave out: the round is held as it is, and
tried again until whatever is wrong is cured.
"""

from __future__ import annotations

from collections.abc import Sequence

from aggregator.participations import Participations
from aggregator.round_port import Made, RoundsPort
from aggregator.state.base import ParticipationRow, VersionRow
from edge_sdk.clock import Clock
from edge_sdk.errors import EdgeError

__all__ = ["RoundMerge"]

_AGAIN_S, _MOST_AGAIN_S = 5.0, 60.0
"""When a merge that is held is tried again; doubles."""


class RoundMerge:
    """``held`` is why the present merge is held; None: it is not."""

    def __init__(self, participations: Participations, port: RoundsPort, clock: Clock) -> None:
        self.held: str | None = None
        self._participations = participations
        self._port = port
        self._clock = clock
        self._again_s = _AGAIN_S
        self._not_before = clock.monotonic()

    @property
    def wait_s(self) -> float | None:
        """After how many seconds a held merge is tried again."""
        return None if self.held is None else max(0.0, self._not_before - self._clock.monotonic())

    def made(
        self, number: int, round: int, chain: Sequence[VersionRow]
    ) -> tuple[Made, Sequence[ParticipationRow]] | None:
        """Version ``number``, and the updates that are in it; None: the merge is held.

        Raises OSError where the disk refuses the version.
        """
        if self.held is not None and self._clock.monotonic() < self._not_before:
            return None
        while True:
            received = self._participations.counted(round)
            try:
                made = self._port.merged_version(number, round, chain, received)
            except OSError:
                raise
            except Exception as error:  # of an update, of the rule, of a version's file: told below
                if not self._set_aside(error, number, round, chain, received):
                    return None
            else:
                self.held, self._again_s = None, _AGAIN_S
                return made, received

    def _set_aside(
        self,
        error: Exception,
        number: int,
        round: int,
        chain: Sequence[VersionRow],
        received: Sequence[ParticipationRow],
    ) -> bool:
        """Sets aside whatever of ``received`` is to blame; False: the merge is held."""
        try:
            bad = self._port.faults(number, chain, received)
        except Exception as other:  # the fault is none of theirs
            error, bad = other, {}
        if not bad or len(bad) == len(received):
            why = "; ".join(f"{row.device}: {cause}" for row, cause in bad.items()) or _words(error)
            self._hold(round, len(received), f"no update of it can be merged: {why}" if bad else why)
            return False
        self._participations.set_aside(bad)
        for row, cause in bad.items():
            self._port.emit(
                "update.set_aside", device=row.device, round=row.round, merge=round, message=cause
            )
        return True

    def _hold(self, round: int, updates: int, why: str) -> None:
        now = self._clock.monotonic()
        if self.held is not None:
            self._again_s = min(_MOST_AGAIN_S, 2 * self._again_s)
        self._not_before = now + self._again_s
        if self.held != why:
            self.held = why
            self._port.emit("round.held", round=round, updates=updates, message=why)


def _words(error: Exception) -> str:
    return error.message if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
