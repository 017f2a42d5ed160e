"""Header of container v1: one safetensors file, one metadata key ``edge`` that holds this record as JSON.

Slots are rank-1 pairs. Both factors are stored slot-major: A as (slots, in), B transposed as (slots, out),
so that a scale belongs to a row in either. Dense parts are stored as (rows, rest), a scale per row.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec

from edge_sdk.protocol.base import Digest, Name, NotNegative, Positive, Record, Text

__all__ = [
    "CODEC_FORMS",
    "CONTAINER_FORMAT",
    "METADATA_KEY",
    "Bits",
    "CodecForm",
    "ContainerHeader",
    "ContainerKind",
    "Part",
]

CONTAINER_FORMAT = 1
METADATA_KEY = "edge"
Bits = Literal[2, 4, 8, 16, 32]
ContainerKind = Literal["update", "version", "residual", "error-adapter", "base-plan", "server-state"]


class CodecForm(NamedTuple):
    """What a codec writes of a part: ``bits`` a value, as ``dtype`` of safetensors; ``row_scales``: and a
    float32 scale a row."""

    bits: Bits
    dtype: str
    row_scales: bool

    def payload_bytes(self, rows: int, width: int) -> int:
        """Bytes of one part, without its share of the file's header."""
        return rows * width * self.bits // 8 + (4 * rows if self.row_scales else 0)


CODEC_FORMS: dict[str, CodecForm] = {
    "fp32": CodecForm(32, "F32", False),
    "fp16": CodecForm(16, "F16", False),
    "int8": CodecForm(8, "I8", True),
}
"""Every update codec there is; ``edge_sdk.updates`` has its arithmetic, ``edge_sdk.planning`` its price."""


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
        if self.layer is None:
            return f"dense.{self.module}"
        name = f"{self.layer}.{self.module}.{self.factor}"
        return f"fold.{name}" if self.role == "fold" else name


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
