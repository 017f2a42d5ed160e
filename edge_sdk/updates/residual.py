"""The residual of error feedback, and the updates that are owed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import ContainerError
from edge_sdk.updates.container import header_for, read_container, write_container
from edge_sdk.updates.keys import Adapter

__all__ = ["add_owed", "read_residual", "write_residual"]


def write_residual(
    path: Path,
    residual: Adapter,
    *,
    run: str,
    round: int,
    fingerprint: str,
    builds_on: int | None = None,
) -> None:
    """In fp32: what is below the codec's step would not survive a second rounding.

    ``builds_on``: the version that the update was made from whose error this is.
    """
    header = header_for(
        "residual", residual, "fp32", run=run, round=round, fingerprint=fingerprint, builds_on=builds_on
    )
    write_container(path, header, residual)


def read_residual(path: Path) -> Adapter:
    """Raises ContainerError."""
    with read_container(path, "residual") as container:
        return {key: container.tensor(key) for key in container.parts}


def add_owed(residual: Adapter, updates: Sequence[Path]) -> Adapter:
    """The residual with updates that were made and never merged; an update joins whole, as it was sent.

    ``residual`` stays as it is. Raises ContainerError, also for slots of a part that the residual has not:
    how many slots there are is not told by some of them.
    """
    total = dict(residual)
    for path in updates:
        with read_container(path, "update") as container:
            for key, part in container.parts.items():
                if key in total:
                    total[key] = total[key].copy()
                    container.add_to(total[key], key)
                elif part.slots is None:
                    total[key] = container.tensor(key)
                else:
                    raise ContainerError(f"{path.name} owes slots of {key!r}, which the residual has not")
    return total
