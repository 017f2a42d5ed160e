"""Fetching versions of the global adapter: the device asks, the aggregator answers with chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_sdk.agent.budgets import keep_rate
from edge_sdk.agent.context import Context
from edge_sdk.errors import ContainerError
from edge_sdk.faults import reached
from edge_sdk.protocol.frames import Chunk, transfer_id
from edge_sdk.protocol.wire import Have, VersionRef
from edge_sdk.transport.chunks import chunk_count
from edge_sdk.transport.receiving import ObjectReceiver, sweep_partials

__all__ = ["Downloads"]

_ASK_S = 2.0
_MOST_ASK_S = 60.0
_GATHER_S = 0.05
"""Chunks are acknowledged, and so synced, half a window at a time; fewer after so long."""


@dataclass
class _Fetch:
    ref: VersionRef
    receiver: ObjectReceiver
    chunk_bytes: int
    window: int
    began: float
    held_before: int
    asked: float
    patience: float = _ASK_S
    gather_until: float | None = None
    """When chunks that wait for others are acknowledged at the latest."""

    @property
    def due(self) -> float:
        asks = self.asked + self.patience
        return asks if self.gather_until is None else min(asks, self.gather_until)


class Downloads:
    """The objects on their way to this device. What arrived of them survives a restart."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._folder = context.folder / "incoming"
        self._fetches: dict[bytes, _Fetch] = {}

    def want(self, refs: Iterable[VersionRef], chunk_bytes: int, window: int) -> bool:
        """Whether all of these are held; begins to fetch those that are not."""
        context, refs = self._context, list(refs)
        for ref in refs:
            if context.store.has(ref.object):
                if context.record.versions().get(ref.number) != ref:
                    self._adopt(ref)
                continue
            transfer = transfer_id(context.config.broker.namespace, context.device, "down", ref.object)
            if transfer not in self._fetches:
                receiver = ObjectReceiver.open(self._folder, ref.object, ref.bytes, chunk_bytes)
                now = context.clock.monotonic()
                fetch = _Fetch(ref, receiver, chunk_bytes, window, now, receiver.received_bytes, now)
                self._fetches[transfer] = fetch
                self._ask(fetch, now)
                reached("fetch.begun")
                if receiver.complete:
                    self._finish(transfer, fetch)
        return all(context.store.has(ref.object) for ref in refs)

    def keep_only(self, refs: Iterable[VersionRef]) -> None:
        """Gives up what is fetched for nobody any more."""
        wanted = {ref.object for ref in refs}
        for transfer, fetch in list(self._fetches.items()):
            if fetch.ref.object not in wanted:
                self._fetches.pop(transfer).receiver.close()
        sweep_partials(self._folder, wanted)

    def connected(self, now: float) -> None:
        """Somebody hears again: ask again."""
        for fetch in self._fetches.values():
            fetch.patience = _ASK_S
            self._ask(fetch, now)

    def on_chunk(self, chunk: Chunk, now: float) -> None:
        """Raises ProtocolError for a chunk that does not fit its object, StateError for a full disk."""
        fetch = self._fetches.get(chunk.transfer)
        if fetch is None:
            self._answer_stray(chunk)
            return
        if fetch.receiver.accept(chunk):
            reached("fetch.chunk")
            fetch.patience = _ASK_S
        if fetch.receiver.complete:
            self._ask(fetch, now)
            self._finish(chunk.transfer, fetch)
        elif fetch.receiver.unsynced != 0 and 2 * fetch.receiver.unsynced < fetch.window:
            fetch.gather_until = fetch.gather_until or now + _GATHER_S
        else:
            self._ask(fetch, now)

    def tick(self, now: float) -> float | None:
        """Asks again where nothing came for a while. Returns when to look again."""
        if not self._context.reachable or not self._fetches:
            return None
        for fetch in self._fetches.values():
            if fetch.gather_until is not None and now >= fetch.gather_until:
                self._ask(fetch, now)
            elif now >= fetch.asked + fetch.patience:
                fetch.patience = min(_MOST_ASK_S, 2 * fetch.patience)
                self._ask(fetch, now)
        return min(fetch.due for fetch in self._fetches.values())

    def close(self) -> None:
        for fetch in self._fetches.values():
            fetch.receiver.close()

    def _answer_stray(self, chunk: Chunk) -> None:
        """A chunk of what is held: that it arrived was not heard. Of what nobody wants: the sender tires."""
        context = self._context
        for ref in context.record.versions().values():
            name = transfer_id(context.config.broker.namespace, context.device, "down", ref.object)
            if name == chunk.transfer and context.store.has(ref.object):
                size = chunk.offset // chunk.index if chunk.index else max(1024, len(chunk.payload))
                whole = ((0, chunk_count(ref.bytes, size)),)
                context.say(
                    Have(device=context.device, object=ref.object, bytes=ref.bytes, chunk_bytes=size,
                         ranges=whole)
                )  # fmt: skip

    def _ask(self, fetch: _Fetch, now: float) -> None:
        fetch.asked, fetch.gather_until = now, None
        missing = fetch.ref.bytes - fetch.receiver.received_bytes
        if missing and not self._context.may_move(min(missing, fetch.window * fetch.chunk_bytes)):
            return  # asked again in a while, and answered tomorrow
        self._context.say(fetch.receiver.have(self._context.device, fetch.window))

    def _finish(self, transfer: bytes, fetch: _Fetch) -> None:
        context, now = self._context, self._context.clock.monotonic()
        del self._fetches[transfer]
        reached("fetch.whole")
        try:
            fetch.receiver.finish(context.store)
        except ContainerError as error:
            # Removed; ``want`` begins anew.
            context.emit("problem", message=error.message, hint=error.hint)
            return
        bytes_new = fetch.ref.bytes - fetch.held_before
        if now > fetch.began and bytes_new == fetch.ref.bytes:
            keep_rate(context, "down", 8 * bytes_new / (now - fetch.began))
        self._adopt(fetch.ref)

    def _adopt(self, ref: VersionRef) -> None:
        reached("fetch.kept")
        with self._context.record.transaction():
            self._context.record.add_version(ref)
        reached("version.held")
        self._context.emit("version.held", version=ref.number, bytes=ref.bytes)
