"""The agent's side of the trainer: one request at a time, and the trainer ended when long idle."""

from __future__ import annotations

import signal
from collections.abc import Callable

from edge_sdk.clock import Clock
from edge_sdk.protocol.trainer import Died, Failed, Progress, TrainerHost, TrainerReply, TrainerRequest

__all__ = ["Desk"]

_INTERRUPT_S = 60.0
"""How long a step may take to notice an interrupt before the trainer is ended."""
_SILENT_S = 600.0
"""How long a trainer at work may say nothing, not even how far it is, before it is taken for dead."""


class Desk:
    """Hands requests to a TrainerHost and its replies to whoever asked."""

    def __init__(self, trainer: TrainerHost, clock: Clock, idle_unload_s: float, first_id: int) -> None:
        self.trainer = trainer
        self._clock = clock
        self._idle_unload_s = idle_unload_s
        self._next_id = first_id
        self._id: int | None = None
        self._answer: Callable[[TrainerReply], None] | None = None
        self._interrupted: float | None = None
        self._used = self._heard = clock.monotonic()
        self.task = ""
        """What is being done, in a word; empty when nothing is."""

    @property
    def busy(self) -> bool:
        return self._id is not None

    def ask(
        self, task: str, build: Callable[[int], TrainerRequest], answer: Callable[[TrainerReply], None]
    ) -> None:
        """Begins a request. ``answer`` gets every reply; the last is none of ``Progress``."""
        if self.busy:
            raise RuntimeError(f"the trainer was asked to {task} while it {self.task}")
        self._id, self._next_id = self._next_id, self._next_id + 1
        self._answer, self._interrupted, self.task = answer, None, task
        self._heard = self._clock.monotonic()
        self.trainer.request(build(self._id))

    def on_reply(self, reply: TrainerReply) -> None:
        if reply.id != self._id:
            return
        self._heard = self._clock.monotonic()
        answer = self._answer
        if not isinstance(reply, Progress):
            self._finish()
        if answer is not None:
            answer(reply)

    def interrupt(self) -> None:
        """Ends the current request within a step; its asker gets a ``Failed`` of cause ``interrupted``."""
        if self.busy and self._interrupted is None:
            self._interrupted = self._clock.monotonic()
            self.trainer.interrupt()

    def abandon(self) -> None:
        """As ``interrupt``, and nobody wants the answer any more."""
        self._answer = None
        self.interrupt()

    def tick(self, now: float) -> float | None:
        """Ends a trainer that is idle or deaf. Returns when to look again."""
        if self._id is not None:
            if self._interrupted is None:
                if now < self._heard + _SILENT_S:
                    return self._heard + _SILENT_S
                self.trainer.unload()
                said = f"ended: the trainer said nothing for {_SILENT_S / 60:.0f} minutes"
                self.on_reply(Died(id=self._id, memory=False, exit=-signal.SIGTERM, message=said))
                return None
            if now < self._interrupted + _INTERRUPT_S:
                return self._interrupted + _INTERRUPT_S
            self.trainer.unload()
            self.on_reply(
                Failed(id=self._id, cause="interrupted", message="ended: it did not heed an interrupt")
            )
        if not self.trainer.loaded:
            return None
        if now < self._used + self._idle_unload_s:
            return self._used + self._idle_unload_s
        self.trainer.unload()
        return None

    def _finish(self) -> None:
        self._id, self._answer, self._interrupted, self.task = None, None, None, ""
        self._used = self._clock.monotonic()
