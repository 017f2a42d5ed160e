"""Asking a trainer, and waiting for its answer."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import TypeVar

from edge_sdk.errors import TrainerError
from edge_sdk.protocol.trainer import Died, Failed, Progress, TrainerHost, TrainerReply, TrainerRequest

__all__ = ["Asker"]

_Reply = TypeVar("_Reply")


class Asker:
    """A TrainerHost, in a process of its own or in this one, that is asked and answers."""

    def __init__(self, host: TrainerHost) -> None:
        self._host = host
        self._replies: queue.SimpleQueue[TrainerReply] = queue.SimpleQueue()
        self._id = 0
        host.start(self._replies.put)

    def ask(self, make: Callable[[int], TrainerRequest], kind: type[_Reply]) -> _Reply:
        """The answer to the request that ``make`` builds for an id. Raises TrainerError when it failed."""
        self._id += 1
        self._host.request(make(self._id))
        while isinstance(reply := self._replies.get(), Progress):
            continue
        if isinstance(reply, Failed | Died):
            hint = reply.hint if isinstance(reply, Failed) else ""
            raise TrainerError(f"the trainer failed: {reply.message}", hint)
        if not isinstance(reply, kind):
            raise TrainerError(f"the trainer answered with {type(reply).__name__}")
        return reply

    def close(self) -> None:
        self._host.close()
