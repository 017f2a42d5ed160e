"""One agent per state folder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from edge_sdk.agent.record import disk_error
from edge_sdk.errors import StateError

__all__ = ["FolderLock", "holder"]

_NAME = "agent.lock"


class FolderLock:
    """Holds a state folder until ``release`` or the end of the process, however it ends.

    Raises StateError, naming the process, when another one holds it, or when the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            # What lies in it tells of the owner's data; nobody else reads it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise disk_error(folder, error) from error
        if not _try_lock(self._fd):
            pid = _read_pid(self._fd)
            os.close(self._fd)
            raise StateError(
                f"the state folder {folder} is in use by process {pid or 'unknown'}",
                "stop that agent, or give this one another agent.state_dir",
            )
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.release()
            raise disk_error(folder, error) from error

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _try_lock(fd: int) -> bool:
    """A few tries: whoever only looks (``holder``) may have it for an instant."""
    for wait in (0.02, 0.05, 0.1, None):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if wait is not None:
                time.sleep(wait)
    return False


def holder(folder: Path) -> int | None:
    """The process that holds ``folder``; None when nobody does."""
    try:
        fd = os.open(folder / _NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_pid(fd)
    finally:
        os.close(fd)
    return None


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).decode(errors="replace").strip()
    return int(text) if text.isdigit() else None
