"""A link that can be cut: a TCP proxy in this process, between one device and its broker."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

MAGIC = b"EDGC\x01\x00"  # how every chunk frame begins
_RESET = struct.pack("ii", 1, 0)


class LinkProxy:
    """Forwards 127.0.0.1:port to the broker; after ``cut_after`` whole chunks upwards the link is gone.

    It stays gone for ``down_s`` (connections are reset at once), then it is whole for good.
    """

    def __init__(self, broker_port: int, *, cut_after: int, down_s: float = 2.0) -> None:
        self._broker_port = broker_port
        self._cut_after = cut_after
        self._down_s = down_s
        self._down_until = 0.0
        self.cuts = 0
        self.chunks_up = 0
        self._tail = b""
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._listener.close()
        self._reset_all()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                device, _ = self._listener.accept()
                if time.monotonic() < self._down_until:
                    _reset(device)
                    continue
                try:
                    broker = socket.create_connection(("127.0.0.1", self._broker_port))
                except OSError:
                    _reset(device)
                    continue
                for end in (device, broker):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._open += [device, broker]
                threading.Thread(target=self._pump, args=(device, broker, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(broker, device, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                if up and self._crosses_the_cut(data):
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _crosses_the_cut(self, data: bytes) -> bool:
        """Counts chunks begun; the one after ``cut_after`` never gets through, and cuts."""
        with self._lock:
            seen = self._tail + data
            self.chunks_up += seen.count(MAGIC)
            self._tail = seen[-(len(MAGIC) - 1) :]
            if self.cuts or self.chunks_up <= self._cut_after:
                return False
            self.cuts += 1
            self._tail = b""
            self._down_until = time.monotonic() + self._down_s
        self._reset_all()
        return True

    def _reset_all(self) -> None:
        with self._lock:
            sockets, self._open = self._open, []
        for end in sockets:
            _reset(end)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
        end.close()
