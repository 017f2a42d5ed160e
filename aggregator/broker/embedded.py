"""The broker that comes with the aggregator: loopback only, no accounts, nothing on disk but its log.

Mosquitto where it is installed, as an unprivileged child with a generated config, else amqtt in a process
of its own. Either runs under a leash: a shell that waits for the end of its standard input, which the
system closes when the aggregator dies in whatever way, and then kills the broker.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Literal

import psutil

from edge_sdk.errors import BrokerError, MissingExtraError
from edge_sdk.transport.rules import MAX_PAYLOAD_BYTES

__all__ = ["EmbeddedBroker", "find_mosquitto", "mosquitto_version", "start_embedded", "start_leashed"]

LOOPBACK = "127.0.0.1"
MAX_PACKET_BYTES = MAX_PAYLOAD_BYTES + 1024
"""A little above the largest message: its topic and header."""

_START_S = 20.0
_TRIES = 5
_RUNNING = " running"
# A background job of a shell without job control ignores SIGINT: the leash decides when it ends.
_LEASH = '"$@" </dev/null >&2 & echo $!; read -r _; kill -9 $! 2>/dev/null; wait'

_MOSQUITTO_CONFIG = """\
# Generated at every start; changes are lost.
listener {port} {host}
allow_anonymous true
set_tcp_nodelay true
persistence false
max_packet_size {packet}
max_inflight_messages 32
max_queued_messages 4000
max_queued_bytes 67108864
memory_limit 536870912
log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
connection_messages false
"""


@dataclass
class EmbeddedBroker:
    """A running broker. ``stop`` ends it; so does the death of this process."""

    port: int
    kind: str
    """Which one, with its version: ``mosquitto 2.0.11``, ``amqtt 0.12.1``."""
    pid: int
    log: Path
    leash: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"mqtt://{LOOPBACK}:{self.port}"

    @property
    def alive(self) -> bool:
        return _alive(self.pid)

    def stop(self) -> None:
        """Ends the broker; may be called twice."""
        if self.leash.poll() is not None:
            return
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            _wait(lambda: not self.alive, 2.0)
        _end(self.leash)

    def __enter__(self) -> EmbeddedBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_embedded(
    folder: Path, port: int = 0, prefer: Literal["mosquitto", "amqtt"] | None = None
) -> EmbeddedBroker:
    """Starts a broker on loopback, and returns when it accepts connections.

    Args:
        folder: for its config and its log; made where it does not exist.
        port: 0: any free one.
        prefer: insist on one kind; None: Mosquitto where there is one, else amqtt.

    Raises BrokerError when it does not come up, MissingExtraError when there is neither.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mosquitto = find_mosquitto() if prefer != "amqtt" else None
    if prefer == "mosquitto" and mosquitto is None:
        raise BrokerError("there is no mosquitto 2.0 or later", "install the Debian package mosquitto")
    if mosquitto is None and importlib.util.find_spec("amqtt") is None:
        raise MissingExtraError(
            "there is neither mosquitto nor amqtt to run the embedded broker",
            "install the package mosquitto, or edge-sdk[server]",
        )
    for attempt in range(_TRIES):
        chosen = port or _free_port()
        kind, command = (
            _amqtt_command(chosen) if mosquitto is None else _mosquitto_command(mosquitto, folder, chosen)
        )
        name = kind.split()[0]
        try:
            leash, pid = start_leashed(command, folder / f"{name}.log", chosen)
        except BrokerError:
            # Another process may have taken the port between our look and the broker's.
            if port or attempt == _TRIES - 1:
                raise
            continue
        return EmbeddedBroker(chosen, kind, pid, folder / f"{name}.log", leash)
    raise AssertionError("unreachable")


def start_leashed(command: list[str], log: Path, port: int) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a broker's ``command`` on the leash; returns the leash and the broker's pid once it runs.

    The broker says so by a line in its log that ends with ``running``. Raises BrokerError with the end of
    its log when it does not.
    """
    with log.open("wb") as errors:
        leash = subprocess.Popen(
            ["/bin/sh", "-c", _LEASH, "leash", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C in the terminal is for the aggregator alone
        )
    if leash.stdout is None:
        raise AssertionError("unreachable")
    with leash.stdout as said:
        pid = int(said.readline())
    up = _wait(lambda: _says_running(log) or not _alive(pid), _START_S)
    if up and _alive(pid):
        return leash, pid
    _end(leash)
    raise BrokerError(
        f"the broker {Path(command[0]).name} did not start on port {port}: {_last_line(log)}",
        f"its log is {log}; is the port taken?",
    )


def find_mosquitto() -> str | None:
    """Path of a Mosquitto 2.0 or later; Debian puts it where ordinary users' PATH does not lead."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"))
    found = shutil.which("mosquitto", path=path)
    return found if found is not None and int(mosquitto_version(found).split(".")[0]) >= 2 else None


def mosquitto_version(program: str) -> str:
    """``2.0.11``; ``0`` where the program does not tell."""
    try:
        help_text = subprocess.run([program, "-h"], capture_output=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "0"
    found = re.search(rb"mosquitto version (\d[\w.]*)", help_text)
    return found.group(1).decode() if found else "0"


def _mosquitto_command(program: str, folder: Path, port: int) -> tuple[str, list[str]]:
    config = folder / "mosquitto.conf"
    config.write_text(
        _MOSQUITTO_CONFIG.format(host=LOOPBACK, port=port, packet=MAX_PACKET_BYTES), encoding="utf-8"
    )
    return f"mosquitto {mosquitto_version(program)}", [program, "-c", str(config)]


def _amqtt_command(port: int) -> tuple[str, list[str]]:
    command = [sys.executable, "-m", "aggregator.broker.amqtt_process", LOOPBACK, str(port)]
    return f"amqtt {version('amqtt')}", command


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _says_running(log: Path) -> bool:
    return any(line.rstrip().endswith(_RUNNING) for line in _lines(log))


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in _lines(log) if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["it says nothing"])[-1]


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.02)
    return False


def _end(leash: subprocess.Popen[bytes]) -> None:
    if leash.stdin is not None:
        leash.stdin.close()
    try:
        leash.wait(timeout=5)
    except subprocess.TimeoutExpired:
        leash.kill()
        leash.wait()
