"""Version 0 of an adapter: A and the head random, B zero, so that training starts from the base itself."""

from __future__ import annotations

import hashlib
from math import sqrt

import numpy as np

from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.updates.keys import Adapter, part_sizes

__all__ = ["initial_adapter"]


def initial_adapter(shape: ModelShape, lora: LoraShape, seed: int) -> Adapter:
    """A whole adapter. A key's numbers depend on nothing but the seed and the key.

    A: uniform in ±1/sqrt(in), which is Kaiming's with a = sqrt(5), as peft has it. Of the head: matrices
    normal with deviation 0.02, biases zero, other vectors (the scale of a norm) one.
    """
    adapter: Adapter = {}
    vectors = {f"dense.{part.name}" for part in shape.dense if len(part.shape) == 1}
    for key, size in part_sizes(shape, lora).items():
        if key.endswith(".A") and not key.startswith("dense."):
            bound = 1.0 / sqrt(size[1])
            values = _generator(seed, key).uniform(-bound, bound, size)
        elif key.startswith("dense.") and key not in vectors:
            values = _generator(seed, key).normal(0.0, 0.02, size)
        else:
            scale = key.startswith("dense.") and not key.endswith("bias")
            values = np.ones(size) if scale else np.zeros(size)
        adapter[key] = values.astype(np.float32)
    return adapter


def _generator(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\ninitial\n{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
