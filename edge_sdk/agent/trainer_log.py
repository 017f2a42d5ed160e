"""What the trainer writes to its standard output and error, kept in a file of bounded size."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

__all__ = ["TrainerLog"]

_MOST_BYTES = 1 << 20
_TAIL = 2000


class TrainerLog:
    """Appends to ``path``; above 1 MiB the file becomes ``path.1``, in place of an older one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file = path.open("ab")
        self._tail = b""

    def write(self, data: bytes) -> None:
        """Never raises: a full disk must not stop the training."""
        with self._lock:
            self._tail = (self._tail + data)[-_TAIL:]
            try:
                if not self._file.closed:
                    self._file.write(data)
                    self._file.flush()
                    if self._file.tell() > _MOST_BYTES:
                        self._file.close()
                        self._path.replace(self._path.with_name(self._path.name + ".1"))
                        self._file = self._path.open("ab")
            except OSError:
                return

    def last_line(self) -> str:
        """The last thing that it wrote: mostly the message of an error."""
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")

    def __enter__(self) -> TrainerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._file.close()
