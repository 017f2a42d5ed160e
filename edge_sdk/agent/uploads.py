"""Sending what is in the outbox, until each item has its receipt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from msgspec.structs import replace as change

from edge_sdk.agent.budgets import keep_rate, link_now
from edge_sdk.agent.context import Context
from edge_sdk.agent.record import Owed
from edge_sdk.agent.states import ITEM, ItemState, Occasion
from edge_sdk.errors import StateError
from edge_sdk.faults import reached
from edge_sdk.protocol.frames import HEADER_BYTES, transfer_id
from edge_sdk.protocol.wire import Announce, Have, Receipt, Refusal
from edge_sdk.transport.outbox import OutboxItem
from edge_sdk.transport.sending import ObjectSender

__all__ = ["Uploads"]

_QUERY_S = 2.0
_MOST_QUERY_S = 60.0
_STORAGE_S = 60.0
_CORRUPT_TRIES = 3
_PLACE = ("run", "round", "version", "identity", "protocol")
"""Refusals that say nothing against an update's content: what it holds is owed."""

Key = tuple[str, int]


@dataclass
class _Transfer:
    sender: ObjectSender
    heard: float
    """When something last happened."""
    patience: float = _QUERY_S
    corrupt: int = 0


class Uploads:
    """The transfers of all outbox items; their states are in the record."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._transfers: dict[Key, _Transfer] = {}
        self._items: dict[Key, OutboxItem] = {}
        self.reload()

    @property
    def items(self) -> list[OutboxItem]:
        return list(self._items.values())

    def react(self, occasion: Occasion, now: float) -> None:
        """What the table of items says, for every item."""
        for item in self.items:
            reaction = ITEM[item.state].on[occasion]
            if reaction.action in ("requeue", "announce"):
                transfer = self._transfer(item, now)
                transfer.sender.mark_lost()
                if reaction.to is not None:
                    self._set_state(item, "queued")
            if reaction.action == "announce":
                self._repeat_choice(item)
                self.announce(item, now)

    def _repeat_choice(self, item: OutboxItem) -> None:
        """A choice made while nobody heard it comes before the update that it led to."""
        row = self._context.record.round(self._context.nonce, item.announce.round)
        if row is not None and row.answer is not None:
            self._context.say(row.answer)

    def added(self, run: str, number: int, now: float) -> None:
        """A new item is in the record."""
        self.reload()
        self.announce(self._items[run, number], now)

    def find(self, run: str, number: int) -> OutboxItem | None:
        return self._items.get((run, number))

    def announce(self, item: OutboxItem, now: float) -> None:
        transfer = self._transfer(item, now)
        transfer.heard = now
        self._context.say(_announce(item))
        reached("update.announced")

    def on_have(self, have: Have, now: float) -> None:
        """Credit for one of the items. Raises ProtocolError where it does not fit."""
        item = self._by_object(have.object)
        if item is None:
            return
        transfer = self._transfer(item, now)
        transfer.sender.on_have(have, now)
        transfer.heard, transfer.patience = now, _QUERY_S
        done = transfer.sender.complete
        self._set_state(item, "awaiting-receipt" if done else "sending")
        if done:
            reached("update.sent")
        if done and item.state != "awaiting-receipt" and transfer.sender.rate_bps is not None:
            keep_rate(self._context, "up", transfer.sender.rate_bps)

    def on_receipt(self, receipt: Receipt) -> None:
        item = self._items.get((receipt.run, receipt.round))
        if item is None or item.announce.object != receipt.object:
            return
        reached("receipt.come")
        resent = self._forget(item, "received")
        self._context.emit(
            "update.receipt", round=receipt.round, bytes=item.announce.bytes, bytes_resent=resent
        )

    def on_refusal(self, refusal: Refusal, now: float) -> bool:
        """True: the residual was cleared, since the content of an update was refused."""
        item = self._by_object(refusal.object) if refusal.object is not None else None
        if item is None:
            return False
        transfer = self._transfer(item, now)
        self._context.emit(
            "update.refused", round=item.announce.round, reason=refusal.reason, message=refusal.message,
            hint=refusal.hint,
        )  # fmt: skip
        transfer.sender.mark_lost()
        if refusal.reason == "storage":
            transfer.heard, transfer.patience = now, _STORAGE_S
            self._set_state(item, "queued")
            return False
        if refusal.reason == "corrupt" and transfer.corrupt + 1 < _CORRUPT_TRIES:
            transfer.corrupt += 1
            self._set_state(item, "queued")
            self.announce(item, now)
            return False
        if refusal.reason in _PLACE:
            self._forget(item, "owed", owed=True)
            return False
        if refusal.reason == "duplicate":
            # Another update of this round counts: nothing is owed, and nothing was wrong with this one.
            self._forget(item, "dropped")
            return False
        self._forget(item, "dropped", clear_residual=True)
        return True

    def pump(self, now: float) -> float | None:
        """Sends what may go, and asks where nothing was heard. Returns when to look again."""
        if not self._context.reachable:
            return None
        times = [time for item in self.items if (time := self._pump_item(item, now)) is not None]
        return min(times, default=None)

    def _pump_item(self, item: OutboxItem, now: float) -> float | None:
        transfer = self._transfer(item, now)
        sender, context = transfer.sender, self._context
        if context.transport.busy:
            sender.still_leaving(now)
        while not sender.complete:
            wait = context.bucket.wait(item.announce.chunk_bytes + HEADER_BYTES)
            if wait > 0:
                if item.state == "sending":
                    transfer.heard = now
                    return now + wait
                break
            if not context.may_move(item.announce.chunk_bytes + HEADER_BYTES):
                transfer.heard = now
                return now + context.traffic.tomorrow_s
            try:
                frame = sender.next_frame(now)
            except StateError as error:
                # The file is gone from under us: there is nothing left to send or to owe.
                context.emit("problem", message=error.message, hint=error.hint)
                self._forget(item, "dropped", clear_residual=True)
                return None
            if frame is None:
                break
            self._send(item, frame)
            transfer.heard = now
        if now >= transfer.heard + transfer.patience:
            transfer.patience = min(_MOST_QUERY_S, 2 * transfer.patience)
            self.announce(self._items[item.key], now)
        due = sender.due(now)
        query = transfer.heard + transfer.patience
        return query if due is None else min(due, query)

    def _send(self, item: OutboxItem, frame: bytes) -> None:
        """Counted before it goes: a crash in between counts too much rather than too little."""
        context, size = self._context, len(frame) - HEADER_BYTES
        with context.record.counting():
            context.record.outbox.count_sent(*item.key, size, 1)
        reached("chunk.counted")
        before = self._items[item.key]
        self._items[item.key] = replace(
            before, bytes_sent=before.bytes_sent + size, chunks_sent=before.chunks_sent + 1
        )
        context.publish(context.topics.bulk(context.device), frame, chunks_up=1, chunk_bytes_up=size)
        reached("chunk.sent")

    def _transfer(self, item: OutboxItem, now: float) -> _Transfer:
        transfer = self._transfers.get(item.key)
        if transfer is None:
            announce = item.announce
            name = transfer_id(
                self._context.config.broker.namespace, announce.device,
                f"up/{announce.run}/{announce.round}", announce.object,
            )  # fmt: skip
            path = self._context.store.path(announce.object)
            sender = ObjectSender(
                name, path, announce.bytes, announce.chunk_bytes, rate_bps=link_now(self._context).up_bps
            )
            transfer = _Transfer(sender, now)
            self._transfers[item.key] = transfer
        return transfer

    def _by_object(self, digest: str) -> OutboxItem | None:
        return next((item for item in self.items if item.announce.object == digest), None)

    def _set_state(self, item: OutboxItem, state: ItemState) -> None:
        if self._items[item.key].state == state:
            return
        with self._context.record.transaction():
            self._context.record.outbox.set_state(*item.key, state)
        self._items[item.key] = replace(self._items[item.key], state=state)
        self._context.emit("update.state", round=item.announce.round, state=state)

    def _forget(
        self, item: OutboxItem, outcome: str, *, owed: bool = False, clear_residual: bool = False
    ) -> int:
        """The item's end, whatever it is. Returns how many bytes went out more than once."""
        record, announce = self._context.record, item.announce
        resent = max(0, self._items[item.key].bytes_sent - announce.bytes)
        with record.transaction():
            record.outbox.remove(*item.key)
            row = record.round(self._context.nonce, announce.round)
            if row is not None:
                record.save_round(change(row, outcome=outcome, resent=resent))
                owed = owed and row.offer.spec.error_feedback
            if owed:
                record.add_owed(Owed(object=announce.object, round=announce.round))
            if clear_residual:
                record.put("residual", None)
            record.count(self._context.nonce, bytes_resent=resent, **{f"updates_{outcome}": 1})
        reached("receipt.kept")
        del self._items[item.key]
        self._transfers.pop(item.key, None)
        if not owed:
            self._context.store.remove(announce.object)
        return resent

    def reload(self) -> None:
        """Takes the items as the record has them."""
        self._items = {item.key: item for item in self._context.record.outbox.items()}
        self._transfers = {key: one for key, one in self._transfers.items() if key in self._items}


def _announce(item: OutboxItem) -> Announce:
    return change(item.announce, sent_bytes=item.bytes_sent)
