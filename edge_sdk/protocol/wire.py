"""The records of a round, as they travel over MQTT, and their JSON form.

Retained: ``Run`` (what the run is), ``AggregatorState`` (who leads, where the run stands), ``Presence``.
Device to aggregator: ``Status``, ``Choice``, ``Decline``, ``Announce``, ``Have`` (asks for an object),
``Ping``.
Aggregator to device: ``Offer``, ``Have`` (credit for an upload), ``Receipt``, ``Refusal``, ``Pong``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.base import (
    MAX_RECORD_BYTES,
    PROTOCOL,
    Digest,
    Name,
    NotNegative,
    Positive,
    Record,
    Text,
)
from edge_sdk.protocol.measure import Budget, Fit, Link, Measured, Memory, Profile
from edge_sdk.protocol.model import Fingerprint, LoraShape, ModelShape
from edge_sdk.protocol.spec import Candidate, Levers, TrainSpec, Word

__all__ = [
    "AggregatorState",
    "Announce",
    "Choice",
    "Decline",
    "DeclineReason",
    "Have",
    "Offer",
    "Ping",
    "Pong",
    "Presence",
    "Receipt",
    "Refusal",
    "RefusalReason",
    "RoundPosition",
    "Run",
    "Status",
    "VersionRef",
    "decode",
    "encode",
]

MAX_OBJECT_BYTES = 1 << 30
ChunkBytes = Annotated[int, msgspec.Meta(ge=1024, le=256 * 1024)]
ObjectBytes = Annotated[int, msgspec.Meta(ge=1, le=MAX_OBJECT_BYTES)]
Window = Annotated[int, msgspec.Meta(ge=1, le=256)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Deadline = Annotated[float, msgspec.Meta(gt=0)]


class VersionRef(Record, frozen=True, kw_only=True):
    """A version of the global adapter, by number and by object. ``parent`` is None for a full one."""

    number: NotNegative
    object: Digest
    bytes: ObjectBytes
    parent: NotNegative | None = None
    branch: Name = "global"


class Run(Record, frozen=True, kw_only=True, tag="run"):
    """What the run is. Retained; a device computes its own fingerprint from it before it joins."""

    protocol: int = PROTOCOL
    run: Name
    nonce: Name
    """New for every run, also of the same name; announces carry it."""
    task: Word = "classification"
    """One of ``TASKS``; a device that does not know it refuses the run by that name."""
    base: Text
    """The base as the operator wrote it; what counts is the fingerprint."""
    labels: Annotated[tuple[Text, ...], msgspec.Meta(max_length=4096)]
    template: Text = "{text}"
    max_length: Positive
    micro_batch: Positive
    lora: LoraShape
    layers: Text = ""
    """Path of the list of transformer layers in the model; "": every party finds it."""
    spec: TrainSpec
    """What devices probe with; an offer brings the one of its round."""
    levers: Levers = Levers()
    """Likewise."""
    shape: ModelShape
    fingerprint: Fingerprint


class AggregatorState(Record, frozen=True, kw_only=True, tag="aggregator"):
    """Who leads and where the run stands. Retained, and, with ``ready`` false, the will."""

    protocol: int = PROTOCOL
    ready: bool
    epoch: Name
    """New at every start of the aggregator; a device that sees another one reports again."""
    run: Name | None = None
    round: NotNegative = 0
    rounds: NotNegative = 0
    version: VersionRef | None = None
    chain: Annotated[tuple[VersionRef, ...], msgspec.Meta(max_length=256)] = ()
    """What ``version`` builds on, a full one first; empty where it is a full one itself."""
    finished: bool = False
    link_bytes: NotNegative = 0
    """Payload that a device may send, and ask for, now and then to measure its link; 0: none."""
    reason: Text = ""
    """Why it is not ready though it is there: ``storage``, its disk is full; "": it is away, or starting."""


class Presence(Record, frozen=True, kw_only=True, tag="presence"):
    """Whether a device is connected. Retained, and, with ``online`` false, the will."""

    protocol: int = PROTOCOL
    device: Name
    online: bool
    session: NotNegative
    """Counts the agent's starts: a late will of an older session is ignored."""
    sdk: Text = ""


class RoundPosition(Record, frozen=True, kw_only=True):
    """Where a device stands in a round."""

    round: NotNegative
    state: Literal["choosing", "fetching", "training", "packing", "queued", "sending", "awaiting-receipt"]


class Status(Record, frozen=True, kw_only=True, tag="status"):
    """What a device reports when it joins, when it is asked, and when something changed."""

    device: Name
    run: Name
    session: NotNegative
    device_class: Name | None = None
    emulated: bool = False
    permission: Literal["running", "paused", "gated", "stopped"] = "running"
    reason: Text = ""
    fingerprint: Fingerprint
    mechanisms: tuple[Text, ...]
    samples: Positive
    profile: Profile
    fit: Fit | None = None
    memory: Memory
    link: Link
    holds: tuple[NotNegative, ...] = ()
    """Numbers of the versions on the device's disk."""
    position: RoundPosition | None = None
    insecure: bool = False
    """The device speaks to its broker without TLS, off loopback, by its owner's leave."""
    limits: dict[str, float] = msgspec.field(default_factory=dict)


class Offer(Record, frozen=True, kw_only=True, tag="offer"):
    """A round's work for one device, with the candidates to choose from."""

    run: Name
    round: Positive
    nonce: Name
    deadline_s: Deadline
    """Duration from receipt, on the device's own clock, after which the round closes."""
    target_s: Deadline | None = None
    """What the plan aims at; shorter than the deadline, which also bears what no prediction holds."""
    spec: TrainSpec
    versions: Annotated[tuple[VersionRef, ...], msgspec.Meta(min_length=1)]
    """The chain that leads to the version to build on, which is the last one."""
    candidates: Annotated[tuple[Candidate, ...], msgspec.Meta(min_length=1, max_length=12)]
    chunk_bytes: ChunkBytes = 256 * 1024
    window: Window = 4

    @property
    def time_budget_s(self) -> float:
        """What a candidate's predicted time must stay within."""
        return self.deadline_s if self.target_s is None else min(self.target_s, self.deadline_s)


class Choice(Record, frozen=True, kw_only=True, tag="choice"):
    """The candidate that the device took, why no better one, and its own predictions."""

    device: Name
    run: Name
    round: Positive
    candidate: Candidate
    """The offer's candidate with the device's own predictions in it."""
    binding: Budget
    attempt: NotNegative = 0
    """0: the first choice; n: the n-th step down after the trainer ran out of memory."""
    reason: Text = ""


DeclineReason = Literal["memory", "deadline", "mechanism", "gate", "paused", "version", "trainer", "data"]


class Decline(Record, frozen=True, kw_only=True, tag="decline"):
    """The device does not take part in this round; the last word is its own."""

    device: Name
    run: Name
    round: Positive
    reason: DeclineReason
    message: Text


class Announce(Record, frozen=True, kw_only=True, tag="announce"):
    """A finished update waits in the device's outbox. Repeated, it asks where the transfer stands."""

    device: Name
    run: Name
    round: Positive
    nonce: Name
    fingerprint: Digest
    object: Digest
    bytes: ObjectBytes
    chunk_bytes: ChunkBytes
    builds_on: NotNegative
    samples: Positive
    candidate: Candidate
    measured: Measured
    sent_bytes: NotNegative = 0
    """Bytes of this object that went out before this announce, repeats included."""


class Have(Record, frozen=True, kw_only=True, tag="have"):
    """The receiver of an object tells what it holds durably, and how much more may be under way.

    From the aggregator it answers an ``Announce``; from a device it asks for an object.
    """

    device: Name
    object: Digest
    bytes: ObjectBytes
    chunk_bytes: ChunkBytes
    ranges: Annotated[tuple[tuple[NotNegative, NotNegative], ...], msgspec.Meta(max_length=4096)] = ()
    """Chunks held, as half-open ranges [first, after) in order."""
    window: Window = 4
    """Chunks that may be sent and not yet be in ``ranges``."""


class Receipt(Record, frozen=True, kw_only=True, tag="receipt"):
    """The update is durable and will count. Only now may the device forget it."""

    device: Name
    run: Name
    round: Positive
    object: Digest
    duplicate_bytes: NotNegative = 0
    """Bytes of this transfer that arrived more than once."""


RefusalReason = Literal[
    "protocol", "fingerprint", "identity", "run", "round", "version", "size", "corrupt", "shape",
    "nonfinite", "norm", "samples", "storage", "duplicate",
]  # fmt: skip
"""``norm``: a change far larger than those of the fleet. ``duplicate``: another update of this device and
round counts already; this one must never count."""


class Refusal(Record, frozen=True, kw_only=True, tag="refusal"):
    """What was sent is not taken, and why. ``object`` is None when a status is refused."""

    device: Name
    run: Name
    round: NotNegative = 0
    object: Digest | None = None
    reason: RefusalReason
    message: Text
    hint: Text = ""
    parts: tuple[Text, ...] = ()
    """The parts of the fingerprint that differ."""


class Ping(Record, frozen=True, kw_only=True, tag="ping"):
    """To be answered at once: by a ``Pong``, or, where bytes are wanted, by one frame with so many.

    Frames of a link's measurement are chunks of the transfer ``link`` (``link_transfer``), their index the
    number. One that the aggregator gets it answers by a ``Pong`` of that number; nobody keeps the bytes.
    """

    device: Name
    number: Number
    wants: Annotated[int, msgspec.Meta(ge=0, le=256 * 1024)] = 0


class Pong(Record, frozen=True, kw_only=True, tag="pong"):
    """The answer to a ``Ping``, or to a frame with ``bytes`` of payload."""

    device: Name
    number: Number
    bytes: NotNegative = 0
    refused: Text = ""
    """Why nothing was answered: the device used up what it may measure with. Empty: it was."""


Message = (
    Run
    | AggregatorState
    | Presence
    | Status
    | Offer
    | Choice
    | Decline
    | Announce
    | Have
    | Receipt
    | Refusal
    | Ping
    | Pong
)
_decoder = msgspec.json.Decoder(Message)
_encoder = msgspec.json.Encoder(order="deterministic")
_R = TypeVar("_R", bound=Record)


def encode(record: Record) -> bytes:
    """JSON form of a record. Raises ProtocolError above ``MAX_RECORD_BYTES``."""
    data = _encoder.encode(record)
    if len(data) > MAX_RECORD_BYTES:
        raise ProtocolError(
            f"a {type(record).__name__} record of {len(data)} bytes is above the limit of {MAX_RECORD_BYTES}",
            "fewer labels or shorter texts in the run's config",
        )
    return data


def decode(data: bytes | memoryview) -> Any:
    """The record in ``data``: one of the classes of this module. Raises ProtocolError only."""
    if len(data) > MAX_RECORD_BYTES:
        raise ProtocolError(f"a record of {len(data)} bytes is above the limit of {MAX_RECORD_BYTES}")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a record of protocol {PROTOCOL}: {error}") from error


def decode_as(data: bytes | memoryview, kind: type[_R]) -> _R:
    """The record in ``data``, which must be a ``kind``. Raises ProtocolError."""
    record = decode(data)
    if not isinstance(record, kind):
        raise ProtocolError(f"expected a {kind.__name__} record, received a {type(record).__name__}")
    return record
