"""Brokers for tests: one kind of world each, with links that can be cut and brokers that can be restarted."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Protocol

import pytest

from aggregator.broker.embedded import (
    EmbeddedBroker,
    _free_port,
    find_mosquitto,
    mosquitto_version,
    start_embedded,
    start_leashed,
)
from aggregator.broker.mosquitto_config import write_mosquitto_config
from edge_sdk.config.broker import BrokerConfig, TlsConfig
from edge_sdk.transport.base import Transport
from edge_sdk.transport.memory import MemoryBroker, MemoryTransport
from edge_sdk.transport.mqtt import MqttTransport

NAMESPACE = "edge"
AGGREGATOR = "aggregator"
DEVICES = ("dev-a", "dev-b")
CLIENTS = (AGGREGATOR, *DEVICES)


def require_mosquitto() -> str:
    """Path of Mosquitto; skips where it is not installed, and fails there in CI."""
    found = find_mosquitto()
    if found is None:
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse("needs the Debian package mosquitto")
    return found


class Cable:
    """A TCP link to a port of this machine, which can be cut (with a reset) and mended."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._whole = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            self._whole = False
            ends, self._ends = self._ends, set()
        for end in ends:
            _reset(end)

    def mend(self) -> None:
        with self._lock:
            self._whole = True

    def close(self) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    _reset(near)
                    continue
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    if self._whole:
                        self._ends |= {near, far}
                if near not in self._ends:
                    _reset(near)
                    _reset(far)
                    continue
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with self._lock:
            self._ends -= {source, sink}
        _reset(source)
        _reset(sink)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


class World(Protocol):
    """A broker and the links to it."""

    name: str

    def transport(self, client: str) -> Transport: ...

    def cut(self, client: str) -> None: ...

    def mend(self, client: str) -> None: ...

    def stop_broker(self) -> None: ...

    def start_broker(self) -> None:
        """Again, where it was before."""
        ...

    def close(self) -> None: ...


class MemoryWorld:
    name = "memory"

    def __init__(self) -> None:
        self._broker = MemoryBroker()

    def transport(self, client: str) -> Transport:
        return MemoryTransport(self._broker, client)

    def cut(self, client: str) -> None:
        self._broker.drop(client)

    def mend(self, client: str) -> None:
        self._broker.restore(client)

    def stop_broker(self) -> None:
        self._broker.stop()

    def start_broker(self) -> None:
        self._broker.start()

    def close(self) -> None:
        pass


class MqttWorld:
    """Every client has a cable of its own to the broker."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self._cables: dict[str, Cable] = {}
        self._started: list[Transport] = []
        self.broker: EmbeddedBroker
        self.start_broker()

    def start_broker(self) -> None:
        port = self.broker.port if hasattr(self, "broker") else 0
        self.broker = self._start(port)

    def _start(self, port: int) -> EmbeddedBroker:
        kind = "mosquitto" if self.name == "mosquitto" else "amqtt"
        return start_embedded(self.folder, port, prefer=kind)

    def config(self, client: str) -> BrokerConfig:
        return BrokerConfig(url=f"mqtt://127.0.0.1:{self._cable(client).port}", namespace=NAMESPACE)

    def transport(self, client: str) -> Transport:
        transport = MqttTransport(self.config(client), client)
        self._started.append(transport)
        return transport

    def cut(self, client: str) -> None:
        self._cable(client).cut()

    def mend(self, client: str) -> None:
        self._cable(client).mend()

    def stop_broker(self) -> None:
        self.broker.stop()

    def close(self) -> None:
        for transport in self._started:
            transport.stop()
        for cable in self._cables.values():
            cable.close()
        self.broker.stop()

    def _cable(self, client: str) -> Cable:
        if client not in self._cables:
            self._cables[client] = Cable(self.broker.port)
        return self._cables[client]


class TlsWorld(MqttWorld):
    """A Mosquitto with the generated config: clients prove themselves by certificate or by password."""

    def __init__(self, folder: Path, authority: Authority, *, passwords: bool) -> None:
        self._authority = authority
        self._passwords = passwords
        super().__init__("tls-password" if passwords else "tls-certificate", folder)

    def _start(self, port: int) -> EmbeddedBroker:
        program = require_mosquitto()
        port = port or _free_port()
        config = write_mosquitto_config(
            self.folder,
            NAMESPACE,
            ca=self._authority.ca,
            cert=self._authority.cert("broker"),
            key=self._authority.key("broker"),
            port=port,
            bind="127.0.0.1",
            passwords=self._accounts() if self._passwords else None,
            # The test's files belong to this user alone.
            user="root" if os.geteuid() == 0 else None,
        )
        log = self.folder / "mosquitto.log"
        leash, pid = start_leashed([program, "-c", str(config)], log, port)
        return EmbeddedBroker(port, f"mosquitto {mosquitto_version(program)}", pid, log, leash)

    def config(self, client: str) -> BrokerConfig:
        ca = str(self._authority.ca)
        url = f"mqtts://127.0.0.1:{self._cable(client).port}"
        if self._passwords:
            secret = self.folder / f"{client}.password"
            secret.write_text(f"secret of {client}\n")
            return BrokerConfig(
                url=url,
                namespace=NAMESPACE,
                username=client,
                password_file=str(secret),
                tls=TlsConfig(ca=ca),
            )
        cert, key = self._authority.cert(client), self._authority.key(client)
        return BrokerConfig(url=url, namespace=NAMESPACE, tls=TlsConfig(ca=ca, cert=str(cert), key=str(key)))

    def _accounts(self) -> Path:
        path = self.folder / "passwords"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            path.touch(0o600)
            for client in CLIENTS:
                _run("mosquitto_passwd", "-b", str(path), client, f"secret of {client}")
        return path


class Authority:
    """A certificate authority in a folder, made with the openssl command."""

    def __init__(self, folder: Path, name: str = "Test CA") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = folder / "ca.crt"
        _run(
            *("openssl", "req", "-x509", *_NEW_KEY, "-keyout", str(folder / "ca.key"), "-out", str(self.ca)),
            *("-subj", f"/CN={name}", "-days", "2", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )

    def cert(self, name: str) -> Path:
        """Certificate of ``name`` (its common name), valid for 127.0.0.1 and localhost."""
        path = self.folder / f"{name}.crt"
        if not path.exists():
            request, extra = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
            extra.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
            _run(
                *("openssl", "req", "-new", *_NEW_KEY, "-keyout", str(self.key(name)), "-out", str(request)),
                *("-subj", f"/CN={name}"),
            )
            _run(
                *("openssl", "x509", "-req", "-in", str(request), "-out", str(path), "-days", "2"),
                *("-CA", str(self.ca), "-CAkey", str(self.folder / "ca.key"), "-CAcreateserial"),
                *("-extfile", str(extra)),
            )
        return path

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
