"""Content-addressed files: an object's name is the sha256 of its bytes, and what has a name is durable."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

from edge_sdk.errors import ContainerError, ProtocolError, StateError

__all__ = ["ObjectStore", "file_digest", "sync_folder"]

_DIGEST = re.compile(r"^[0-9a-f]{64}\Z")
_INCOMING = ".incoming"
_BLOCK = 1 << 20


class ObjectStore:
    """One flat folder of objects, each a file named by its sha256.

    Raises StateError where it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"the folder {folder} cannot be made: {error.strerror}",
                "free disk space, or check who may write there",
            ) from error

    def path(self, digest: str) -> Path:
        """Where the object lies, or would lie. Raises ProtocolError for what is not a sha256 in hex."""
        if not _DIGEST.match(digest):
            raise ProtocolError(f"{digest[:80]!r} is not the name of an object")
        return self.folder / digest

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def adopt(self, path: Path, expect: str | None = None) -> tuple[str, int]:
        """Moves a finished file into the store; durable when this returns.

        Returns the object's digest and size in bytes. With ``expect``, a file of another digest stays where
        it is, and ContainerError is raised.
        """
        digest, size = file_digest(path)
        if expect is not None and digest != expect:
            raise ContainerError(
                f"the object {expect[:12]} was altered: {size} bytes with digest {digest[:12]} arrived",
                "it has to be sent again",
            )
        with path.open("rb") as file:
            os.fsync(file.fileno())
        try:
            path.replace(self.path(digest))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._copy(path, digest)
        sync_folder(self.folder)
        return digest, size

    def remove(self, digest: str) -> None:
        """Does nothing where there is no such object."""
        self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """Names of all objects, in no order."""
        for entry in self.folder.iterdir():
            if _DIGEST.match(entry.name):
                yield entry.name

    def sweep(self, keep: Set[str]) -> list[str]:
        """Removes every object but those in ``keep``, and interrupted copies. Returns their names."""
        gone = sorted(set(self.digests()) - keep)
        for digest in gone:
            self.remove(digest)
        for leftover in self.folder.glob(f"*{_INCOMING}"):
            leftover.unlink(missing_ok=True)
        return gone

    def _copy(self, path: Path, digest: str) -> None:
        """``path`` lies on another file system: copy beside the target, sync, rename."""
        incoming = self.folder / f"{digest}{_INCOMING}"
        with path.open("rb") as source, incoming.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
            target.flush()
            os.fsync(target.fileno())
        incoming.replace(self.path(digest))
        path.unlink()


def file_digest(path: Path) -> tuple[str, int]:
    """sha256 in hex and size in bytes of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
