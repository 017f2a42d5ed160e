"""What is particular to MQTT: refusals told apart, limits of the broker, versions, access lists."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from brokers import AGGREGATOR, NAMESPACE, Authority, MqttWorld, TlsWorld, require_mosquitto
from peers import Peer

from aggregator.broker.embedded import EmbeddedBroker, _free_port, find_mosquitto, start_leashed
from edge_sdk.config.broker import BrokerConfig, TlsConfig
from edge_sdk.errors import BrokerError, ConfigError, CredentialsError, ProtocolError
from edge_sdk.protocol.frames import encode_chunk
from edge_sdk.protocol.topics import Topics
from edge_sdk.transport import mqtt
from edge_sdk.transport.access import broker_access
from edge_sdk.transport.base import Connection, Inbound, Will
from edge_sdk.transport.mqtt import MqttTransport
from edge_sdk.transport.mqtt_errors import NotYetValidError, tls_error

T = Topics(NAMESPACE)


@pytest.fixture
def by_certificate(tmp_path: Path, authority: Authority) -> Iterator[TlsWorld]:
    require_mosquitto()
    world = TlsWorld(tmp_path / "broker", authority, passwords=False)
    yield world
    world.close()


@pytest.fixture
def by_password(tmp_path: Path, authority: Authority) -> Iterator[TlsWorld]:
    require_mosquitto()
    world = TlsWorld(tmp_path / "broker", authority, passwords=True)
    yield world
    world.close()


def refusal(config: BrokerConfig, client: str = "dev-a") -> Connection:
    """What a client is told first."""
    transport = MqttTransport(config, client)
    peer = Peer(transport, will=Will(T.presence(client), b"gone"))
    try:
        peer.wait(lambda: bool(peer.connections))
    finally:
        transport.stop()
    first = peer.connections[0]
    assert not first.up
    assert isinstance(first.error, BrokerError)
    return first


def test_nobody_there(tmp_path: Path) -> None:
    told = refusal(BrokerConfig(url=f"mqtt://127.0.0.1:{_free_port()}"))
    assert not isinstance(told.error, CredentialsError)
    assert not told.final
    assert "no broker answers at mqtt://127.0.0.1:" in str(told.error)


def test_it_is_found_once_it_is_there(embedded_broker: EmbeddedBroker, tmp_path: Path) -> None:
    require_mosquitto()
    world = MqttWorld("mosquitto", tmp_path)
    world.stop_broker()
    peer = Peer(MqttTransport(BrokerConfig(url=world.broker.url), "early"))
    peer.down()
    world.start_broker()
    peer.up()
    peer.transport.stop()
    world.close()


def test_a_port_where_something_else_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        told = refusal(BrokerConfig(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}"))
        server.shutdown(socket.SHUT_RDWR)
    assert not told.final
    assert "without an answer" in str(told.error) or "lost" in str(told.error)


def test_a_wrong_password(by_password: TlsWorld, tmp_path: Path) -> None:
    config = by_password.config("dev-a")
    wrong = tmp_path / "wrong"
    wrong.write_text("guess")
    told = refusal(msgspec.structs.replace(config, password_file=str(wrong)))
    assert isinstance(told.error, CredentialsError)
    assert told.final
    assert "password_file" in str(told.error)
    assert "guess" not in str(told.error)


def test_no_password_at_all(by_password: TlsWorld) -> None:
    config = by_password.config("dev-a")
    told = refusal(msgspec.structs.replace(config, username=None, password_file=None))
    assert isinstance(told.error, CredentialsError)
    assert told.final


def test_a_password_file_that_went_away(by_password: TlsWorld, tmp_path: Path) -> None:
    config = by_password.config("dev-a")
    transport = MqttTransport(config, "dev-a")
    Path(str(config.password_file)).unlink()
    peer = Peer(transport)
    peer.wait(lambda: bool(peer.connections))
    transport.stop()
    assert isinstance(peer.connections[0].error, CredentialsError)
    assert "cannot be read" in str(peer.connections[0].error)


def test_a_new_password_is_read_at_the_next_try(
    by_password: TlsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "_MOST_DELAY_S", 0.2)
    config = by_password.config("dev-a")
    secret = Path(str(config.password_file))
    right = secret.read_text()
    secret.write_text("guess")
    peer = Peer(MqttTransport(config, "dev-a")).down()
    secret.write_text(right)
    peer.up()
    peer.transport.stop()


def test_a_certificate_of_another_authority(by_certificate: TlsWorld, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "Other CA")
    config = by_certificate.config("dev-a")
    tls = TlsConfig(ca=config.tls.ca, cert=str(other.cert("dev-a")), key=str(other.key("dev-a")))
    told = refusal(msgspec.structs.replace(config, tls=tls))
    assert isinstance(told.error, CredentialsError)
    assert told.final
    assert "refused this device's certificate" in str(told.error)
    assert "1970" in str(told.error)


def test_no_certificate_where_one_is_required(by_certificate: TlsWorld) -> None:
    config = by_certificate.config("dev-a")
    told = refusal(msgspec.structs.replace(config, tls=TlsConfig(ca=config.tls.ca)))
    assert isinstance(told.error, CredentialsError)
    assert told.final


def test_a_broker_of_another_authority(by_certificate: TlsWorld, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "Other CA")
    config = by_certificate.config("dev-a")
    told = refusal(msgspec.structs.replace(config, tls=msgspec.structs.replace(config.tls, ca=str(other.ca))))
    assert isinstance(told.error, CredentialsError)
    assert told.final
    assert "certificate of mqtts://127.0.0.1" in str(told.error)
    assert "1970" in str(told.error)


def test_a_certificate_from_the_future_may_become_right(authority: Authority) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = 9, "certificate is not yet valid"
    access = broker_access(BrokerConfig(url="mqtts://broker.example"))
    told = tls_error(access, error)
    assert isinstance(told, NotYetValidError)
    assert isinstance(told, CredentialsError)
    assert "clock" in str(told)


def test_tls_to_a_plain_port(embedded_broker: EmbeddedBroker, authority: Authority) -> None:
    told = refusal(
        BrokerConfig(url=embedded_broker.url.replace("mqtt:", "mqtts:"), tls=TlsConfig(ca=str(authority.ca)))
    )
    assert not told.final
    assert "does not speak TLS" in str(told.error)


def test_plain_to_a_tls_port(by_certificate: TlsWorld) -> None:
    told = refusal(BrokerConfig(url=by_certificate.broker.url))
    assert not told.final
    assert "mqtts://" in str(told.error)


def test_a_section_that_cannot_work_is_refused_at_once(tmp_path: Path, authority: Authority) -> None:
    missing = str(tmp_path / "missing")
    no_pem = tmp_path / "no-pem"
    no_pem.write_text("hello")
    for config, text in (
        (BrokerConfig(), "aggregator alone"),
        (BrokerConfig(url="mqtt://192.0.2.1"), "insecure = true"),
        (BrokerConfig(url="http://localhost"), "broker.url"),
        (BrokerConfig(url="mqtt://localhost", username="me", password_file=missing), "no file"),
        (BrokerConfig(url="mqtts://localhost", tls=TlsConfig(ca=missing)), "broker.tls.ca"),
    ):
        with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
            MqttTransport(config, "dev-a")
    peer = Peer(MqttTransport(BrokerConfig(url="mqtts://localhost", tls=TlsConfig(ca=str(no_pem))), "dev-a"))
    peer.wait(lambda: bool(peer.connections))
    peer.transport.stop()
    assert isinstance(peer.connections[0].error, ConfigError)


def test_insecure_by_leave_is_told() -> None:
    assert MqttTransport(BrokerConfig(url="mqtt://192.0.2.1", insecure=True), "dev-a").insecure
    assert not MqttTransport(BrokerConfig(url="mqtt://127.0.0.1"), "dev-a").insecure


def test_a_device_cannot_speak_for_another(
    by_certificate: TlsWorld, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    aggregator = Peer(by_certificate.transport(AGGREGATOR), start=False)
    aggregator.transport.subscribe(T.control("+"))
    aggregator.start()
    aggregator.up()
    # Under another's client id, too: the broker gives it that of its certificate.
    thief = MqttTransport(by_certificate.config("dev-a"), "dev-b")
    peer = Peer(thief).up()
    other = Peer(by_certificate.transport("dev-b")).up()
    thief.publish(T.control("dev-b"), b"I am dev-b")
    thief.publish(T.control("dev-a"), b"I am dev-a")
    assert aggregator.receive(T.control("dev-a")).payload == b"I am dev-a"
    assert aggregator.take_all() == []
    peer.wait(lambda: "refused a message" in caplog.text)
    assert thief.connected
    assert other.transport.connected
    thief.stop()


@pytest.fixture
def small_packets(tmp_path: Path) -> Iterator[BrokerConfig]:
    program, port = require_mosquitto(), _free_port()
    config = tmp_path / "small.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_packet_size 20000\nlog_dest stderr\n"
    )
    leash, pid = start_leashed([program, "-c", str(config)], tmp_path / "log", port)
    with EmbeddedBroker(port, "mosquitto", pid, tmp_path / "log", leash) as broker:
        yield BrokerConfig(url=broker.url)


def test_the_brokers_packet_limit_is_honoured(small_packets: BrokerConfig) -> None:
    peer = Peer(MqttTransport(small_packets, "dev-a"), start=False)
    peer.transport.subscribe(T.bulk("dev-a"))
    peer.start()
    peer.up()
    with pytest.raises(ProtocolError, match="chunk_kib"):
        peer.transport.publish(T.bulk("dev-a"), bytes(20_000))
    most = 20_000 - 64 - len(T.bulk("dev-a"))
    assert peer.transport.publish(T.bulk("dev-a"), bytes(most))
    assert len(peer.receive(T.bulk("dev-a")).payload) == most
    assert [c.up for c in peer.connections] == [True]
    peer.transport.stop()


def test_a_consumer_that_fails_does_not_stop_the_transport(embedded_broker: EmbeddedBroker) -> None:
    seen: list[Inbound | Connection] = []
    arrived = threading.Event()

    def deliver(event: Inbound | Connection) -> None:
        seen.append(event)
        if isinstance(event, Inbound) and event.payload == b"second":
            arrived.set()
        raise RuntimeError("a bug of the consumer")

    transport = MqttTransport(BrokerConfig(url=embedded_broker.url, namespace="bugs"), "bugs-1")
    transport.subscribe("bugs/x")
    transport.start(deliver)
    waiting = Peer(MqttTransport(BrokerConfig(url=embedded_broker.url), "bugs-2")).up()
    waiting.wait(lambda: transport.connected)
    assert transport.publish("bugs/x", b"first")
    assert transport.publish("bugs/x", b"second")
    assert arrived.wait(10)
    transport.stop()
    waiting.transport.stop()


def test_many_threads_may_publish_and_nothing_is_lost(embedded_broker: EmbeddedBroker) -> None:
    receiver = Peer(MqttTransport(BrokerConfig(url=embedded_broker.url), "crowd-in"), start=False)
    receiver.transport.subscribe("crowd/+")
    receiver.start()
    receiver.up()
    sender = Peer(MqttTransport(BrokerConfig(url=embedded_broker.url), "crowd-out")).up()

    def publish(number: int) -> None:
        for index in range(100):
            assert sender.transport.publish(f"crowd/{number}", b"%d" % index)

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got: dict[str, list[bytes]] = {}

    def all_there() -> bool:
        for message in receiver.take_all():
            got.setdefault(message.topic, []).append(message.payload)
        return sum(map(len, got.values())) == 400

    receiver.wait(all_there)
    assert all(payloads == [b"%d" % i for i in range(100)] for payloads in got.values())
    sender.transport.stop()
    receiver.transport.stop()


def test_a_slow_link_pushes_back_instead_of_filling_memory(tmp_path: Path) -> None:
    require_mosquitto()
    world = MqttWorld("mosquitto", tmp_path)
    peer = Peer(world.transport("dev-a")).up()
    peer.wait(lambda: not peer.transport.busy)
    with_nobody_reading = 0
    # The broker's process is stopped: what is written to it stays here.
    subprocess.run(["kill", "-STOP", str(world.broker.pid)], check=True)
    payload = bytes(256 * 1024)
    while with_nobody_reading < 200 and peer.transport.publish(T.bulk("dev-a"), payload):
        with_nobody_reading += 1
    assert peer.transport.busy
    subprocess.run(["kill", "-CONT", str(world.broker.pid)], check=True)
    assert with_nobody_reading * len(payload) < 32 * 1024 * 1024
    peer.wait(lambda: peer.transport.publish(T.bulk("dev-a"), payload))
    peer.wait(lambda: not peer.transport.busy)
    world.close()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[MqttWorld, Peer, Peer]]:
    """A broker, who watches a device, and the device."""
    require_mosquitto()
    world = MqttWorld("mosquitto", tmp_path)
    watcher = Peer(world.transport(AGGREGATOR), start=False)
    for topic_filter in (T.presence("+"), T.bulk("+")):
        watcher.transport.subscribe(topic_filter)
    watcher.start()
    watcher.up()
    device = Peer(world.transport("dev-a"), will=Will(T.presence("dev-a"), b"will")).up()
    yield world, watcher, device
    for peer in (device, watcher):
        peer.transport.stop()
    world.close()


def test_a_goodbye_that_is_not_acknowledged_leaves_the_word_to_the_will(
    watched: tuple[MqttWorld, Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, watcher, device = watched
    monkeypatch.setattr(mqtt, "_DRAIN_S", 0.3)
    subprocess.run(["kill", "-STOP", str(world.broker.pid)], check=True)
    for _ in range(30):  # more than may be unacknowledged
        device.transport.publish(T.bulk("dev-a"), b"small")
    device.transport.publish(T.presence("dev-a"), b"goodbye", retain=True)
    left: list[object] = []
    monkeypatch.setattr(mqtt.Link, "leave", lambda *words: left.append(words))
    device.transport.stop()
    assert not left
    subprocess.run(["kill", "-CONT", str(world.broker.pid)], check=True)
    assert watcher.receive(T.presence("dev-a")).payload == b"will"


def test_a_goodbye_does_not_wait_behind_chunks(watched: tuple[MqttWorld, Peer, Peer]) -> None:
    world, watcher, device = watched
    subprocess.run(["kill", "-STOP", str(world.broker.pid)], check=True)
    for index in range(300):
        device.transport.publish(T.bulk("dev-a"), encode_chunk(bytes(16), index, 0, b"x"))
    device.transport.publish(T.presence("dev-a"), b"goodbye", retain=True)
    stopping = threading.Thread(target=device.transport.stop)
    stopping.start()
    stopping.join(0.3)
    subprocess.run(["kill", "-CONT", str(world.broker.pid)], check=True)
    assert watcher.receive(T.presence("dev-a")).payload == b"goodbye"
    stopping.join(10)
    assert len(watcher.take_all()) < 50


def test_two_clients_with_one_id_are_told_so(embedded_broker: EmbeddedBroker) -> None:
    if not embedded_broker.kind.startswith("mosquitto"):
        pytest.skip("amqtt does not evict")
    config = BrokerConfig(url=embedded_broker.url)
    twins = [Peer(MqttTransport(config, "twin")) for _ in range(2)]
    twins[0].wait(
        lambda: any("does another client" in str(c.error) for twin in twins for c in twin.connections)
    )
    for twin in twins:
        twin.transport.stop()


def test_it_starts_again_after_a_stop(embedded_broker: EmbeddedBroker) -> None:
    transport = MqttTransport(BrokerConfig(url=embedded_broker.url), "again")
    for _ in range(2):
        peer = Peer(transport).up()
        with pytest.raises(RuntimeError):
            transport.start(lambda _: None)
        transport.stop()
        assert not transport.connected
        assert [c.up for c in peer.connections] == [True]


def test_it_stops_while_it_cannot_connect() -> None:
    peer = Peer(MqttTransport(BrokerConfig(url=f"mqtt://127.0.0.1:{_free_port()}"), "alone")).down()
    peer.transport.stop()
    count = len(peer.connections)
    assert not peer.transport.publish("a/b", b"x")
    assert len(peer.connections) == count


def test_the_transport_is_light() -> None:
    code = (
        "import sys\n"
        "import edge_sdk.transport.mqtt, edge_sdk.transport.sending, edge_sdk.transport.receiving\n"
        "import edge_sdk.transport.outbox\n"
        "heavy = {'torch', 'numpy', 'asyncio', 'safetensors', 'sqlalchemy', 'amqtt'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("failures", [1, 2, 5, 50])
def test_delays_grow_with_jitter_and_stay_bounded(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "_FIRST_DELAY_S", 1.0)
    drawn: Callable[[], float] = lambda: mqtt._delay(failures, slow=False)  # noqa: E731
    values = [drawn() for _ in range(200)]
    most = min(60.0, 2.0 ** (failures - 1))
    assert all(0 <= value <= most for value in values)
    assert max(values) > most / 2
    assert min(values) < most / 2


def test_mosquitto_is_found_where_debian_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_mosquitto()
    monkeypatch.setenv("PATH", "/usr/bin")
    assert find_mosquitto() is not None
