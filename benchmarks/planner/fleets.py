"""Random fleets as arrays, as devices have them: of one pace and one link, quantizing where memory ends."""

from __future__ import annotations

import numpy as np

from aggregator.planner.frontiers import Frontiers

__all__ = ["random_fleet"]


def random_fleet(
    random_: np.random.Generator, devices: int, layers: int, spread: float = 0.6, full: bool = False
) -> Frontiers:
    """``spread``: of the logarithm of the paces, its standard deviation. ``full``: all reach all layers."""
    pace = 10.0 * np.exp(random_.normal(0.0, spread, (devices, 1)))
    link = random_.choice([0.0, 1.0], (devices, 1)) * random_.uniform(0.0, 3.0, (devices, 1))
    top = np.where(random_.random((devices, 1)) < 0.6, layers, random_.integers(1, layers + 1, (devices, 1)))
    if full:
        top[:] = layers
    plain = random_.integers(0, top + 1)
    depth = np.arange(1, layers + 1)[None, :]
    packed = np.maximum(0, depth - plain)
    seconds = pace * (0.03 * layers + 0.036 * depth + 0.02 * packed) + link * (0.1 + depth / layers)
    has = depth <= top
    return Frontiers(
        offsets=np.concatenate(([0], np.cumsum(top[:, 0]))).astype(np.int64),
        depth=np.broadcast_to(depth, has.shape)[has].astype(np.int16),
        seconds=seconds[has],
        gain=np.broadcast_to(depth / layers, has.shape)[has],
    )
