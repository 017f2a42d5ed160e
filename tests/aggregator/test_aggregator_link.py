"""The server answers a link's measurement, of a device that takes no part too, and keeps nothing of it."""

from __future__ import annotations

from pathlib import Path

from fake_device import TOPICS, World

from aggregator.echo import LINK_BYTES
from edge_sdk.protocol.frames import decode_chunk, encode_chunk, is_chunk, link_transfer
from edge_sdk.protocol.wire import AggregatorState, Ping, Pong, decode, encode
from edge_sdk.transport.base import Connection, Inbound
from edge_sdk.transport.memory import MemoryTransport


def test_a_ping_a_frame_and_bytes_on_demand(tmp_path: Path) -> None:
    world = World(tmp_path)
    server = world.open()
    guest = MemoryTransport(world.broker, "guest")
    heard: list[bytes] = []

    def take(event: Inbound | Connection) -> None:
        if isinstance(event, Inbound):
            heard.append(event.payload)

    guest.subscribe(TOPICS.reply("guest"))
    guest.subscribe(TOPICS.aggregator)
    guest.start(take)
    world.pump()
    state = decode(heard[-1])
    assert isinstance(state, AggregatorState) and state.link_bytes == LINK_BYTES
    heard.clear()
    transfer = link_transfer(TOPICS.namespace, "guest")
    guest.publish(TOPICS.control("guest"), encode(Ping(device="guest", number=1)))
    guest.publish(TOPICS.control("guest"), encode(Ping(device="guest", number=2, wants=3000)))
    guest.publish(TOPICS.bulk("guest"), encode_chunk(transfer, 3, 0, bytes(500)))
    guest.publish(TOPICS.control("guest"), encode(Ping(device="other", number=4)))
    world.pump()
    pong, frame, received = heard
    assert decode(pong) == Pong(device="guest", number=1)
    assert is_chunk(frame)
    chunk = decode_chunk(frame)
    assert (chunk.transfer, chunk.index, len(chunk.payload)) == (transfer, 2, 3000)
    assert decode(received) == Pong(device="guest", number=3, bytes=500)
    assert "guest" not in server._running.fleet, "it measured, and is no device of the run"
    assert not list(server._folder.partials.iterdir())
    server.close()
