"""Findings about the broker: a real connection with the agent's own config, under a name of its own.

Many brokers know a client by its user name or certificate, whatever id it gives (the configuration that we
write for Mosquitto does): a second client would then throw out the agent that runs. So where one runs, it is
asked how it fares instead.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_sdk.agent.doctor.finding import Finding, of_error
from edge_sdk.agent.lock import holder
from edge_sdk.agent.reporting import folder_status, speaks_readably
from edge_sdk.clock import next_within
from edge_sdk.config.agent import AgentConfig
from edge_sdk.errors import BrokerError, EdgeError
from edge_sdk.protocol.topics import Topics
from edge_sdk.transport.base import Connection, Inbound, Transport
from edge_sdk.transport.mqtt import MqttTransport

__all__ = ["broker_findings"]

_GIVE_UP_S = 30.0

Connect = Callable[[AgentConfig], Transport]


def broker_findings(
    config: AgentConfig, *, connect: Connect | None = None, give_up_s: float = _GIVE_UP_S
) -> Iterator[Finding]:
    if speaks_readably(config):
        yield Finding(
            id="broker-security", level="warning",
            text=f"everything travels readable to {config.broker.url}, the password too",
            fix="use mqtts://, and take broker.insecure out",
        )  # fmt: skip
    pid = holder(Path(config.agent.state_dir))
    yield _told_by_agent(config, pid) if pid is not None else _tried(config, connect or _connect, give_up_s)


def _connect(config: AgentConfig) -> Transport:
    """The agent's own id is without the last word, so nobody is thrown out by this one."""
    return MqttTransport(config.broker, f"{config.broker.namespace}-{config.agent.id}-doctor")


def _tried(config: AgentConfig, connect: Connect, give_up_s: float) -> Finding:
    events: queue.SimpleQueue[Inbound | Connection] = queue.SimpleQueue()
    began = time.monotonic()
    try:
        transport = connect(config)
        transport.subscribe(Topics(config.broker.namespace).run)
        transport.start(events.put)
    except EdgeError as error:
        return of_error("broker", error)
    try:
        failure = _outcome(events, began + give_up_s)
        if failure is not None:
            return of_error("broker", failure)
        took = (time.monotonic() - began) * 1000
        return Finding(
            id="broker", level="ok", text=f"{transport.description} let this device in, in {took:.0f} ms"
        )
    finally:
        transport.stop()


def _outcome(events: queue.SimpleQueue[Inbound | Connection], end: float) -> EdgeError | None:
    """None: it is connected; else why not, at once where trying again cannot help."""
    last: EdgeError | None = None
    while (left := end - time.monotonic()) > 0:
        try:
            event = next_within(events, left)
        except queue.Empty:
            break
        if not isinstance(event, Connection):
            continue
        if event.up:
            return None
        if isinstance(event.error, EdgeError):
            last = event.error
        if event.final:
            break
    return last or BrokerError("the broker did not answer in time", "check the network and the firewall")


def _told_by_agent(config: AgentConfig, pid: int) -> Finding:
    try:
        status = folder_status(config)
    except EdgeError as error:
        return of_error("broker", error)
    who = f"the agent that runs (process {pid})"
    if status.get("connected"):
        text = f"{who} is connected to {status['broker']}; no second connection was made beside it"
        return Finding(id="broker", level="ok", text=text)
    said = f": {status['error']}" if status.get("error") else ""
    return Finding(
        id="broker", level="error", text=f"{who} has no connection to {status['broker']}{said}",
        fix="stop it, and ask again: the reason is told then", exit_code=BrokerError.exit_code,
    )  # fmt: skip
