"""From when to when certificates are valid: read from their files, where ``ssl`` tells it of CAs alone."""

from __future__ import annotations

import re
import ssl
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

__all__ = ["Validity", "validities"]

_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSION, _UTC_TIME = 0xA0, 0x17


class Validity(NamedTuple):
    """Seconds since 1970."""

    begin: float
    end: float


def validities(pem: Path) -> list[Validity]:
    """Of every certificate in a file. Raises ValueError for one that is none, OSError for the file."""
    text = pem.read_text(encoding="ascii", errors="replace")
    found = [_validity(ssl.PEM_cert_to_DER_cert(block)) for block in _BLOCK.findall(text)]
    if not found:
        raise ValueError("holds no certificate in PEM form")
    return found


def _validity(der: bytes) -> Validity:
    """A certificate is [[version], serial number, algorithm, issuer, [begin, end], ...]."""
    try:
        _, at, _ = _element(der, 0)
        _, at, _ = _element(der, at)
        tag, _, _ = _element(der, at)
        for _ in range(4 if tag == _VERSION else 3):  # to the validity
            _, _, at = _element(der, at)
        _, at, _ = _element(der, at)
        begin, second = _time(der, at), _element(der, at)[2]
        return Validity(begin, _time(der, second))
    except IndexError:
        raise ValueError("ends early") from None


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Tag, and where its content begins and ends."""
    tag, length, begin = der[at], der[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, begin = int.from_bytes(der[begin : begin + count], "big"), begin + count
    return tag, begin, begin + length


def _time(der: bytes, at: int) -> float:
    tag, begin, end = _element(der, at)
    text = der[begin:end].decode("ascii", errors="replace")
    if tag == _UTC_TIME:  # two digits of the year: 1950 to 2049
        text = ("20" if text[:2] < "50" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
