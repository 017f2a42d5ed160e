"""The running agent's link, measured on purpose: when it joins, and again when what is known grew old.

A bounded number of bytes (``limits.link_probe_mb``) goes through the broker while nothing else of the agent's
does; a round that begins meanwhile has the link for itself, and it is measured another time. It counts as the
day's traffic, not as the run's. What transfers show later refines it, and keeps it from growing old.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from edge_sdk.agent.context import Context
from edge_sdk.agent.link import keep_link, kept_link
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.frames import Chunk, link_transfer
from edge_sdk.protocol.wire import AggregatorState, Pong, encode
from edge_sdk.transport.link_meter import LinkMeter

__all__ = ["LEDGER", "Measuring"]

LEDGER = "link probe"
"""Whose traffic this is, in place of a run's."""

_OLD_S = 86_400.0
_AGAIN_S = 600.0
"""After a measurement that did not show all, or had to make room; doubled each time, up to a day."""
_DAYS_SHARE = 0.1
"""Of what may still go over the link today, the most that a measurement takes."""


class Measuring:
    """``tick`` begins and drives it; frames and answers are handed in.

    Args:
        report: called when something was measured.
    """

    def __init__(self, context: Context, report: Callable[[], None]) -> None:
        self._context, self._report = context, report
        self._transfer = link_transfer(context.config.broker.namespace, context.device)
        self._meter: LinkMeter | None = None
        self._wait_s = _AGAIN_S
        # Devices that were refused together must not ask together again.
        self._random = Random(f"link {context.device} {context.session}")  # noqa: S311

    def tick(self, state: AggregatorState | None, *, quiet: bool, now: float) -> float | None:
        """Does what is due. Returns when to look again.

        Args:
            state: what the aggregator last said; None: it is not heard.
            quiet: the agent has no other use of the link.
        """
        if state is None or not state.ready or not quiet or self._context.permission != "running":
            self._meter = None
            return None
        if self._meter is None:
            due = self._due(state, now)
            if due is None or due > now:
                return due
            self._meter = self._begin(state)
        due = self._meter.tick(now)
        if not self._meter.done:
            return due
        meter, self._meter = self._meter, None
        self._end(meter)
        return self._due(state, now)

    def on_chunk(self, chunk: Chunk, now: float) -> bool:
        """Whether the frame is one of a measurement, be it an earlier one."""
        if chunk.transfer != self._transfer:
            return False
        if self._meter is not None:
            self._meter.on_chunk(chunk, now)
        return True

    def on_pong(self, pong: Pong, now: float) -> None:
        if self._meter is not None:
            self._meter.on_pong(pong, now)

    def _due(self, state: AggregatorState, now: float) -> float | None:
        """When to measure; None: there is nothing to measure with, or no need for now."""
        if self._way_bytes(state) <= 0:
            return None
        link, at = kept_link(self._context.record)
        whole = link.rtt_ms is not None and link.up_bps is not None and link.down_bps is not None
        tried = float(self._context.record.get("link.tried") or 0.0)
        since, wait = (at, _OLD_S) if whole else (tried, self._wait_s)
        age = self._context.clock.wall() - since
        return (
            now + max(0.0, wait - age) if age >= 0 else now
        )  # the clock was set back: nothing is told by it

    def _way_bytes(self, state: AggregatorState) -> int:
        """Payload each way: the owner's bound, the aggregator's, and a part of the day's allowance."""
        allowed = min(
            1e6 * self._context.config.limits.link_probe_mb, _DAYS_SHARE * self._context.traffic.left
        )
        return int(min(allowed / 2, state.link_bytes))

    def _begin(self, state: AggregatorState) -> LinkMeter:
        context, topics = self._context, self._context.topics
        context.record.put("link.tried", str(context.clock.wall()))
        self._wait_s = min(_OLD_S, self._random.uniform(1.5, 2.5) * self._wait_s)
        return LinkMeter(
            context.config.broker.namespace,
            context.device,
            say=lambda record: self._send(topics.control(context.device), record),
            send=lambda frame: self._publish(topics.bulk(context.device), frame),
            wait=context.bucket.wait,
            most_bytes=self._way_bytes(state),
        )

    def _send(self, topic: str, record: Record) -> bool:
        return self._publish(topic, encode(record))

    def _publish(self, topic: str, payload: bytes) -> bool:
        context = self._context
        if not context.transport.publish(topic, payload):
            return False
        context.bucket.spend(len(payload))
        context.traffic.count(LEDGER, bytes_up=len(payload))
        return True

    def _end(self, meter: LinkMeter) -> None:
        context, link = self._context, meter.link
        context.emit(
            "link.measured", up_bps=link.up_bps, down_bps=link.down_bps, rtt_ms=link.rtt_ms,
            bytes_up=meter.bytes_up, bytes_down=meter.bytes_down, reasons=meter.reasons,
        )  # fmt: skip
        if link.source == "measured":
            keep_link(context.record, link, context.clock.wall())
            if not meter.reasons:
                self._wait_s = _AGAIN_S
            self._report()
