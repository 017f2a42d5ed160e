"""One process per state folder, and one kind of it: an agent's folder is never an aggregator's.

Each takes away what it does not know of in its folder, the other's work among it.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import NamedTuple

from edge_sdk.agent.record import disk_error
from edge_sdk.errors import ConfigError, StateError

__all__ = ["AGENT", "AGGREGATOR", "FolderLock", "Owner", "check_owner", "holder"]


class Owner(NamedTuple):
    """Whose a state folder is, and by which files that is known."""

    name: str
    key: str
    """Of the config, that names the folder."""
    database: str
    lock: str


AGENT = Owner("agent", "agent.state_dir", "agent.db", "agent.lock")
AGGREGATOR = Owner("aggregator", "run.state_dir", "server.sqlite", "server.lock")


class FolderLock:
    """Holds a state folder until ``release`` or the end of the process, however it ends.

    Raises StateError, naming the process, when another one holds it, or when the folder cannot be made, and
    ConfigError for a folder of the other kind, which is left as it is.
    """

    def __init__(self, folder: Path, owner: Owner = AGENT) -> None:
        check_owner(folder, owner)
        try:
            # What lies in it tells of the owner's data; nobody else reads it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(folder / owner.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise disk_error(folder, error, owner.key) from error
        if not _try_lock(self._fd):
            pid = _read_pid(self._fd)
            os.close(self._fd)
            raise StateError(
                f"the state folder {folder} is in use by process {pid or 'unknown'}",
                f"stop that {owner.name}, or give this one another {owner.key}",
            )
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.release()
            raise disk_error(folder, error, owner.key) from error
        try:
            check_owner(folder, owner)  # once more: of two that start together, the later one sees the other
        except ConfigError:
            self.release()
            raise

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def check_owner(folder: Path, owner: Owner) -> None:
    """Raises ConfigError for a folder that is the other kind's."""
    other = AGGREGATOR if owner is AGENT else AGENT
    if os.access(folder / other.database, os.F_OK):
        found = f"{other.database} lies in it"
    elif (pid := holder(folder, other)) is not None:
        found = f"process {pid} works in it"
    else:
        return
    raise ConfigError(
        f"{owner.key}: {folder} is the state folder of an {other.name}: {found}",
        f"set {owner.key} to a folder of its own; either would delete what the other has accepted",
    )


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


def holder(folder: Path, owner: Owner = AGENT) -> int | None:
    """The process of this kind that holds ``folder``; None when none does."""
    try:
        fd = os.open(folder / owner.lock, os.O_RDONLY | os.O_CLOEXEC)
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
