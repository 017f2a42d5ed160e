"""The residual of error feedback, and the updates that are owed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_sdk.updates.container import header_for, read_container, write_container
from edge_sdk.updates.keys import Adapter

__all__ = ["add_owed", "read_residual", "write_residual"]


def write_residual(
    path: Path,
    *,
    run: str,
    round: int,
    fingerprint: str,
    residual: Adapter,
) -> None:
    """In fp32: what is below the codec's step would not survive a second rounding."""
    header = header_for("residual", residual, "fp32", run=run, round=round, fingerprint=fingerprint)
    write_container(path, header, residual)


def read_residual(path: Path) -> Adapter:
    """Raises ContainerError."""
    with read_container(path, "residual") as container:
        return {key: container.tensor(key) for key in container.parts}


def add_owed(residual: Adapter, updates: Sequence[Path]) -> Adapter:
    """The residual with updates that were made and never merged; an update joins whole, as it was sent."""
    total = dict(residual)
    for path in updates:
        with read_container(path, "update") as container:
            for key in container.parts:
                tensor = container.tensor(key)
                total[key] = total[key] + tensor if key in total else tensor
    return total
