"""The embedded broker: it comes up, says what it is, and never outlives who started it."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import pytest
from brokers import require_mosquitto
from peers import Peer

from aggregator.broker import embedded
from aggregator.broker.embedded import EmbeddedBroker, start_embedded
from edge_sdk.config.broker import BrokerConfig
from edge_sdk.errors import BrokerError, MissingExtraError
from edge_sdk.transport.mqtt import MqttTransport

Kind = Literal["mosquitto", "amqtt"]


@pytest.fixture(params=["mosquitto", "amqtt"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "mosquitto":
        require_mosquitto()
        return "mosquitto"
    pytest.importorskip("amqtt")
    return "amqtt"


def wait(done: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.02)
    return False


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_runs_says_what_it_is_and_ends(tmp_path: Path, kind: Kind) -> None:
    broker = start_embedded(tmp_path, prefer=kind)
    assert broker.kind.startswith(f"{kind} ")
    assert broker.kind.split()[1][0].isdigit()
    assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
    peer = Peer(MqttTransport(BrokerConfig(url=broker.url), "client")).up()
    peer.transport.stop()
    assert broker.alive
    broker.stop()
    broker.stop()
    assert not broker.alive
    assert gone(broker.pid)


def test_it_listens_on_loopback_alone(tmp_path: Path, kind: Kind) -> None:
    with start_embedded(tmp_path, prefer=kind) as broker:
        listening = [
            connection.laddr
            for connection in psutil.Process(broker.pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_it_starts_again_on_its_port(tmp_path: Path, kind: Kind) -> None:
    broker = start_embedded(tmp_path, prefer=kind)
    os.kill(broker.pid, signal.SIGKILL)
    assert wait(lambda: not broker.alive)
    broker.stop()
    with start_embedded(tmp_path, broker.port, prefer=kind) as again:
        assert again.port == broker.port
        assert again.pid != broker.pid


def test_it_dies_with_its_parent_by_kill_9(tmp_path: Path, kind: Kind) -> None:
    code = (
        "import sys, threading, time\n"
        "from pathlib import Path\n"
        "from aggregator.broker.embedded import start_embedded\n"
        # Started in a thread that ends at once: the broker must live on all the same.
        "def start():\n"
        "    global broker\n"
        "    broker = start_embedded(Path(sys.argv[1]), prefer=sys.argv[2])\n"
        "thread = threading.Thread(target=start)\n"
        "thread.start(); thread.join()\n"
        "time.sleep(0.2)\n"
        "assert broker.alive\n"
        "print(broker.pid, broker.leash.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), kind], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        broker, leash = map(int, parent.stdout.readline().split())
        assert not gone(broker)
        parent.kill()
    assert wait(lambda: gone(broker))
    assert wait(lambda: gone(leash))


def test_a_taken_port_is_told(tmp_path: Path, kind: Kind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(BrokerError, match=f"did not start on port {port}: .*in use"):
            start_embedded(tmp_path, port, prefer=kind)


def test_a_port_lost_to_another_is_tried_anew(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = [server.getsockname()[1], embedded._free_port()]
        monkeypatch.setattr(embedded, "_free_port", lambda: ports.pop(0))
        with start_embedded(tmp_path, prefer=kind) as broker:
            assert broker.port != server.getsockname()[1]


def test_many_start_side_by_side(tmp_path: Path) -> None:
    require_mosquitto()
    brokers: list[EmbeddedBroker] = []

    def start(number: int) -> None:
        brokers.append(start_embedded(tmp_path / str(number)))

    threads = [threading.Thread(target=start, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({broker.port for broker in brokers}) == 4
    for broker in brokers:
        broker.stop()


def test_without_mosquitto_it_is_amqtt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("amqtt")
    monkeypatch.setattr(embedded, "find_mosquitto", lambda: None)
    with start_embedded(tmp_path) as broker:
        assert broker.kind.startswith("amqtt ")
    with pytest.raises(BrokerError, match="Debian package mosquitto"):
        start_embedded(tmp_path, prefer="mosquitto")


def test_without_either_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_mosquitto", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"edge-sdk\[server\]"):
        start_embedded(tmp_path)


@pytest.mark.parametrize(("text", "expected"), [("mosquitto version 1.6.12", None), ("nonsense", None)])
def test_an_old_mosquitto_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str | None
) -> None:
    program = tmp_path / "mosquitto"
    program.write_text(f"#!/bin/sh\necho '{text}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert embedded.find_mosquitto() is expected
