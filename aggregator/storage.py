"""Room on the state folder's disk: when the rounds pause for want of it, and when they go on.

They pause below a low-water mark, so that what is under way can still be written down, and whenever the
disk refuses a write. What is in memory may be ahead of the disk then, so the server lets go of it, and goes
on later from what is stored, as after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_sdk.clock import Clock
from edge_sdk.errors import StateError
from edge_sdk.protocol.base import Record

__all__ = ["NoRoomError", "PauseNote", "Storage", "folder_error", "out_of_room", "read_pause"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEAST_FREE = 1 << 20
"""Room that going on needs after a write was refused, whatever the mark is."""
_LOOK_S = 1.0
_AGAIN_S, _MOST_AGAIN_S = 5.0, 60.0
"""After a refused write, when to try again though there seems to be room (a quota); doubles."""
_NOTE_BYTES = 4096


class NoRoomError(StateError):
    """There is no room for an object of ``needed`` bytes."""

    def __init__(self, message: str, hint: str, needed: int) -> None:
        super().__init__(message, hint)
        self.needed = needed


class PauseNote(Record, frozen=True, kw_only=True):
    """``storage.json`` in the state folder, for ``edge-aggregator status``."""

    paused: bool = False
    reason: str = ""


class Storage:
    """Watches the room. ``paused`` is why the rounds pause; "": they do not.

    Args:
        disk_free: bytes that may still be written below a folder; None: as the file system tells.
    """

    def __init__(
        self,
        folder: Path,
        keep_free_mb: float,
        clock: Clock,
        disk_free: Callable[[Path], float] | None = None,
    ) -> None:
        self.paused = ""
        self.keep_free = keep_free_mb * 1e6
        self._folder = folder
        self._clock = clock
        self._disk_free = disk_free or _disk_free
        self._needed = 0.0
        self._look_at = self._not_before = clock.monotonic()
        self._again_s = _AGAIN_S
        self._failed_at: float | None = None
        self._note = -1

    def open(self) -> None:
        """Takes the note's room now, so that it can be rewritten in place when there is none."""
        self._note = os.open(self._folder / "storage.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._write(PauseNote())

    def close(self) -> None:
        if self._note >= 0:
            os.close(self._note)
            self._note = -1

    def free(self) -> float:
        """Bytes that may still be written."""
        try:
            return self._disk_free(self._folder)
        except OSError:
            return 0.0

    def too_low(self, now: float) -> str:
        """Why the rounds have to pause now; "": they need not. Looks once a second at most."""
        if now < self._look_at:
            return ""
        self._look_at = now + _LOOK_S
        free = self.free()
        if free >= self.keep_free:
            return ""
        return f"{free / 1e6:.1f} MB are free on the disk of {self._folder}, below {self.keep_free / 1e6:g}"

    def pause(self, reason: str, error: BaseException | None = None) -> None:
        """The rounds pause. ``error``: of the write that was refused."""
        now = self._clock.monotonic()
        self.paused = reason
        self._needed = error.needed if isinstance(error, NoRoomError) else 0.0
        if error is not None:
            lasted = self._failed_at is None or now - self._failed_at > 2 * _MOST_AGAIN_S
            self._again_s = _AGAIN_S if lasted else min(_MOST_AGAIN_S, 2 * self._again_s)
            self._failed_at, self._not_before = now, now + self._again_s
            self._needed = max(self._needed, _LEAST_FREE)
        self._write(PauseNote(paused=True, reason=reason))

    def may_go_on(self, now: float) -> bool:
        return now >= self._not_before and self.free() >= self.keep_free + self._needed

    def go_on(self) -> None:
        self.paused, self._needed = "", 0.0
        self._look_at = self._clock.monotonic()
        self._write(PauseNote())

    def _write(self, note: PauseNote) -> None:
        text = msgspec.json.encode(note)[:_NOTE_BYTES].ljust(_NOTE_BYTES)
        with contextlib.suppress(OSError):  # it is for people; that the rounds pause does not hang on it
            os.pwrite(self._note, text, 0)


def read_pause(folder: Path) -> PauseNote:
    """What the server's last word on its room was."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((folder / "storage.json").read_bytes(), type=PauseNote)
    return PauseNote()


def out_of_room(error: BaseException, free: float) -> bool:
    """Whether a write was refused for want of room, by the system, the store, or what lies between.

    SQLite knows some refusals only as an I/O error: those count where next to nothing is ``free``.
    """
    link: BaseException | None = error
    while link is not None:
        origin = getattr(link, "orig", None) or link  # SQLAlchemy's errors carry the driver's
        if isinstance(origin, OSError) and origin.errno in _FULL:
            return True
        if isinstance(origin, sqlite3.Error):
            return "disk is full" in str(origin) or free < _LEAST_FREE
        link = link.__cause__
    return False


def folder_error(error: OSError) -> StateError:
    """The error that an unexpected one of the state folder is for the operator."""
    where = f" at {error.filename}" if error.filename else ""
    return StateError(
        f"the state folder failed{where}: {error.strerror or error}",
        "see that it may be written and that the disk has room; the same command goes on from here",
    )


def _disk_free(folder: Path) -> float:
    return shutil.disk_usage(folder).free
