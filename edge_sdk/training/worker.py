"""The trainer process: ``python -m edge_sdk.training.worker --fd N``, N one end of a socket pair.

It ends when the other end closes, also in the middle of a step: killing it is always safe, since what it
writes is adopted by the host only after its reply.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import socket
import sys
import threading

import msgspec

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.pipe import Unframer, frame
from edge_sdk.protocol.trainer import Interrupt, TrainerReply, TrainerRequest, decode_request
from edge_sdk.training.allocator import settle_allocator
from edge_sdk.training.engine import Engine

__all__ = ["main"]

_log = logging.getLogger("edge_sdk.training.worker")


class _Worker:
    def __init__(self, pair: socket.socket) -> None:
        self._pair = pair
        self._engine = Engine(self._reply, enforce=True)
        self._requests: queue.SimpleQueue[TrainerRequest] = queue.SimpleQueue()

    def run(self) -> None:
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        while True:
            request = self._requests.get()
            _settle_threads(request)
            self._engine.handle(request)

    def _read(self) -> None:
        unframer = Unframer()
        try:
            while data := self._pair.recv(1 << 16):
                for message in unframer.feed(data):
                    self._take(message)
        except ProtocolError as error:
            _log.error("the host is not understood: %s", error)
            os._exit(1)
        except OSError:  # reset: the host died with replies unread
            pass
        os._exit(0)  # the host is gone; the main thread may be in the middle of a step

    def _take(self, message: bytes) -> None:
        request = decode_request(message)
        if isinstance(request, Interrupt):
            self._engine.interrupt()
        else:
            self._engine.accept()
            self._requests.put(request)

    def _reply(self, reply: TrainerReply) -> None:
        try:
            self._pair.sendall(frame(msgspec.json.encode(reply)))
        except OSError:
            os._exit(0)


def _settle_threads(request: TrainerRequest) -> None:
    """OpenMP reads its thread count when torch is loaded; a later one is set through torch."""
    setup = getattr(request, "setup", None)
    if setup is not None and setup.threads and "torch" not in sys.modules:
        os.environ["OMP_NUM_THREADS"] = str(setup.threads)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edge_sdk.training.worker")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the host's socket")
    fd = parser.parse_args().fd
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="trainer %(levelname)s %(name)s: %(message)s"
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the host decides
    settle_allocator()
    _Worker(socket.socket(fileno=fd)).run()


if __name__ == "__main__":
    main()
