"""A trainer inside this process: for the simulator, for tests, and for apps that hold the model anyway."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from edge_sdk.errors import TrainerError
from edge_sdk.protocol.trainer import TrainerReply, TrainerRequest
from edge_sdk.training.engine import Engine

__all__ = ["InlineTrainer"]


class InlineTrainer:
    """Implements TrainerHost. Memory limits are not enforced: the process is not the trainer's own.

    Args:
        threaded: True: requests run in a thread of their own and ``request`` returns at once. False:
            ``request`` returns when its last reply was delivered.
    """

    def __init__(self, threaded: bool = True) -> None:
        self._threaded = threaded
        self._engine: Engine | None = None
        self._requests: queue.SimpleQueue[TrainerRequest | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = threading.Lock()

    @property
    def loaded(self) -> bool:
        return self._engine is not None and self._engine.loaded

    def start(self, deliver: Callable[[TrainerReply], None]) -> None:
        """Sets where replies go. Nothing is loaded before the first request."""
        if self._engine is not None:
            raise TrainerError("this trainer was started already")
        self._engine = Engine(deliver, enforce=False)
        if self._threaded:
            self._thread = threading.Thread(target=self._work, name="trainer", daemon=True)
            self._thread.start()

    def request(self, request: TrainerRequest) -> None:
        engine = self._started()
        engine.accept()
        if self._threaded:
            self._requests.put(request)
        else:
            with self._busy:
                engine.handle(request)

    def interrupt(self) -> None:
        if self._engine is not None:
            self._engine.interrupt()

    def unload(self) -> None:
        """Lets go of the model when the current request has ended, which this one waits for."""
        if self._engine is not None:
            with self._busy:
                self._engine.unload()

    def close(self) -> None:
        """Interrupts what runs, ends the thread, and lets go of the model."""
        self.interrupt()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._requests.put(None)
            self._thread.join()
        self._thread = None
        if self._engine is not None:
            self._engine.unload()
            self._engine = None

    def _work(self) -> None:
        engine = self._started()
        while (request := self._requests.get()) is not None:
            with self._busy:
                engine.handle(request)

    def _started(self) -> Engine:
        if self._engine is None:
            raise TrainerError("start() the trainer before asking it for anything")
        return self._engine
