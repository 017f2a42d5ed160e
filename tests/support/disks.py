"""A small disk of its own, that a test may fill."""

from __future__ import annotations

import os
from pathlib import Path

SIZE_MB = 8


class SmallDisk:
    """A file system of 8 MB in memory, mounted at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Takes all room but so much."""
        left = self.free - leave
        with (self.path / "filler").open("ab") as filler:
            while left > 0:
                try:
                    left -= os.write(filler.fileno(), b"\0" * min(left, 1 << 20))
                except OSError:
                    return

    def empty(self) -> None:
        (self.path / "filler").unlink()
