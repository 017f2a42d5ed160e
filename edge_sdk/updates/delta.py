"""Updates: what changed since the received global adapter, quantized, with error feedback.

delta = end - start + residual ;  send C(delta) ;  residual <- delta - C(delta)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edge_sdk.errors import ContainerError
from edge_sdk.updates.container import header_for, write_container
from edge_sdk.updates.keys import Adapter

__all__ = ["write_update"]


def write_update(
    path: Path,
    *,
    run: str,
    round: int,
    fingerprint: str,
    builds_on: int,
    start: Adapter,
    end: Adapter,
    keys: Iterable[str],
    codec: str,
    residual: Adapter | None,
) -> Adapter | None:
    """Writes the update of ``keys``; returns the new residual, None where error feedback is off.

    ``residual``: that of the last update, {} for a first one, None without error feedback. What it holds
    for keys not in ``keys`` stays in it: change of parts not trained now is still unsent.
    """
    chosen = list(keys)
    delta: Adapter = {}
    for key in chosen:
        if key not in start or key not in end:
            raise ContainerError(f"{key!r} is no part of this adapter")
        kept = residual.get(key) if residual is not None else None
        shapes = {rows.shape for rows in (start[key], end[key], kept) if rows is not None}
        if len(shapes) != 1:
            raise ContainerError(
                f"start, end and residual of {key!r} have the shapes {sorted(shapes)}",
                "the residual is of another run or LoRA shape: remove it",
            )
        delta[key] = np.subtract(end[key], start[key], dtype=np.float32)
        if kept is not None:
            delta[key] += kept
    header = header_for(
        "update", delta, codec,
        run=run, round=round, fingerprint=fingerprint, builds_on=builds_on,
    )  # fmt: skip
    decoded = write_container(path, header, delta)
    if residual is None:
        return None
    unsent = {key: np.subtract(delta[key], decoded[key], dtype=np.float32) for key in chosen}
    return {**residual, **unsent}
