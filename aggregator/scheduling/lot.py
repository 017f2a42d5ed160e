"""Chance that can be repeated: a number of a round, a device and a purpose, asked in any order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Lot"]


@dataclass(frozen=True)
class Lot:
    """Counter-based, so that a restarted server draws what it drew before."""

    seed: int
    round: int

    def draw(self, device: str, purpose: str) -> float:
        """Uniform above 0 and at most 1."""
        digest = hashlib.sha256(f"{self.seed}\n{self.round}\n{device}\n{purpose}".encode()).digest()
        return ((int.from_bytes(digest[:8], "little") >> 11) + 1) / (1 << 53)
