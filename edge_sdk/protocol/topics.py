"""Topics: ``fl1/{ns}/...``; a device's id is a level of its own, so that ACL patterns work.

fl1/{ns}/s/{shard}/d/{device}/c   device -> aggregator   records
fl1/{ns}/s/{shard}/d/{device}/b   device -> aggregator   chunk frames
fl1/{ns}/d/{device}/r             aggregator -> device   records and chunk frames
fl1/{ns}/p/{device}               presence, retained, and the will
fl1/{ns}/a/{shard}                aggregator state, retained, and the will
fl1/{ns}/m                        the run, retained
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edge_sdk.errors import ProtocolError

__all__ = ["Address", "Topics"]

_LEVEL = re.compile(r"^[A-Za-z0-9_-]{1,64}\Z")
Channel = Literal["control", "bulk", "reply", "presence", "aggregator", "run"]


@dataclass(frozen=True)
class Address:
    """What a topic says: its channel and, where it has one, the device."""

    channel: Channel
    device: str | None = None


@dataclass(frozen=True)
class Topics:
    """The topics of one namespace and shard."""

    namespace: str
    shard: str = "0"

    def __post_init__(self) -> None:
        for level in (self.namespace, self.shard):
            _check(level)

    def control(self, device: str) -> str:
        return f"fl1/{self.namespace}/s/{self.shard}/d/{_check_or_plus(device)}/c"

    def bulk(self, device: str) -> str:
        return f"fl1/{self.namespace}/s/{self.shard}/d/{_check_or_plus(device)}/b"

    def reply(self, device: str) -> str:
        return f"fl1/{self.namespace}/d/{_check(device)}/r"

    def presence(self, device: str) -> str:
        return f"fl1/{self.namespace}/p/{_check_or_plus(device)}"

    @property
    def aggregator(self) -> str:
        return f"fl1/{self.namespace}/a/{self.shard}"

    @property
    def run(self) -> str:
        return f"fl1/{self.namespace}/m"

    def parse(self, topic: str) -> Address:
        """Raises ProtocolError for a topic that is none of this namespace and shard."""
        match topic.split("/"):
            case ["fl1", self.namespace, "s", self.shard, "d", device, "c" | "b" as leaf]:
                return Address("control" if leaf == "c" else "bulk", _check(device))
            case ["fl1", self.namespace, "d", device, "r"]:
                return Address("reply", _check(device))
            case ["fl1", self.namespace, "p", device]:
                return Address("presence", _check(device))
            case ["fl1", self.namespace, "a", self.shard]:
                return Address("aggregator")
            case ["fl1", self.namespace, "m"]:
                return Address("run")
        raise ProtocolError(f"topic {topic!r} is none of namespace {self.namespace!r}, shard {self.shard!r}")


def _check(level: str) -> str:
    if not _LEVEL.match(level):
        raise ProtocolError(
            f"{level!r} cannot be a topic level", "use 1-64 letters, digits, hyphens and underscores"
        )
    return level


def _check_or_plus(level: str) -> str:
    return level if level == "+" else _check(level)
