"""What devices say: each message to the room that it is for. Whatever it is, the server lives on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from aggregator.echo import Echo
from aggregator.fleet import Fleet
from aggregator.intake import Intake
from aggregator.rounds import Rounds
from aggregator.transfers import Downloads, Ledger, Uploads
from edge_sdk.clock import Clock
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.frames import decode_chunk, is_chunk
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.wire import Announce, Choice, Decline, Have, Ping, Presence, Status, decode
from edge_sdk.transport.base import Inbound

__all__ = ["Reception"]

_log = logging.getLogger(__name__)


class Reception:
    """Takes messages apart. A message that is no use is counted and told, and changes nothing else."""

    def __init__(
        self,
        topics: Topics,
        fleet: Fleet,
        rounds: Rounds,
        intake: Intake,
        uploads: Uploads,
        downloads: Downloads,
        echo: Echo,
        ledger: Ledger,
        clock: Clock,
        send: Callable[[str, Record], bool],
        emit: Callable[..., None],
    ) -> None:
        self._topics = topics
        self._fleet = fleet
        self._rounds = rounds
        self._intake = intake
        self._uploads = uploads
        self._downloads = downloads
        self._echo = echo
        self._ledger = ledger
        self._clock = clock
        self._say = send
        self._emit = emit
        self._foreign: Counter[str] = Counter()

    def on_message(self, message: Inbound) -> None:
        """Raises EdgeError only for what is wrong with the server itself."""
        device = "-"
        try:
            address = self._topics.parse(message.topic)
            if address.device is None or not message.payload:  # an empty one clears a retained message
                return
            if address.device in self._fleet:
                device = address.device
            if address.channel == "bulk":
                self._on_frame(address.device, message.payload)
            else:
                self._on_record(address.device, decode(message.payload))
        except ProtocolError as error:
            self._on_foreign(device, message.topic, error.message)
        except (ValueError, ArithmeticError) as error:
            # A figure that the contract admits and something behind it does not: one message is lost.
            _log.warning("a message of %s could not be worked on", device, exc_info=True)
            self._on_foreign(device, message.topic, f"{type(error).__name__}: {error}")

    def _on_frame(self, device: str, payload: bytes) -> None:
        if not is_chunk(payload):
            raise ProtocolError("not a chunk frame")
        chunk = decode_chunk(payload)
        if self._echo.on_chunk(device, chunk):
            return  # also of one that only measures, and takes no part
        if not self._intake.on_chunk(device, chunk):
            raise ProtocolError("a chunk of no upload under way")
        self._rounds.participations.progress.moved(device)
        self._heard(device)

    def _on_record(self, device: str, record: Any) -> None:
        now = self._clock.monotonic()
        if isinstance(record, Announce):
            self._heard(device)
            self._intake.on_announce(record, device, now)
            return
        if getattr(record, "device", device) != device:
            raise ProtocolError(f"device {device!r} sent a {type(record).__name__} in another one's name")
        if isinstance(record, Ping):
            self._echo.on_ping(device, record)
            return
        match record:
            case Presence():
                self._on_presence(record)
            case Status():
                self._on_status(record)
            case Choice():
                self._on_choice(record)
            case Decline():
                if self._rounds.participations.on_decline(record):
                    self._uploads.forget(device)
                    self._emit(
                        "round.decline",
                        device=device,
                        round=record.round,
                        reason=record.reason,
                        message=record.message,
                    )
            case Have():
                self._downloads.on_have(device, record, now)
                self._rounds.participations.progress.moved(device)
            case _:
                raise ProtocolError(f"a {type(record).__name__} record has no place here")
        if not isinstance(record, Presence | Status):  # these two say of which session they are
            self._heard(device)

    def _heard(self, device: str) -> None:
        if self._fleet.heard(device, self._clock.wall()):
            self._emit("device.online", device=device)

    def _on_presence(self, presence: Presence) -> None:
        before = self._fleet[presence.device]
        member = self._fleet.on_presence(presence, self._clock.wall())
        if member is None:
            return
        if member.refusal is not None and member.refusal != before.refusal:
            self._say(member.device, member.refusal)
            self._emit(
                "device.refused", device=member.device, reason="protocol", message=member.refusal.message
            )
        if not member.online:
            self._downloads.mark_lost(member.device)
        if member.online != before.online:
            self._emit("device.online" if member.online else "device.offline", device=member.device)

    def _on_status(self, status: Status) -> None:
        before = self._fleet[status.device]
        member = self._fleet.on_status(status, self._clock.wall())
        if member is None:
            return
        if member.refusal is not None:
            self._say(member.device, member.refusal)
            self._emit(
                "device.refused",
                device=member.device,
                reason=member.refusal.reason,
                message=member.refusal.message,
            )
            return
        if member.ready and not before.ready:
            self._emit(
                "device.joined",
                device=member.device,
                device_class=status.device_class,
                emulated=status.emulated,
                samples=status.samples,
                limits=status.limits,
                insecure=status.insecure,
            )
        self._rounds.on_status(status)
        # Who is still busy with an earlier round may have missed the offer of this one.
        if status.position is None or status.position.round < self._rounds.row.number:
            self._rounds.offer_again(member.device)

    def _on_choice(self, choice: Choice) -> None:
        if not self._rounds.participations.on_choice(choice):
            return
        status, one = self._fleet[choice.device].status, choice.candidate
        self._emit(
            "round.choice",
            device=choice.device,
            device_class=None if status is None else status.device_class,
            emulated=status is not None and status.emulated,
            round=choice.round,
            attempt=choice.attempt,
            depth=one.depth,
            quantized_layers=one.quantized_layers,
            binding=choice.binding,
            peak_mb=one.peak_mb,
            seconds=one.seconds,
            bytes_up=one.bytes_up,
            reason=choice.reason,
        )

    def _on_foreign(self, device: str, topic: str, why: str) -> None:
        self._ledger.add(device, foreign=1)
        self._foreign[device] += 1
        count = self._foreign[device]
        _log.debug("no use: %s on %s", why, topic)
        if count & (count - 1) == 0:  # the first, second, fourth, eighth ...: a flood does not flood the log
            self._emit("message.foreign", device=device, topic=topic[:200], count=count, message=why)
