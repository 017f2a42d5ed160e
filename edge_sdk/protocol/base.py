"""What every record shares: immutable, keyword-only, JSON by msgspec, strings with limits."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = [
    "MAX_RECORD_BYTES",
    "MOST",
    "PROTOCOL",
    "Digest",
    "Fraction",
    "Name",
    "NotNegative",
    "Positive",
    "Record",
    "Text",
]

PROTOCOL = 1
"""Version of the wire contract; a party that speaks another one is refused by name."""

MAX_RECORD_BYTES = 256 * 1024
"""Largest JSON record on the wire."""

Name = Annotated[
    str,
    msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z", description="1 to 64 letters, digits, _ and - (ASCII)"),
]
"""An id that may stand as a topic level."""

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""A sha256 in hex: the name of an object everywhere."""

Text = Annotated[str, msgspec.Meta(max_length=4096)]
MOST = 2**63 - 1
"""What any database and any other language holds as a whole number."""
Positive = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
NotNegative = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records. Unknown fields are ignored, so that a newer party may say more."""
