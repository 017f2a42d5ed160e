"""What a checkup of the training side tells: one record a line, each ended before the next is begun.

A step that kills its process (an instruction that this processor lacks, say) is the last one that was begun
and not answered; whoever reads goes on behind it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.base import Name, Record, Text

__all__ = [
    "Accounting",
    "Begun",
    "CheckupLine",
    "Decoding",
    "Kernel",
    "Packing",
    "StepFailed",
    "Versions",
    "decode_line",
]

Step = Text
"""``accounting``, ``versions``, ``kernel cpu``, ``packing cuda:0``, ``decoding cpu`` and the like."""


class Begun(Record, frozen=True, kw_only=True, tag="begun"):
    step: Step


class StepFailed(Record, frozen=True, kw_only=True, tag="failed"):
    step: Step
    error: Text


class Accounting(Record, frozen=True, kw_only=True, tag="accounting"):
    """How this process's memory is allocated, counted and limited."""

    allocator: Name
    """Kind: ``glibc``, ``mimalloc``, ``tcmalloc``, ``jemalloc`` or ``other``."""
    allocator_word: Text
    no_mark: Text = ""
    """Why the highest memory so far cannot be cleared; empty: it can."""
    no_limit: Text = ""
    """Why the kernel lets a process go beyond the limit that it was set; empty: it does not."""


class Versions(Record, frozen=True, kw_only=True, tag="versions"):
    torch: Text
    others: dict[str, Text]
    """By package: what else training imports."""
    cuda: Text | None = None
    """That this torch is built for; None: for none."""
    gpus: tuple[Text, ...] = ()
    """As torch sees them."""


class Kernel(Record, frozen=True, kw_only=True, tag="kernel"):
    """A product of matrices and its gradients ran on the device, and were right."""

    device: Text
    name: Text = ""


class Packing(Record, frozen=True, kw_only=True, tag="packing"):
    """Who packs activations on the device, after a round trip at 8, 4 and 2 bits that was right."""

    device: Text
    by: Literal["fbgemm", "triton", "torch"]


class Decoding(Record, frozen=True, kw_only=True, tag="decoding"):
    """Whether bitsandbytes decodes NF4 on a kind of device (``cpu`` or ``cuda``)."""

    kind: Text
    version: Text = ""
    why_not: Text = ""


CheckupLine = Begun | StepFailed | Accounting | Versions | Kernel | Packing | Decoding

_DECODER: msgspec.json.Decoder[CheckupLine] = msgspec.json.Decoder(CheckupLine)


def decode_line(line: bytes) -> CheckupLine:
    """Raises ProtocolError for a line that is no such record."""
    try:
        return _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a line of the checkup is no record: {error}") from None
