"""Update codecs: how a part's float32 rows become bytes. One entry a codec; bits of a part may differ later.

Rows are slots (rank-1 pairs) or rows of a dense part; int8 has one float32 scale a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ContainerError, MechanismError
from edge_sdk.protocol.container import CODEC_FORMS, CodecForm

__all__ = [
    "CODECS",
    "SAFE_SCALE",
    "Codec",
    "Encoded",
    "Floats",
    "codec_named",
    "largest_scale",
]

Floats = npt.NDArray[np.float32]
SAFE_SCALE = float(np.finfo(np.float32).max) / 256
"""No code of eight bits leaves float32, times a scale up to this."""


@dataclass(frozen=True)
class Encoded:
    """Stored values (rows, width) and, where the codec has them, float32 scales (rows,)."""

    values: npt.NDArray[Any]
    scales: Floats | None


@dataclass(frozen=True)
class Codec:
    """``encode`` takes finite float32 rows."""

    name: str
    form: CodecForm
    encode: Callable[[Floats], Encoded]
    decode: Callable[[Encoded], Floats]


def _encode_fp16(rows: Floats) -> Encoded:
    limit = float(np.finfo(np.float16).max)
    largest = float(np.abs(rows).max(initial=0.0))
    if largest > limit:
        # clipping would change the adapter without a word
        raise ContainerError(
            f"a value of {largest:.3g} does not fit 16 bits, which end at {limit:.0f}",
            "training has diverged: lower the learning rates",
        )
    return Encoded(rows.astype(np.float16), None)


def _encode_int8(rows: Floats) -> Encoded:
    """Symmetric, nearest: x ~ q · scale, scale = max|x| / 127 of the row, q in -127..127."""
    scales = (np.abs(rows).max(axis=1, initial=0.0) / np.float32(127.0)).astype(np.float32)
    # an all-zero row, or one too small for float32 scales, keeps scale 0 and decodes to zero
    divisors = np.where(scales > 0, scales, np.float32(1.0))
    codes = np.rint(np.clip(rows / divisors[:, None], -127, 127))
    return Encoded(np.where(scales[:, None] > 0, codes, 0).astype(np.int8), scales)


def _decode_int8(encoded: Encoded) -> Floats:
    assert encoded.scales is not None  # noqa: S101 - the container checked it
    rows = encoded.values.astype(np.float32)
    rows *= encoded.scales[:, None]
    return rows


CODECS = {
    name: Codec(name, CODEC_FORMS[name], encode, decode)
    for name, encode, decode in (
        ("fp32", lambda rows: Encoded(rows, None), lambda e: e.values.astype(np.float32)),
        ("fp16", _encode_fp16, lambda e: e.values.astype(np.float32)),
        ("int8", _encode_int8, _decode_int8),
    )
}


def largest_scale(scales: Floats) -> float | None:
    """The largest of usable scales; None: one is negative or not finite."""
    # what is not a number comes through both, and is in neither range
    most = float(np.maximum.reduce(scales))
    return most if np.minimum.reduce(scales) >= 0 and most < np.inf else None


def codec_named(name: str) -> Codec:
    """Raises MechanismError for a codec that is not here."""
    codec = CODECS.get(name)
    if codec is None:
        raise MechanismError(f"there is no update codec {name!r}", f"there are: {', '.join(CODECS)}")
    return codec
