"""What every transport holds to, whatever its broker would allow."""

from __future__ import annotations

import re

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.base import MAX_RECORD_BYTES
from edge_sdk.protocol.frames import HEADER_BYTES, MAX_CHUNK_BYTES

__all__ = ["MAX_PAYLOAD_BYTES", "check_filter", "check_message", "matches"]

MAX_PAYLOAD_BYTES = max(MAX_CHUNK_BYTES + HEADER_BYTES, MAX_RECORD_BYTES)
"""Largest message ever published: one full chunk and its header."""

_LEVEL = r"[A-Za-z0-9_-]{1,64}"
_TOPIC = re.compile(rf"^{_LEVEL}(/{_LEVEL})*\Z")
_FILTER = re.compile(rf"^({_LEVEL}|\+)(/({_LEVEL}|\+))*\Z")


def check_message(topic: str, payload: bytes) -> None:
    """Raises ProtocolError for a message that must not go out."""
    if not _TOPIC.match(topic):
        raise ProtocolError(f"{topic!r} is not a topic to publish to")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"a message of {len(payload)} bytes is above the limit of {MAX_PAYLOAD_BYTES}",
            "large objects travel in chunks",
        )


def check_filter(topic_filter: str) -> None:
    """Raises ProtocolError for '#' and '$share', which not every broker serves alike, and for nonsense."""
    if not _FILTER.match(topic_filter):
        raise ProtocolError(f"{topic_filter!r} is not a filter to subscribe to: whole levels or '+' only")


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a filter of whole levels and '+' takes this topic."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    return len(wanted) == len(levels) and all(
        want in ("+", level) for want, level in zip(wanted, levels, strict=True)
    )
