"""What the aggregator should know of this device, said again, since anything said once may be lost."""

from __future__ import annotations

import random

from edge_sdk.agent.context import Context
from edge_sdk.agent.joining import Joining
from edge_sdk.agent.reporting import status_record
from edge_sdk.agent.rounds import Rounds
from edge_sdk.faults import reached
from edge_sdk.protocol.wire import AggregatorState, Presence, encode

__all__ = ["Standing"]

_REPEAT_S = 300.0
"""Presence and status are said again after about so long; a round that no offer came for, after a tenth."""


class Standing:
    """Presence and status: at once where something changed, and every few minutes all the same.

    Status goes out when the device became idle, and some seconds after a round began that it has no offer
    of: the aggregator then offers again what was lost.
    """

    def __init__(self, context: Context, joining: Joining, rounds: Rounds) -> None:
        self._context = context
        self._joining = joining
        self._rounds = rounds
        self._due = float("inf")
        self._was_idle = True
        self._round = 0
        # Devices that were started together must not speak together.
        self._random = random.Random(f"{context.device} {context.session}")  # noqa: S311

    def presence(self, online: bool) -> bytes:
        from edge_sdk import __version__

        context = self._context
        return encode(
            Presence(device=context.device, online=online, session=context.session, sdk=__version__)
        )

    def be_present(self, online: bool = True) -> None:
        context = self._context
        context.publish(context.topics.presence(context.device), self.presence(online), retain=True)

    def report(self) -> None:
        """Says the status as of now, where somebody hears it."""
        context = self._context
        self._due = context.clock.monotonic() + self._about(_REPEAT_S)
        self._was_idle = self._rounds.state == "idle"
        status = status_record(context, self._joining, self._rounds.position())
        if status is not None and context.say(status):
            reached("status.said")
            context.emit(
                "agent.reported", permission=status.permission, reason=status.reason, holds=list(status.holds)
            )  # fmt: skip

    def tick(self, aggregator: AggregatorState | None, now: float) -> float | None:
        """Reports where it is time to. Returns when to look again."""
        context = self._context
        if not context.reachable or aggregator is None:
            return None
        if self._rounds.state != "idle":
            self._was_idle = False
        elif not self._was_idle:
            self.report()
        if aggregator.round > self._round and context.record.round(context.nonce, aggregator.round) is None:
            self._due = min(self._due, now + self._about(_REPEAT_S / 10))
        self._round = aggregator.round
        if now >= self._due:
            self.be_present()
            self.report()
        return self._due

    def _about(self, seconds: float) -> float:
        return seconds * self._random.uniform(0.75, 1.25)
