"""What the agent's core takes: messages, replies of the trainer, and what its owner wants."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.protocol.trainer import TrainerReply
from edge_sdk.transport.base import Connection, Inbound

__all__ = ["AgentEvent", "ExportRequest", "GateChanged", "GatesAltered", "Pause", "Resume", "Stop"]


@dataclass(frozen=True)
class Pause:
    """Start no new work and interrupt training; uploads go on."""


@dataclass(frozen=True)
class Resume:
    """May work again; an interrupted round is trained again."""


@dataclass(frozen=True)
class Stop:
    """End the agent; everything unfinished stays on disk."""


@dataclass(frozen=True)
class GateChanged:
    """A gate failed, for this reason; or, None, all pass again."""

    reason: str | None


@dataclass(frozen=True)
class GatesAltered:
    """There is another gate, or one less: look at them now."""


@dataclass(frozen=True)
class ExportRequest:
    """Write the newest version held as a PEFT folder, and put its path into ``result``."""

    result: Future[Path]


AgentEvent = (
    Inbound | Connection | TrainerReply | Pause | Resume | Stop | GateChanged | GatesAltered | ExportRequest
)
