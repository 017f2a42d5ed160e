"""Version 0 of an adapter: A and the head random, B zero, so that training starts from the base itself."""

from __future__ import annotations

import hashlib
from math import sqrt

import numpy as np

from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.keys import Adapter, part_sizes

__all__ = ["initial_adapter", "initial_part", "initial_slots"]


def initial_adapter(shape: ModelShape, lora: LoraShape, seed: int) -> Adapter:
    """A whole adapter."""
    return {key: initial_part(shape, lora, seed, key) for key in part_sizes(shape, lora)}


def initial_part(shape: ModelShape, lora: LoraShape, seed: int, key: str) -> Floats:
    """One part. Its numbers depend on nothing but the seed and the key.

    A: uniform in ±1/sqrt(in), which is Kaiming's with a = sqrt(5), as peft has it. Of the head: matrices
    normal with deviation 0.02, biases zero, other vectors (the scale of a norm) one.
    """
    size = part_sizes(shape, lora)[key]
    if not key.startswith("dense."):
        return initial_slots(key, size, seed)
    if not any(key == f"dense.{part.name}" and len(part.shape) == 1 for part in shape.dense):
        return _generator(seed, key).normal(0.0, 0.02, size).astype(np.float32)
    return (np.zeros if key.endswith("bias") else np.ones)(size, np.float32)


def initial_slots(key: str, size: tuple[int, int], seed: int, version: int = 0) -> Floats:
    """The slots of one factor that begin with ``version``: those of the first one, or drawn anew."""
    if key.endswith(".B"):
        return np.zeros(size, np.float32)
    bound = 1.0 / sqrt(size[1])
    name = key if version == 0 else f"{key}\n{version}"
    return _generator(seed, name).uniform(-bound, bound, size).astype(np.float32)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\ninitial\n{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
