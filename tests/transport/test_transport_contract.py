"""What every transport promises: in memory, over Mosquitto, over amqtt, over TLS."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from brokers import AGGREGATOR, NAMESPACE, World
from peers import PATIENCE_S, Peer

from edge_sdk.errors import ContainerError, ProtocolError
from edge_sdk.protocol.frames import decode_chunk, is_chunk, transfer_id
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.wire import Have, decode_as, encode
from edge_sdk.transport.base import Will
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.transport.receiving import ObjectReceiver
from edge_sdk.transport.rules import MAX_PAYLOAD_BYTES
from edge_sdk.transport.sending import ObjectSender

Join = Callable[..., Peer]
T = Topics(NAMESPACE)
DEVICE = "dev-a"
CHUNK, WINDOW = 32 * 1024, 2


def test_messages_go_both_ways_in_order(join: Join) -> None:
    aggregator = join(AGGREGATOR, T.control("+"))
    device = join(DEVICE, T.reply(DEVICE))
    for index in range(20):
        assert device.transport.publish(T.control(DEVICE), b"%d" % index)
    assert [aggregator.receive(T.control(DEVICE)).payload for _ in range(20)] == [
        b"%d" % index for index in range(20)
    ]
    assert aggregator.transport.publish(T.reply(DEVICE), b"\x00\xff binary")
    answer = device.receive(T.reply(DEVICE))
    assert (answer.payload, answer.retained) == (b"\x00\xff binary", False)


def test_a_subscription_made_while_connected_works(join: Join) -> None:
    aggregator = join(AGGREGATOR)
    device = join(DEVICE)
    device.transport.subscribe(T.reply(DEVICE))
    end = time.monotonic() + PATIENCE_S
    while not (got := device.take_all()):  # the broker may take the subscription after the message
        assert time.monotonic() < end
        aggregator.transport.publish(T.reply(DEVICE), b"hello")
        time.sleep(0.02)
    assert got[0].payload == b"hello"


def test_a_retained_message_waits_for_those_who_come_later(join: Join) -> None:
    aggregator = join(AGGREGATOR)
    assert aggregator.transport.publish(T.run, b"first", retain=True)
    assert aggregator.transport.publish(T.run, b"second", retain=True)
    aggregator.wait(lambda: not aggregator.transport.busy)  # the broker has both
    early = join("dev-b", T.run)
    assert early.receive(T.run).payload == b"second"
    device = join(DEVICE, T.run)
    message = device.receive(T.run)
    assert (message.payload, message.retained) == (b"second", True)


def test_the_will_speaks_for_a_client_that_vanished(join: Join, world: World) -> None:
    aggregator = join(AGGREGATOR, T.presence("+"))
    device = join(DEVICE, will=Will(T.presence(DEVICE), b"gone"))
    device.transport.publish(T.presence(DEVICE), b"here", retain=True)
    assert aggregator.receive(T.presence(DEVICE)).payload == b"here"
    world.cut(DEVICE)
    assert aggregator.receive(T.presence(DEVICE)).payload == b"gone"
    device.down()


def test_a_client_that_stops_leaves_no_will_and_what_it_said_last(join: Join) -> None:
    aggregator = join(AGGREGATOR, T.presence("+"), T.control("+"))
    device = join(DEVICE, will=Will(T.presence(DEVICE), b"gone"))
    device.transport.publish(T.control(DEVICE), b"goodbye")
    device.transport.stop()
    device.transport.stop()
    assert not device.transport.connected
    assert not device.transport.publish(T.control(DEVICE), b"too late")
    assert aggregator.receive(T.control(DEVICE)).payload == b"goodbye"
    other = join("dev-b")
    other.transport.publish(T.control("dev-b"), b"mark")
    aggregator.receive(T.control("dev-b"))
    assert aggregator.take_all() == []


def test_subscriptions_survive_a_restart_of_the_broker(join: Join, world: World) -> None:
    aggregator = join(AGGREGATOR, T.control("+"))
    device = join(DEVICE, T.reply(DEVICE))
    world.stop_broker()
    aggregator.down()
    device.down()
    assert not device.transport.publish(T.control(DEVICE), b"nobody hears this")
    world.start_broker()
    aggregator.up()
    device.up()
    device.transport.publish(T.control(DEVICE), b"back")
    assert aggregator.receive(T.control(DEVICE)).payload == b"back"
    aggregator.transport.publish(T.reply(DEVICE), b"welcome")
    assert device.receive(T.reply(DEVICE)).payload == b"welcome"
    assert aggregator.take_all() == []


def test_subscriptions_survive_a_cut_link(join: Join, world: World) -> None:
    aggregator = join(AGGREGATOR)
    device = join(DEVICE, T.reply(DEVICE))
    world.cut(DEVICE)
    device.down()
    world.mend(DEVICE)
    device.up()
    aggregator.transport.publish(T.reply(DEVICE), b"welcome")
    assert device.receive(T.reply(DEVICE)).payload == b"welcome"


def test_before_the_start_nothing_is_sent_or_kept(world: World) -> None:
    transport = world.transport(DEVICE)
    assert not transport.connected
    assert transport.publish(T.control(DEVICE), b"x") is False
    transport.stop()


def test_the_largest_message_passes_and_a_larger_one_is_refused(join: Join) -> None:
    aggregator = join(AGGREGATOR, T.bulk("+"))
    device = join(DEVICE)
    with pytest.raises(ProtocolError, match="above the limit"):
        device.transport.publish(T.bulk(DEVICE), bytes(MAX_PAYLOAD_BYTES + 1))
    data = Random(1).randbytes(MAX_PAYLOAD_BYTES)
    assert device.transport.publish(T.bulk(DEVICE), data)
    assert aggregator.receive(T.bulk(DEVICE)).payload == data


def test_what_not_every_broker_serves_alike_is_refused(join: Join) -> None:
    device = join(DEVICE)
    for topic in ("", "a/+", "a/#", "$SYS/x", "/a", "a//b", "a b", "a\x00", "a\n"):
        with pytest.raises(ProtocolError):
            device.transport.publish(topic, b"x")
    for topic_filter in ("", "#", "a/#", "$share/g/a", "a/+b", "a//b"):
        with pytest.raises(ProtocolError):
            device.transport.subscribe(topic_filter)
    assert device.transport.connected


def test_the_description_names_the_broker(join: Join, world: World) -> None:
    description = join(DEVICE).transport.description
    expected = {"memory": "in memory", "amqtt": "(MQTT 3.1.1)"}.get(world.name, "(MQTT 5)")
    assert expected in description
    assert "secret" not in description


class Upload:
    """Both ends of one object's way to the aggregator, as the agent and the aggregator carry it."""

    def __init__(self, join: Join, folder: Path, size: int) -> None:
        data = Random(size).randbytes(size)
        self.path = folder / "update"
        self.path.write_bytes(data)
        self.digest, self.size = hashlib.sha256(data).hexdigest(), size
        self.transfer = transfer_id(NAMESPACE, DEVICE, "up/run/1", self.digest)
        self.parts = folder / "parts"
        self.sender = ObjectSender(self.transfer, self.path, size, CHUNK)
        self.receiver = ObjectReceiver.open(self.parts, self.digest, size, CHUNK)
        self.aggregator = join(AGGREGATOR, T.control("+"), T.bulk("+"))
        self.device = join(DEVICE, T.reply(DEVICE))
        self.most_in_flight = 0
        self.altered = 0
        self._seen = len(self.device.connections)
        self._asked = 0.0

    def step(self) -> None:
        """Handles what has arrived, sends what may go, and asks again where nothing moves."""
        now = time.monotonic()
        for message in self.aggregator.take_all():
            if is_chunk(message.payload):
                try:
                    chunk = decode_chunk(message.payload)
                except ProtocolError:
                    self.altered += 1
                    continue
                assert chunk.transfer == self.transfer
                self.receiver.accept(chunk)
            self.aggregator.transport.publish(T.reply(DEVICE), encode(self.receiver.have(DEVICE, WINDOW)))
        for message in self.device.take_all():
            self.sender.on_have(decode_as(message.payload, Have), now)
            self._asked = now
        if len(self.device.connections) > self._seen:
            self._seen = len(self.device.connections)
            self.sender.mark_lost()
            self._asked = 0.0
        if not self.device.transport.connected:
            return
        if now - self._asked > 0.5:
            self.device.transport.publish(T.control(DEVICE), b"where do we stand?")
            self._asked = now
        while (frame := self.sender.next_frame(now)) is not None:
            self.most_in_flight = max(self.most_in_flight, self.sender.in_flight)
            self.send(frame)

    def send(self, frame: bytes) -> None:
        self.device.transport.publish(T.bulk(DEVICE), frame)

    def run(self, done: Callable[[], bool] | None = None) -> None:
        end = time.monotonic() + 3 * PATIENCE_S
        while not (done or (lambda: self.sender.complete))():
            assert time.monotonic() < end
            self.step()
            time.sleep(0.001)


def test_an_object_travels_in_chunks_within_its_window(join: Join, tmp_path: Path) -> None:
    upload = Upload(join, tmp_path, 1_500_000)
    upload.run()
    assert upload.most_in_flight == WINDOW
    assert upload.sender.bytes_sent == upload.size
    assert upload.receiver.duplicate_bytes == 0
    final = upload.receiver.finish(ObjectStore(tmp_path / "store"))
    assert final.read_bytes() == upload.path.read_bytes()


def test_after_a_cut_no_more_than_a_window_goes_again(join: Join, world: World, tmp_path: Path) -> None:
    upload = Upload(join, tmp_path, 1_000_000)
    upload.run(lambda: upload.receiver.received_bytes >= 3 * CHUNK)
    world.cut(DEVICE)
    upload.device.down()
    # The receiving process dies with its memory, too.
    upload.receiver.close()
    upload.receiver = ObjectReceiver.open(upload.parts, upload.digest, upload.size, CHUNK)
    assert upload.receiver.received_bytes >= 3 * CHUNK
    world.mend(DEVICE)
    upload.device.up()
    upload.run()
    assert upload.sender.bytes_sent <= upload.size + WINDOW * CHUNK
    assert upload.receiver.duplicate_bytes <= WINDOW * CHUNK
    upload.receiver.finish(ObjectStore(tmp_path / "store"))


def test_an_altered_chunk_is_dropped_and_sent_again(join: Join, tmp_path: Path) -> None:
    upload = Upload(join, tmp_path, 5 * CHUNK)
    damaged = iter((True,))

    def send(frame: bytes) -> None:
        if next(damaged, False):
            frame = frame[:-1] + bytes([frame[-1] ^ 1])
        upload.device.transport.publish(T.bulk(DEVICE), frame)

    upload.send = send  # type: ignore[method-assign]
    upload.run(lambda: upload.altered > 0)
    upload.sender.mark_lost()  # as after the repeat timer, without waiting for it
    upload.run()
    assert upload.altered == 1
    upload.receiver.finish(ObjectStore(tmp_path / "store"))


def test_an_altered_object_is_refused(join: Join, tmp_path: Path) -> None:
    upload = Upload(join, tmp_path, 5 * CHUNK)
    upload.run(lambda: upload.receiver.received_bytes >= CHUNK)
    data = bytearray(upload.path.read_bytes())
    data[-1] ^= 1
    upload.path.write_bytes(data)
    upload.run()
    store = ObjectStore(tmp_path / "store")
    with pytest.raises(ContainerError, match="altered"):
        upload.receiver.finish(store)
    assert list(store.digests()) == []
    assert list(upload.parts.iterdir()) == []
