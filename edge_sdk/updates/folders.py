"""A folder that is made beside its place and takes it at once, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]

_UNFINISHED = "unfinished-"


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write files into. Then it is made durable and takes the place of ``folder``,
    which may be there already; after any exception nothing is left of it.

    What was left by processes that were killed while they made the same folder is removed first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.{_UNFINISHED}"))
    lock = _hold(building)
    try:
        yield building
        building.chmod(0o755)
        for path in building.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _replace(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _replace(building: Path, folder: Path) -> None:
    if not folder.exists():
        building.replace(folder)
        return
    old = building.with_name(building.name + ".old")
    folder.replace(old)
    try:
        building.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old)


def _sweep(folder: Path) -> None:
    left = re.compile(rf"\.{re.escape(folder.name)}\.{_UNFINISHED}\w{{8}}(\.old)?")
    with contextlib.suppress(OSError):  # what cannot be looked at or removed is in nobody's way
        for entry in list(folder.parent.iterdir()):
            found = left.fullmatch(entry.name)
            if found is None or (found[1] and not folder.exists()):  # the only one that is whole
                continue
            lock = _hold(entry)
            if lock is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(lock)


def _hold(folder: Path) -> int | None:
    """A lock on the folder, until it is closed or the process ends; None: another has it, or none can be
    had on this file system."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
