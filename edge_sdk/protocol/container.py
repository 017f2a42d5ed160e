"""Header of container v1: one safetensors file, one metadata key ``edge`` that holds this record as JSON.

Slots are rank-1 pairs. Both factors are stored slot-major: A as (slots, in), B transposed as (slots, out),
so that a scale belongs to a row in either. Dense parts are stored as (rows, rest), a scale per row.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_sdk.protocol.base import Digest, Name, NotNegative, Positive, Record, Text

__all__ = ["CONTAINER_FORMAT", "METADATA_KEY", "Bits", "ContainerHeader", "ContainerKind", "Part"]

CONTAINER_FORMAT = 1
METADATA_KEY = "edge"
Bits = Literal[2, 4, 8, 16, 32]
ContainerKind = Literal["update", "version", "residual", "error-adapter", "base-plan"]


class Part(Record, frozen=True, kw_only=True):
    """One tensor of the container.

    ``layer`` is None for dense parts, whose ``module`` is the tensor's path in the model. ``rows`` x
    ``width`` is the stored, slot-major shape. ``slots`` names the rows' slots; None: 0..rows-1.
    """

    layer: NotNegative | None
    module: Text
    factor: Literal["A", "B", "dense"]
    role: Literal["slot", "dense", "fold", "error"] = "slot"
    rows: Positive
    width: Positive
    slots: tuple[NotNegative, ...] | None = None
    bits: Bits

    @property
    def key(self) -> str:
        """Name of the payload tensor in the file; its scales are under ``key + '.scale'``."""
        return f"dense.{self.module}" if self.layer is None else f"{self.layer}.{self.module}.{self.factor}"


class ContainerHeader(Record, frozen=True, kw_only=True):
    """What the file is. Its sha256 is its name; nothing in it depends on when or where it was written."""

    format: Literal[1] = 1
    kind: ContainerKind
    run: Name
    round: NotNegative
    version: NotNegative | None = None
    """The number of the version that this file is, or ends (kind ``version``)."""
    builds_on: NotNegative | None = None
    """Version that an update, a residual or a delta version refers to; None: holds whole values."""
    fingerprint: Digest
    codec: Text
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=65536)]
