"""The worlds that the contract of the transport is tested in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brokers import Authority, MemoryWorld, MqttWorld, TlsWorld, World, require_mosquitto
from peers import Peer

from edge_sdk.transport import mqtt
from edge_sdk.transport.base import Will

WORLDS = ("memory", "mosquitto", "amqtt", "tls-certificate", "tls-password")


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "_FIRST_DELAY_S", 0.05)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    made: World
    if request.param == "memory":
        made = MemoryWorld()
    elif request.param == "amqtt":
        pytest.importorskip("amqtt")
        made = MqttWorld("amqtt", tmp_path / "broker")
    else:
        require_mosquitto()
        if request.param == "mosquitto":
            made = MqttWorld("mosquitto", tmp_path / "broker")
        else:
            authority = request.getfixturevalue("authority")
            made = TlsWorld(tmp_path / "broker", authority, passwords=request.param == "tls-password")
    yield made
    made.close()


@pytest.fixture
def join(world: World) -> Iterator[Callable[..., Peer]]:
    """Connects a client: ``join("dev-a", "topic/+", will=...)``."""
    peers: list[Peer] = []

    def connect(client: str, *filters: str, will: Will | None = None) -> Peer:
        peer = Peer(world.transport(client), start=False)
        for topic_filter in filters:
            peer.transport.subscribe(topic_filter)
        peer.start(will)
        peers.append(peer)
        return peer.up()

    yield connect
    for peer in peers:
        peer.transport.stop()
