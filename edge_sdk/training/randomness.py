"""Random numbers of a round: counter-based, so that the same key gives the same numbers anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["batch_rows", "draw_rows", "generator", "torch_generator"]


def _key(seed: int, round: int, device: str, purpose: str, counter: int) -> bytes:
    text = f"{seed}\n{round}\n{device}\n{purpose}\n{counter}".encode()
    return hashlib.sha256(text).digest()


def generator(seed: int, round: int, device: str, purpose: str, counter: int = 0) -> np.random.Generator:
    """Philox keyed by a sha256 of (seed, round, device, purpose, counter)."""
    key = int.from_bytes(_key(seed, round, device, purpose, counter)[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def torch_generator(
    seed: int, round: int, device: str, purpose: str, counter: int = 0, *, on: Any = "cpu"
) -> Any:
    """torch's own generator on a torch device, seeded by the same key: for what is rounded by chance.

    The same key gives the same numbers on the same kind of processor and release of torch.
    """
    import torch

    key = _key(seed, round, device, purpose, counter)
    return torch.Generator(device=on).manual_seed(int.from_bytes(key[:8], "little") >> 1)


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


def draw_rows(rows: int, batch: int, batches: int, *, seed: int, round: int, device: str) -> np.ndarray:
    """Row numbers of so many batches in a row, (batches · batch,) int64; see ``batch_rows``."""
    drawn = batch_rows(rows, batch, seed=seed, round=round, device=device)
    return np.concatenate([next(drawn) for _ in range(batches)])
