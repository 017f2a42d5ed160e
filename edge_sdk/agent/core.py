"""The agent's state machine: one inbox, one thread, three axes.

``handle`` takes one event, ``tick`` does what time alone brings about. Given the same events and clock both
do the same, so that a simulation drives an agent without threads. What a state does at an occasion is told
by the tables in ``states``.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import msgspec

from edge_sdk.agent.context import Context
from edge_sdk.agent.downloads import Downloads
from edge_sdk.agent.ending import Ending
from edge_sdk.agent.export import ask_export
from edge_sdk.agent.gating import Check, Gating
from edge_sdk.agent.inbox import (
    AgentEvent,
    ExportRequest,
    GateChanged,
    GatesAltered,
    Pause,
    Resume,
    Stop,
)
from edge_sdk.agent.joining import Joining
from edge_sdk.agent.measuring import LEDGER, Measuring
from edge_sdk.agent.record import disk_error
from edge_sdk.agent.reporting import live_state
from edge_sdk.agent.rounds import Rounds
from edge_sdk.agent.standing import Standing
from edge_sdk.agent.states import PERMISSION, Occasion
from edge_sdk.agent.uploads import Uploads
from edge_sdk.clock import next_within
from edge_sdk.errors import BrokerError, EdgeError, FingerprintError, ProtocolError
from edge_sdk.faults import reached
from edge_sdk.protocol.base import PROTOCOL
from edge_sdk.protocol.frames import decode_chunk, is_chunk
from edge_sdk.protocol.wire import (
    AggregatorState,
    DeclineReason,
    Have,
    Offer,
    Pong,
    Receipt,
    Refusal,
    Run,
    decode,
)
from edge_sdk.transport.base import Connection, Inbound, Will

__all__ = ["Core"]

_LONGEST_S = 60.0
_BATCH = 16
"""Events handled before time is looked at again."""


class Core:
    """See the module. ``start`` connects; then feed ``handle`` and ``tick``, or let ``run`` do it.

    Args:
        give_up_s: end with BrokerError after so long without a broker; None: try for ever.
        gates: an app's own, by name, besides those of the config.
    """

    def __init__(
        self, context: Context, *, give_up_s: float | None = None, gates: Mapping[str, Check] | None = None
    ) -> None:
        self.context = context
        self.inbox: queue.SimpleQueue[AgentEvent] = queue.SimpleQueue()
        self.joining = Joining(context, self.fail, patient=give_up_s is None)
        self.downloads = Downloads(context)
        self.uploads = Uploads(context)
        self.rounds = Rounds(context, self.joining, self.downloads, self.uploads)
        self.standing = Standing(context, self.joining, self.rounds)
        self.gating = Gating(context, {} if gates is None else gates)
        self.measuring = Measuring(context, self._report)
        self.ending = Ending(context, self.joining, self.rounds, self.downloads, self.fail, give_up_s)
        self.aggregator: AggregatorState | None = None
        self.error: EdgeError | None = None
        self.done = False
        self._give_up_s = give_up_s
        self._down_since: float | None = context.clock.monotonic()
        self._run_seen = False
        self._ever_up = False
        self._exports: deque[Future[Path]] = deque()
        self._trouble = ""
        self._live = b""

    # -- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connects. Raises what the transport raises for a broker that must not be used."""
        context, topics = self.context, self.context.topics
        for topic in (topics.run, topics.aggregator, topics.reply(context.device)):
            context.transport.subscribe(topic)
        context.desk.trainer.start(self.inbox.put)
        context.transport.start(
            self.inbox.put, Will(topics.presence(context.device), self.standing.presence(False))
        )
        context.emit("agent.started", device=context.device, session=context.session,
                     broker=context.transport.description)  # fmt: skip
        self._look_at_gates(context.clock.monotonic())

    def run(self) -> None:
        """Handles events until the agent is stopped or fails."""
        clock = self.context.clock
        while not self.done:
            due = self.tick(clock.monotonic())
            wait = _LONGEST_S if due is None else min(_LONGEST_S, max(0.0, due - clock.monotonic()))
            self.pump(wait, _BATCH)

    def pump(self, wait_s: float = 0.0, most: int | None = None) -> None:
        """Handles what is in the inbox, and what that brings about; waits for the first so long."""
        handled = 0
        while not self.done and handled != most:
            try:
                event = next_within(self.inbox, 0.0 if handled else wait_s)
            except queue.Empty:
                return
            handled += 1
            self.handle(event)

    def close(self) -> None:
        """Says goodbye and lets go of everything. May be called twice, from any thread once ``run`` ended."""
        self.done = True
        context = self.context
        reached("agent.leaving")
        with contextlib.suppress(EdgeError):
            self.standing.be_present(False)
        context.transport.stop()
        context.desk.trainer.close()
        self.downloads.close()
        for waiting in self._exports:
            waiting.cancel()
        self._keep_live()
        context.record.close()

    def fail(self, error: EdgeError) -> None:
        """Ends the agent: trying again cannot help."""
        if self.error is None:
            self.error = error
            self.context.emit(
                "agent.failed", error=type(error).__name__, message=error.message, hint=error.hint
            )
        self._occasion("stop")

    # -- events ---------------------------------------------------------------------------------------

    def handle(self, event: AgentEvent) -> None:
        """Takes one event. Never raises for what came from outside."""
        try:
            self._dispatch(event)
            self._settle(self.context.clock.monotonic())
        except ProtocolError as error:
            self.context.emit("problem", message=error.message, hint=error.hint)
        except EdgeError as error:
            self.fail(error)
        except (OSError, sqlite3.Error) as error:
            self.fail(disk_error(self.context.folder, error))
        self._keep_live()

    def tick(self, now: float) -> float | None:
        """Does what is due. Returns the monotonic time at which to call again; None: at the next event."""
        if self.done:
            return None
        try:
            gates_due = self._look_at_gates(now)
            times = [gates_due, self._settle(now), self.context.desk.tick(now), self._patience(now)]
        except EdgeError as error:
            self.fail(error)
            times = []
        except (OSError, sqlite3.Error) as error:
            self.fail(disk_error(self.context.folder, error))
            times = []
        self._keep_live()
        return min((time for time in times if time is not None), default=None)

    def _dispatch(self, event: AgentEvent) -> None:
        match event:
            case Inbound():
                self._on_message(event)
            case Connection():
                self._on_connection(event)
            case Pause():
                self._occasion("pause")
            case Resume():
                self._occasion("resume")
                if self.context.gate is not None:
                    self._occasion("gate-failed")
            case Stop():
                self._occasion("stop")
            case GateChanged():
                self._on_gate(event.reason)
            case GatesAltered():
                self.gating.hurry()
            case ExportRequest():
                self._exports.append(event.result)
            case _:
                self.context.desk.on_reply(event)

    def _occasion(self, occasion: Occasion) -> None:
        """All axes react, each by its table."""
        context, before = self.context, self.context.permission
        reaction = PERMISSION[before].on[occasion]
        if reaction.action == "enter":
            for state in PERMISSION:
                if state == reaction.to:
                    context.permission = state
            context.emit("agent.permission", permission=context.permission, reason=context.gate or "")
        self.rounds.react(occasion)
        self.uploads.react(occasion, context.clock.monotonic())
        if context.permission == "stopped":
            self.done = True
        elif context.permission != before:
            if context.permission != "running" and context.desk.task in ("describe", "probe"):
                context.desk.interrupt()
            self._report()

    def _look_at_gates(self, now: float) -> float | None:
        """Before anything else is done. Returns when to look again."""
        due = self.gating.due(now)
        if due is not None and due <= now:
            reason = self.gating.look(now)
            if reason != self.context.gate:
                self._on_gate(reason)
        return self.gating.due(now)

    def _on_gate(self, reason: str | None) -> None:
        context, before = self.context, (self.context.permission, self.context.gate)
        context.gate = reason
        self._occasion("gate-passed" if reason is None else "gate-failed")
        if context.permission == "gated" == before[0] and reason != before[1]:
            self._report()  # gated for another reason now

    def _on_connection(self, event: Connection) -> None:
        context = self.context
        if event.up:
            self._down_since, self._ever_up = None, True
            context.emit("connection.up", broker=context.transport.description)
            self.standing.be_present()
            return
        hopeless = event.final and (self._give_up_s is not None or not self._ever_up)
        if hopeless and isinstance(event.error, EdgeError):
            self.fail(event.error)
            return
        if self._down_since is None:
            self._down_since = context.clock.monotonic()
        context.emit("connection.down", broker=context.transport.description, error=str(event.error or ""))
        self._run_seen, self.aggregator = False, None

    def _on_message(self, event: Inbound) -> None:
        context, now = self.context, self.context.clock.monotonic()
        chunk = decode_chunk(event.payload) if is_chunk(event.payload) else None
        probe = chunk is not None and self.measuring.on_chunk(chunk, now)
        context.traffic.count(LEDGER if probe else context.nonce, bytes_down=len(event.payload))
        if chunk is not None:
            if not probe:
                self.downloads.on_chunk(chunk, now)
            return
        record = decode(event.payload)
        match record:
            case Run():
                self.joining.on_run(record)
                self._run_seen = True
            case AggregatorState():
                self._on_aggregator(record)
            case Offer():
                self._on_offer(record)
            case Have(device=context.device):
                self.uploads.on_have(record, now)
            case Receipt(device=context.device):
                self.uploads.on_receipt(record)
            case Refusal(device=context.device):
                self._on_refusal(record, now)
            case Pong(device=context.device):
                self.measuring.on_pong(record, now)
            case _:
                raise ProtocolError(f"a {type(record).__name__} record has no place on topic {event.topic}")

    def _on_aggregator(self, state: AggregatorState) -> None:
        if state.protocol != PROTOCOL:
            raise ProtocolError(f"the aggregator speaks protocol {state.protocol}, this agent {PROTOCOL}")
        before, self.aggregator = self.aggregator, state
        if before is not None and before.epoch != state.epoch and self.context.reachable:
            # It started anew, and we never saw it leave.
            self.context.reachable = False
            self._occasion("disconnect")
        self.context.emit("aggregator.state", ready=state.ready, round=state.round, rounds=state.rounds,
                          version=None if state.version is None else state.version.number,
                          finished=state.finished, reason=state.reason)  # fmt: skip

    def _on_offer(self, offer: Offer) -> None:
        context, run = self.context, self.joining.run
        if run is None or offer.run != run.run or not self.joining.ready:
            context.emit("offer.ignored", round=offer.round, run=offer.run)
            return
        occasion = self.rounds.on_offer(offer)
        if occasion is None:
            return
        if PERMISSION[context.permission].on[occasion].action == "refuse":
            self.rounds.refuse(offer, *self._why_not())
        elif PERMISSION[context.permission].on[occasion].action == "pass":
            self.rounds.react(occasion, offer=offer)

    def _why_not(self) -> tuple[DeclineReason, str]:
        if self.context.permission == "gated":
            return "gate", f"closed gates: {self.context.gate}"
        return "paused", "the device is paused"

    def _on_refusal(self, refusal: Refusal, now: float) -> None:
        if refusal.object is not None:
            if self.uploads.on_refusal(refusal, now):
                self.rounds.retrain()
            return
        if refusal.reason == "fingerprint":
            self.fail(FingerprintError(f"{refusal.message}: {', '.join(refusal.parts)}", refusal.hint))
        elif refusal.reason in ("protocol", "identity"):
            self.fail(ProtocolError(refusal.message, refusal.hint))
        else:
            self.context.emit("problem", message=refusal.message, hint=refusal.hint)

    # -- what follows ---------------------------------------------------------------------------------

    def _settle(self, now: float) -> float | None:
        """Takes every step whose conditions hold. Returns when to look again."""
        if self.done:
            return None
        before = self.context.nonce
        join_due = self.joining.advance(may_start=self.context.permission == "running")
        if self.context.nonce != before:
            self._new_run()
        self._reach()
        if self.joining.trouble != self._trouble:
            self._trouble = self.joining.trouble
            self._report()
        times = [join_due, self.rounds.advance(now), self.downloads.tick(now), self.uploads.pump(now)]
        times.append(self.ending.follow(self.aggregator, self._report, now))
        times.append(self.standing.tick(self.aggregator, now))
        quiet = self.rounds.state == "idle" and not self.uploads.items
        heard = self.aggregator if self._down_since is None and self._run_seen else None
        times.append(self.measuring.tick(heard, quiet=quiet, now=now))
        if self._exports and not self.context.desk.busy:
            ask_export(self.context, self.joining, self._exports.popleft())
        return min((time for time in times if time is not None), default=None)

    def _new_run(self) -> None:
        """The record is about another run now."""
        self.rounds.clear()
        self.uploads.reload()
        self.downloads.keep_only(())
        self.context.store.sweep(self.context.record.objects())
        self.ending.clear()

    def _reach(self) -> None:
        """Whether what is said now is heard; on the way up everything is said that may have been missed."""
        context = self.context
        reachable = (
            self._down_since is None
            and self._run_seen
            and self.joining.tells
            and self.aggregator is not None
            and self.aggregator.ready
        )
        if reachable == context.reachable:
            return
        context.reachable = reachable
        if reachable:
            # Again: an aggregator that was not ready, or a broker that forgot, may have missed it.
            self.standing.be_present()
            self._report()
            self.downloads.connected(context.clock.monotonic())
        self._occasion("connect" if reachable else "disconnect")

    def _report(self) -> None:
        self.standing.report()

    def _patience(self, now: float) -> float | None:
        if self._give_up_s is None or self._down_since is None:
            return None
        until = self._down_since + self._give_up_s
        if now >= until:
            self.fail(
                BrokerError(
                    f"no connection to {self.context.transport.description} for {self._give_up_s:g} s",
                    "check broker.url, and that the broker runs",
                )
            )
        return until

    def _keep_live(self) -> None:
        """What ``edge-agent status`` shows of a running agent, whenever it changed."""
        live = msgspec.json.encode(
            live_state(self.context, self.joining, self.rounds, self.aggregator, self.error)
        )
        if live != self._live:
            self._live = live
            with self.context.record.counting():
                self.context.record.put("live", live.decode())
