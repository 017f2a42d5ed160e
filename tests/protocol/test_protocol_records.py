"""The records of the wire: what goes out comes back, and limits hold."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol import trainer, wire
from edge_sdk.protocol.base import MAX_RECORD_BYTES, Record
from edge_sdk.protocol.container import ContainerHeader, Part
from edge_sdk.protocol.measure import Fit, Link, Measured, Memory, ProbePoint, Profile
from edge_sdk.protocol.model import DensePart, Fingerprint, LoraModule, LoraShape, ModelShape
from edge_sdk.protocol.spec import Candidate, TrainSpec

FINGERPRINT = Fingerprint(
    base="a" * 64,
    tokenizer="b" * 64,
    labels="c" * 64,
    head="linear:384x4",
    max_length=128,
    template="d" * 64,
    targets=("query", "value"),
    rank=8,
    alpha=16.0,
)
SHAPE = ModelShape(
    family="bert",
    layers=6,
    hidden=384,
    intermediate=1536,
    heads=12,
    vocabulary=30522,
    layer_path="bert.encoder.layer",
    modules=(
        LoraModule(name="query", inputs=384, outputs=384),
        LoraModule(name="up", inputs=384, outputs=1536),
    ),
    dense=(
        DensePart(name="classifier.weight", shape=(4, 384)),
        DensePart(name="classifier.bias", shape=(4,)),
    ),
    parameters=22_000_000,
    base_bytes=88_000_000,
)
FIT = Fit(
    micro_batch=16,
    max_length=128,
    rest_mb=400,
    head_mb=5,
    layer_mb=60,
    saved_mb=40,
    work_mb=10,
    forward_s=0.1,
    layer_s=0.05,
    quantize_s=0.01,
    probes=(ProbePoint(depth=2, quantized_layers=1, peak_mb=120.5, step_s=0.3),),
)
MEASURED = Measured(rest_mb=400, peak_mb=120, train_s=8, step_s=0.3, steps=25, loss_first=2.3, loss_last=0.9)
CANDIDATE = Candidate(id="d2q1", depth=2, quantized_layers=1, slots=(0, 3))
VERSION = wire.VersionRef(number=3, object="e" * 64, bytes=123_456)

RECORDS: list[Record] = [
    wire.Run(
        run="r1",
        nonce="n1",
        base="some/base",
        labels=("a", "ß"),
        max_length=128,
        micro_batch=16,
        lora=LoraShape(),
        spec=TrainSpec(),
        shape=SHAPE,
        fingerprint=FINGERPRINT,
    ),
    wire.AggregatorState(ready=True, epoch="e1", run="r1", round=2, rounds=10, version=VERSION),
    wire.Presence(device="dev-1", online=True, session=4, sdk="0.1.0"),
    wire.Status(
        device="dev-1",
        run="r1",
        session=4,
        fingerprint=FINGERPRINT,
        mechanisms=("codec:int8",),
        samples=100,
        profile=Profile(reasons={"battery_percent": "there is none"}),
        fit=FIT,
        memory=Memory(budget_mb=300, rest_mb=400, limit_mb=700),
        link=Link(up_bps=1e6, source="measured"),
        holds=(0, 3),
        position=wire.RoundPosition(round=2, state="training"),
        limits={"memory_mb": 700.0},
    ),
    wire.Offer(
        run="r1",
        round=2,
        nonce="n2",
        deadline_s=60.5,
        spec=TrainSpec(),
        versions=(VERSION,),
        candidates=(CANDIDATE,),
        chunk_bytes=32 * 1024,
        window=2,
    ),
    wire.Choice(device="dev-1", run="r1", round=2, candidate=CANDIDATE, binding="memory"),
    wire.Decline(device="dev-1", run="r1", round=2, reason="memory", message="nothing fits"),
    wire.Announce(
        device="dev-1",
        run="r1",
        round=2,
        nonce="n2",
        fingerprint=FINGERPRINT.digest,
        object="f" * 64,
        bytes=99_999,
        chunk_bytes=32 * 1024,
        builds_on=3,
        samples=100,
        candidate=CANDIDATE,
        measured=MEASURED,
        sent_bytes=12,
    ),
    wire.Have(device="dev-1", object="f" * 64, bytes=99_999, chunk_bytes=32 * 1024, ranges=((0, 2), (3, 4))),
    wire.Receipt(device="dev-1", run="r1", round=2, object="f" * 64, duplicate_bytes=7),
    wire.Refusal(device="dev-1", run="r1", reason="fingerprint", message="another base", parts=("base",)),
    wire.Ping(device="dev-1", number=2**32 - 1, wants=1024),
    wire.Pong(device="dev-1", number=7, bytes=1024, refused="used up"),
]
PLAIN = [json.loads(wire.encode(record)) for record in RECORDS]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_come_back_as_they_went_out(record: Record) -> None:
    data = wire.encode(record)
    assert wire.decode(data) == record
    assert wire.decode_as(data, type(record)) == record
    again = wire.encode(wire.decode(data))
    assert wire.encode(wire.decode(again)) == again
    # A newer party may say more.
    more = json.dumps({**json.loads(data), "from_the_future": [1, 2]}).encode()
    assert wire.decode(more) == record


def test_every_record_is_tried_here() -> None:
    tagged = {kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, Record)}
    tagged = {kind for kind in tagged if kind.__struct_config__.tag and kind.__module__ == wire.__name__}
    assert {type(record) for record in RECORDS} == tagged


def changed(index: int, **fields: Any) -> bytes:
    return json.dumps({**PLAIN[index], **fields}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"type":"nothing"}',
        b"\xff\xfe",
        b"[" * 100_000,
        changed(2, device="../x"),
        changed(2, device="dev-1\n"),
        changed(2, session=-1),
        changed(4, candidates=[]),
        changed(4, candidates=[json.loads(msgspec.json.encode(CANDIDATE))] * 13),
        changed(4, deadline_s=0),
        changed(4, chunk_bytes=512 * 1024),
        changed(4, window=0),
        changed(4, versions=[]),
        changed(7, object="F" * 64),
        changed(7, bytes=0),
        changed(7, bytes=1 << 31),
        changed(7, round=0),
        changed(8, ranges=[[0, 1]] * 4097),
        changed(8, ranges=[[-1, 1]]),
        changed(6, reason="mood"),
        changed(6, message="x" * 5000),
        changed(2, session=2**63),
        changed(7, round=2**63),
        changed(7, measured={**PLAIN[7]["measured"], "train_s": -1.0}),
        changed(3, fit={**PLAIN[3]["fit"], "layer_s": 1e308}),
        changed(3, memory={**PLAIN[3]["memory"], "budget_mb": 1e10}),
        changed(3, link={"up_bps": 1e16}),
    ],
)
def test_what_breaks_the_contract_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(data)


@given(data=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_are_a_protocol_error(data: bytes) -> None:
    for call in (wire.decode, trainer.decode_request, trainer.decode_reply):
        with pytest.raises(ProtocolError):
            call(data)


@given(index=st.integers(0, len(PLAIN) - 1), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_record_with_a_field_of_nonsense_is_read_or_refused(index: int, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(PLAIN[index])))
    value = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20)
        | st.lists(st.integers(), max_size=3)
    )
    try:
        record = wire.decode(changed(index, **{field: value}))
    except ProtocolError:
        return
    assert isinstance(record, Record)


def test_a_record_above_the_limit_is_not_sent_or_read() -> None:
    huge = msgspec.structs.replace(RECORDS[0], labels=tuple("x" * 4000 for _ in range(80)))
    with pytest.raises(ProtocolError, match="fewer labels"):
        wire.encode(huge)
    with pytest.raises(ProtocolError, match="above the limit"):
        wire.decode(b" " * (MAX_RECORD_BYTES + 1))


def test_another_kind_of_record_than_expected_is_named() -> None:
    with pytest.raises(ProtocolError, match="expected a Offer record, received a Presence"):
        wire.decode_as(wire.encode(RECORDS[2]), wire.Offer)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        RECORDS[2].session = 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("base", "0" * 64),
        ("tokenizer", "0" * 64),
        ("labels", "0" * 64),
        ("head", "linear:384x5"),
        ("max_length", 256),
        ("template", "0" * 64),
        ("targets", ("query",)),
        ("rank", 4),
        ("alpha", 8.0),
        ("scaling", "alpha/sqrt(rank)"),
    ],
)
def test_a_fingerprint_names_the_part_that_differs(part: str, value: Any) -> None:
    other = msgspec.structs.replace(FINGERPRINT, **{part: value})
    assert FINGERPRINT.differing(other) == (part,)
    assert other.digest != FINGERPRINT.digest


def test_equal_fingerprints_are_equal_after_the_wire() -> None:
    again = msgspec.json.decode(msgspec.json.encode(FINGERPRINT), type=Fingerprint)
    assert FINGERPRINT.differing(again) == ()
    assert again.digest == FINGERPRINT.digest
    assert len(again.digest) == 64


def test_a_whole_number_for_alpha_is_the_same_fingerprint() -> None:
    assert msgspec.structs.replace(FINGERPRINT, alpha=16).digest == FINGERPRINT.digest


def test_sizes_of_a_model() -> None:
    assert SHAPE.lora_values(8) == 8 * (384 + 384 + 384 + 1536)
    assert SHAPE.dense_values() == 4 * 384 + 4
    assert LoraShape(rank=8, alpha=16).scaling == 2.0


def test_what_a_candidate_and_a_spec_need_is_spelled_in_words() -> None:
    assert CANDIDATE.needs() == {
        "activation:int8",
        "base:fp32",
        "codec:int8",
        "recompute:none",
        "slots:subset",
        "rounding:nearest",
    }
    assert "activation:int8" not in Candidate(id="plain", depth=2).needs()
    needs = TrainSpec(error_feedback=True, privacy="gaussian").needs()
    assert {"privacy:gaussian", "error-feedback:on", "optimizer:adamw"} <= needs
    assert "error-feedback:on" not in TrainSpec(error_feedback=False).needs()


SETUP = trainer.Setup(
    base="/base", labels=("a", "b"), max_length=128, micro_batch=16, lora=LoraShape(), spec=TrainSpec()
)
REQUESTS = [
    trainer.Describe(id=1, setup=SETUP),
    trainer.Probe(id=2, setup=SETUP),
    trainer.Train(
        id=3,
        setup=SETUP,
        run="r1",
        round=2,
        device="dev-1",
        fingerprint=FINGERPRINT.digest,
        candidate=CANDIDATE,
        spec=TrainSpec(),
        versions=("/v0", "/v1"),
        folder="/out",
    ),
    trainer.Evaluate(id=4, setup=SETUP, versions=("/v0",)),
    trainer.Export(
        id=5,
        base="some/base",
        labels=("a", "b"),
        lora=LoraShape(),
        shape=SHAPE,
        fingerprint=FINGERPRINT,
        versions=("/v0",),
        folder="/out",
    ),
    trainer.Interrupt(),
]
REPLIES = [
    trainer.Described(
        id=1, base="/b", shape=SHAPE, rest_mb=1, samples=5, device="cpu", mechanisms=("x",), torch="2.3"
    ),
    trainer.Probed(id=2, fit=FIT),
    trainer.Progress(id=3, stage="training", done=1, total=25, loss=2.0),
    trainer.Trained(id=3, update="/u", residual=None, samples=5, measured=MEASURED),
    trainer.Evaluated(id=4, accuracy=0.5, loss=1.0, examples=10, seconds=0.1),
    trainer.Exported(id=5, folder="/out"),
    trainer.Failed(id=6, cause="memory", message="out of memory"),
    trainer.Died(id=7, memory=True, exit=-9, message="killed"),
]


@pytest.mark.parametrize("record", REQUESTS + REPLIES, ids=lambda record: type(record).__name__)
def test_trainer_records_come_back_as_they_went_out(record: Record) -> None:
    decode = trainer.decode_request if record in REQUESTS else trainer.decode_reply
    assert decode(msgspec.json.encode(record)) == record


def test_a_container_header_names_its_tensors() -> None:
    lora = Part(layer=3, module="attention.query", factor="A", rows=8, width=384, bits=8)
    dense = Part(
        layer=None, module="classifier.weight", factor="dense", role="dense", rows=4, width=384, bits=16
    )
    assert (lora.key, dense.key) == ("3.attention.query.A", "dense.classifier.weight")
    header = ContainerHeader(
        kind="update",
        run="r1",
        round=2,
        builds_on=3,
        fingerprint="a" * 64,
        codec="int8",
        parts=(lora, dense),
    )
    assert msgspec.json.decode(msgspec.json.encode(header), type=ContainerHeader) == header
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(
            msgspec.json.encode(header).replace(b'"format":1', b'"format":2'), type=ContainerHeader
        )
