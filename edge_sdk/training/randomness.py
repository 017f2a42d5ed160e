"""Random numbers of a round: counter-based, so that the same key gives the same numbers anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

__all__ = ["batch_rows", "generator"]


def generator(seed: int, round: int, device: str, purpose: str, counter: int = 0) -> np.random.Generator:
    """Philox keyed by a sha256 of (seed, round, device, purpose, counter)."""
    text = f"{seed}\n{round}\n{device}\n{purpose}\n{counter}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def batch_rows(rows: int, batch: int, *, seed: int, round: int, device: str) -> Iterator[np.ndarray]:
    """Endless batches of row numbers, (batch,) int64: shuffled epochs, one after the other without a gap,

    so that every batch is full and every row comes equally often, also where rows < batch.
    """
    epoch = 0
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < batch:
            order = generator(seed, round, device, "batches", epoch).permutation(rows)
            left = np.concatenate((left, order))
            epoch += 1
        yield left[:batch]
        left = left[batch:]
