"""A small adapter to write, send and merge."""

from __future__ import annotations

import numpy as np

from edge_sdk.protocol.model import DensePart, LoraModule, LoraShape, ModelShape

FINGERPRINT = "ab" * 32
LORA = LoraShape(rank=4, alpha=8.0)
SHAPE = ModelShape(
    family="bert",
    layers=3,
    hidden=16,
    intermediate=32,
    heads=2,
    vocabulary=50,
    layer_path="bert.encoder.layer",
    modules=(
        LoraModule(name="attention.self.query", inputs=16, outputs=16),
        LoraModule(name="output.dense", inputs=32, outputs=16),
    ),
    dense=(
        DensePart(name="classifier.weight", shape=(3, 16)),
        DensePart(name="classifier.bias", shape=(3,)),
    ),
    parameters=1000,
    base_bytes=4000,
)


def moved(adapter, keys, seed, size=0.01):
    """A copy of ``adapter`` whose ``keys`` moved at random."""
    draw = np.random.default_rng(seed)
    end = {key: rows.copy() for key, rows in adapter.items()}
    for key in keys:
        end[key] += (size * draw.normal(size=end[key].shape)).astype(np.float32)
    return end
