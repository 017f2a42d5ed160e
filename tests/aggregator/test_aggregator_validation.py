"""What the server does not take, one by one, and that nothing on any topic brings it down."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_device import SHAPE, TOPICS, FakeDevice, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator.fleet import Fleet
from edge_sdk.protocol.frames import encode_chunk
from edge_sdk.protocol.wire import Announce, Choice, Have, Presence, Refusal, Status, encode
from edge_sdk.transport.memory import MemoryTransport
from edge_sdk.updates.keys import tuned_keys


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def refused(world: World, **device: Any) -> tuple[FakeDevice, Refusal]:
    world.open()
    one = world.device(**device)
    world.pump()
    assert one.receipts == []
    (refusal,) = one.refusals
    return one, refusal


ANNOUNCES: list[tuple[str, Callable[[Announce], Announce], str, str]] = [
    ("identity", lambda a: replace(a, device="other"), "identity", "other"),
    ("run", lambda a: replace(a, run="other"), "run", "demo"),
    ("nonce", lambda a: replace(a, nonce="other"), "run", "earlier run"),
    ("fingerprint", lambda a: replace(a, fingerprint="0" * 64), "fingerprint", "000000000000"),
    ("round", lambda a: replace(a, round=7), "round", "round 7"),
    ("version", lambda a: replace(a, builds_on=9), "version", "version 9"),
    ("size", lambda a: replace(a, bytes=300_000_000), "size", "300000000"),
    ("chunks", lambda a: replace(a, chunk_bytes=2048), "size", "2048"),
    ("depth", lambda a: replace(a, candidate=replace(a.candidate, depth=9)), "shape", "depth 9"),
    ("codec", lambda a: replace(a, candidate=replace(a.candidate, codec="fp32")), "shape", "not offered"),
    ("samples", lambda a: replace(a, samples=101), "samples", "101"),
]


@pytest.mark.parametrize(
    ("alter", "reason", "told"), [case[1:] for case in ANNOUNCES], ids=[case[0] for case in ANNOUNCES]
)
def test_announces_refused_before_any_byte(
    world: World, alter: Callable[[Announce], Announce], reason: str, told: str
) -> None:
    device, refusal = refused(world, alter_announce=alter)
    assert refusal.reason == reason and told in refusal.message
    assert world.server is not None and world.server._running is not None
    assert world.server._running.uploads["one"] is None
    assert world.server._store.ledger("demo") == [] or world.server._store.ledger("demo")[0].bytes_up == 0
    assert device.sender is None


def test_a_refused_announce_leaves_what_came_of_another_object(world: World) -> None:
    world.open()
    device = world.device(frames_left=2)
    world.pump()
    announce = device.announce
    assert announce is not None and announce.bytes > 2048
    for stray in (replace(announce, bytes=300_000_000), replace(announce, round=7)):
        device.say(replace(stray, object="0" * 64))
    world.pump()
    assert [refusal.reason for refusal in device.refusals] == ["size", "round"]
    device.frames_left = None
    assert device.sender is not None
    device.sender.mark_lost()
    device.send_announce()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]
    assert device.receipts[0].duplicate_bytes == 0


@pytest.mark.parametrize("restarted", [False, True])
def test_a_refused_announce_removes_what_came_of_its_object(world: World, restarted: bool) -> None:
    world.open()
    device = world.device(frames_left=2)
    world.pump()
    assert device.announce is not None
    partials = world.folder / "state" / "partials" / "one"
    assert any(partials.iterdir())
    device.announce = replace(device.announce, samples=10_000)
    if restarted:
        world.kill()
        world.open()
    else:
        device.send_announce()
    world.pump()
    assert [refusal.reason for refusal in device.refusals] == ["samples"]
    assert not partials.is_dir() or not any(partials.iterdir())


def test_what_could_be_drawn_is_not_what_a_device_has(world: World) -> None:
    """A device of three rows draws each of them many times, and weighs as three."""
    _, refusal = refused(world, samples=3, alter_announce=lambda a: replace(a, samples=40))
    assert refusal.reason == "samples" and "told of 3" in refusal.message


def test_a_device_that_would_outweigh_all_others_by_its_word_is_refused(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, max_samples=1000))
    boaster = world.device("boaster", samples=1001)
    honest = world.device("honest", samples=1000)
    world.pump()
    refusal = boaster.refusals[0]
    assert refusal.reason == "samples" and "1001" in refusal.message and "max_samples" in refusal.hint
    assert world.last("device.refused")["device"] == "boaster" and boaster.offer is None
    assert [receipt.round for receipt in honest.receipts] == [1, 2]


def test_smaller_predictions_are_no_other_work(world: World) -> None:
    world.open()
    device = world.device(
        alter_announce=lambda a: replace(a, candidate=replace(a.candidate, peak_mb=1.0, seconds=3.0))
    )
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]


def test_any_offered_candidate_may_be_trained(world: World) -> None:
    """A device steps down when memory was short."""
    world.open(rounds=replace(world.config.rounds, total=1))
    device = world.device(until="announce")
    world.pump()
    assert device.offer is not None and len(device.offer.candidates) > 1
    smallest = min(device.offer.candidates, key=lambda one: one.depth)
    path = device.make_update(keys=tuned_keys(SHAPE, smallest.depth), codec=smallest.codec)
    device.until = "receipt"
    device.alter_announce = lambda a: replace(a, candidate=smallest)
    device.prepare(path)
    device.send_announce()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1]


def test_a_second_update_of_the_round_never_counts(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, total=1))
    other = world.device("two", until="announce")
    device = world.device("one")
    world.pump()
    assert len(device.receipts) == 1 and device.offer is not None
    device.change = 0.5
    device.prepare(device.make_update())
    device.send_announce()
    world.pump()
    assert [refusal.reason for refusal in device.refusals] == ["duplicate"]
    assert other.receipts == []


def test_the_same_announce_again_gets_the_same_receipt(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, total=1))
    world.device("two", until="announce")
    device = world.device("one", until="announce")
    world.pump()
    announce = device.announce
    assert announce is not None
    device.until = "receipt"
    for _ in range(3):
        device.send_announce()
    world.pump()
    device.say(announce)
    world.pump()
    assert len(device.receipts) == 2 and device.receipts[0] == device.receipts[1]
    assert world.names().count("update.received") == 1


def write_odd(device: FakeDevice, **changes: Any) -> None:
    device.prepare(device.make_update(**changes))


def containers(world: World, make: Callable[[FakeDevice], None]) -> FakeDevice:
    world.open(rounds=replace(world.config.rounds, total=1))
    device = world.device(until="announce")
    world.pump()
    device.until = "receipt"
    make(device)
    device.send_announce()
    world.pump()
    return device


ODD: list[tuple[str, Callable[[FakeDevice], None], str, str]] = [
    ("other round", lambda d: write_odd(d, round=5), "shape", "round"),
    ("other run", lambda d: write_odd(d, run="else"), "shape", "run"),
    ("other version", lambda d: write_odd(d, builds_on=3), "shape", "version"),
    ("other fingerprint", lambda d: write_odd(d, fingerprint="1" * 64), "shape", "fingerprint"),
    ("other codec", lambda d: write_odd(d, codec="fp32"), "shape", "codec"),
    ("missing parts", lambda d: write_odd(d, keys=["dense.classifier.weight"]), "shape", "missing"),
]


@pytest.mark.parametrize(
    ("make", "reason", "told"), [case[1:] for case in ODD], ids=[case[0] for case in ODD]
)
def test_containers_refused_before_they_count(
    world: World, make: Callable[[FakeDevice], None], reason: str, told: str
) -> None:
    device = containers(world, make)
    (refusal,) = device.refusals
    assert refusal.reason == reason and told in refusal.message
    assert world.last("round.empty")["round"] == 1, "nothing more is waited for"
    assert world.server is not None
    objects = {version.object for version in world.server._store.versions("demo") if version.kept}
    assert set(world.server._objects.digests()) == objects


def test_no_container_at_all(world: World) -> None:
    def make(device: FakeDevice) -> None:
        path = device.folder / "one" / "noise"
        path.write_bytes(random.Random(0).randbytes(5000))
        device.prepare(path)

    (refusal,) = containers(world, make).refusals
    assert refusal.reason == "shape" and "no container" in refusal.message


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_that_no_version_holds(world: World, value: float) -> None:
    def make(device: FakeDevice) -> None:
        path = device.make_update()
        data = bytearray(path.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        # The scale of a row: safetensors puts the widest type first.
        data[begin : begin + 4] = np.float32(value).tobytes()
        path.write_bytes(bytes(data))
        device.prepare(path)

    (refusal,) = containers(world, make).refusals
    assert refusal.reason == "nonfinite"


def test_changes_do_not_add_up_to_what_no_version_holds(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, total=20, min_devices=1))
    device = world.device(change=9900.0)
    world.pump()
    server = world.server
    assert server is not None and not server.done
    assert [refusal.reason for refusal in device.refusals][:1] == ["nonfinite"]
    assert "leads to a value of 6.9" in device.refusals[0].message
    assert device.receipts[-1].round == 6


def test_altered_bytes_are_asked_for_again_and_then_dropped(world: World) -> None:
    sent: list[Announce] = []

    def make(device: FakeDevice) -> None:
        if not sent:
            sent.append(device.prepare(device.make_update()))
            path = device.store.path(sent[0].object)
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(bytes(data))
        device.announce = sent[0]
        device.sender = device.sender_of(sent[0])

    device = containers(world, make)
    for _ in range(2):
        make(device)
        device.send_announce()
        world.pump()
    assert [one.reason for one in device.refusals] == ["corrupt"] * 3
    assert world.last("round.empty")["round"] == 1


# Statuses and presence


def test_another_fingerprint_is_refused_by_its_parts(world: World) -> None:
    world.open()
    device = world.device(until="offer")
    world.pump()
    assert device.run is not None
    odd = replace(device.run.fingerprint, base="0" * 64, rank=3)
    device.report(fingerprint=odd)
    world.pump()
    (refusal,) = device.refusals
    assert refusal.reason == "fingerprint" and refusal.parts == ("base", "rank") and refusal.object is None
    device.report()
    world.pump()
    assert len(device.refusals) == 1


def test_a_status_of_another_run_is_refused(world: World) -> None:
    world.open()
    device = world.device(until="offer")
    world.pump()
    device.report(run="other")
    world.pump()
    assert [refusal.reason for refusal in device.refusals] == ["run"]


def test_another_protocol_is_refused(world: World) -> None:
    world.open()
    device = world.device(fit=None)
    world.pump()
    presence = Presence(protocol=9, device="one", online=True, session=1)
    device.transport.publish(TOPICS.presence("one"), encode(presence), retain=True)
    world.pump()
    assert [refusal.reason for refusal in device.refusals] == ["protocol"]


def test_a_late_will_of_an_older_session_is_ignored(world: World) -> None:
    world.open()
    device = world.device(session=5, until="offer")
    world.pump()
    assert world.server is not None and world.server._running is not None
    old = Presence(device="one", online=False, session=4)
    device.transport.publish(TOPICS.presence("one"), encode(old), retain=True)
    world.pump()
    assert world.server._running.fleet["one"].online


def test_a_device_whose_state_folder_was_lost_may_come_again(world: World) -> None:
    world.open()
    device = world.device(session=5, until="announce")
    world.pump()
    device.leave()
    world.pump()
    device.session = 0
    device.until, device.announce = "receipt", None
    device.offer = None
    device.come_back()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]


def test_link_figures_are_smoothed(world: World) -> None:
    from edge_sdk.protocol.measure import Link

    world.open()
    device = world.device(until="offer")
    world.pump()
    assert world.server is not None and world.server._running is not None
    fleet = world.server._running.fleet
    device.report(link=Link(up_bps=100.0, source="measured"))
    world.pump()
    device.report(link=Link(up_bps=200.0, source="measured"))
    world.pump()
    assert fleet["one"].up_bps == pytest.approx(0.8 * 100 + 0.2 * 200)
    planned = fleet["one"].planned()
    assert planned is not None and planned.link.up_bps == fleet["one"].up_bps
    device.report(link=Link(up_bps=50.0, source="configured"))
    world.pump()
    assert fleet["one"].up_bps == 50.0


# Whatever else comes


def test_only_versions_can_be_fetched(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, total=1))
    world.device("two", until="announce")
    device = world.device("one")
    world.pump()
    stolen = device.receipts[0].object
    assert world.server is not None and world.server._objects.has(stolen)
    size = world.server._objects.path(stolen).stat().st_size
    spy = world.device("spy", fit=None)
    world.pump()
    spy.say(Have(device="spy", object=stolen, bytes=size, chunk_bytes=1024))
    world.pump()
    assert world.last("message.foreign")["device"] == "spy"
    assert not (world.folder / "spy" / "incoming").exists()


def test_chunks_of_no_upload_are_counted(world: World) -> None:
    world.open()
    device = world.device(until="offer")
    world.pump()
    frame = encode_chunk(b"\0" * 16, 0, 0, b"abc")
    for _ in range(5):
        device.transport.publish(TOPICS.bulk("one"), frame)
    world.pump()
    assert world.server is not None
    world.pass_time(3)
    assert world.server._store.ledger("demo")[0].foreign == 5
    assert world.names().count("message.foreign") == 3, "1, 2 and 4: a flood does not flood the log"


def seeds(world: World) -> list[bytes]:
    """Real records and frames, to be mutilated."""
    device = world.devices[0]
    run = device.run
    assert run is not None and device.offer is not None and device.announce is not None
    candidate = device.offer.candidates[0]
    records = [
        Presence(device="one", online=True, session=1),
        Choice(device="one", run="demo", round=1, candidate=candidate, binding="none"),
        device.announce,
        Have(device="one", object="0" * 64, bytes=10, chunk_bytes=1024),
        *[record for record in device.records if isinstance(record, Status)],
        device.offer,
        run,
    ]
    return [encode(record) for record in records] + [encode_chunk(b"\0" * 16, 0, 0, b"abc")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbage_on_any_topic(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of any kind on any topic the server listens to: it goes on, and the round is as it was."""
    world = getattr(test_garbage_on_any_topic, "world", None)
    if world is None:
        world = World(tmp_path_factory.mktemp("fuzz"))
        world.open(rounds=replace(world.config.rounds, min_devices=2))
        world.device(until="announce")
        world.device("waits", until="offer")  # whatever becomes of the other one, the round stays open
        world.pump()
        world.seeds = seeds(world)
        stranger = MemoryTransport(world.broker, "stranger")
        stranger.start(lambda message: None)
        test_garbage_on_any_topic.world = world  # type: ignore[attr-defined]
        world.stranger = stranger
    before = world.server._running.rounds.row.state
    for _ in range(5):
        topic = data.draw(
            st.sampled_from(
                [TOPICS.control("one"), TOPICS.bulk("one"), TOPICS.presence("two"), TOPICS.control("x")]
            )
        )
        payload = bytearray(data.draw(st.sampled_from(world.seeds)))
        if data.draw(st.booleans()):
            payload = bytearray(data.draw(st.binary(max_size=200)))
        else:
            for _ in range(data.draw(st.integers(1, 8))):
                payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
        world.stranger.publish(topic, bytes(payload))
        world.pump()
    assert not world.server.done and world.server.error is None
    assert world.server._running.rounds.row.state == before


def test_figures_that_nothing_holds_are_no_use(world: World) -> None:
    """Retained, such a message would meet every restart too."""
    world.open()
    device = world.device(until="offer")
    world.pump()
    huge = encode(Presence(device="one", online=True, session=2**63))
    device.transport.publish(TOPICS.presence("one"), huge, retain=True)
    world.pump()
    assert world.server is not None and not world.server.done
    assert world.last("message.foreign")["device"] == "one"


@pytest.mark.parametrize("error", [ValueError("odd"), OverflowError("too large")])
def test_a_message_that_cannot_be_worked_on_is_lost_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*args: Any) -> None:
        raise error

    server = world.open()
    device = world.device(until="offer")
    world.pump()
    monkeypatch.setattr(Fleet, "on_status", fails)
    device.report()
    world.pump()
    assert not server.done and str(error) in world.last("message.foreign")["message"]


def test_a_record_in_another_ones_name_changes_nothing(world: World) -> None:
    world.open()
    device = world.device(until="choice")
    world.pump()
    assert device.offer is not None
    choice = Choice(device="one", run="demo", round=1, candidate=device.offer.candidates[0], binding="memory")
    stranger = MemoryTransport(world.broker, "stranger")
    stranger.start(lambda message: None)
    stranger.publish(TOPICS.control("stranger"), encode(choice))
    world.pump()
    assert world.server is not None
    row = world.server._store.participation("demo", 1, "one")
    assert row is not None and row.choice is not None
    assert msgspec.json.decode(row.choice, type=Choice).binding == "none"
