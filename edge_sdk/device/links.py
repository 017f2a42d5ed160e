"""Link classes: what was measured of kinds of links, one TOML file each in ``device_profiles/links``.

For estimates and simulation; a real device's link is measured through its own broker.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import msgspec

from edge_sdk.config.problems import Problem
from edge_sdk.device.sourced import Figure, Source, named, parse, read_all
from edge_sdk.protocol.base import Name, Record, Text

__all__ = ["LinkClass", "link_class", "link_classes", "parse_link_class"]


class LinkClass(Record, frozen=True, kw_only=True):
    """A kind of link, as a device sees it. None: no figure with a source is known here."""

    name: Name
    title: Text
    up_mbps: Figure | None = None
    """10^6 bits a second, from the device."""
    down_mbps: Figure | None = None
    rtt_ms: Figure | None = None
    """Round trip."""
    loss: Figure | None = None
    """Share of packets that get lost."""
    sources: dict[str, Source] = msgspec.field(default_factory=dict)


def link_classes() -> dict[str, LinkClass]:
    """All link classes by name, in order of name. Raises ConfigError for a damaged file."""
    return dict(_installed())


def link_class(name: str) -> LinkClass:
    """The class of that name. Raises ConfigError, with those that exist, where there is none."""
    return named(name, "link class", _installed())


def parse_link_class(file: str, text: str) -> LinkClass:
    """One TOML file's class. Raises ConfigError with the file's name and every error of it."""
    return parse(file, text, LinkClass, _problems)


def _problems(found: LinkClass) -> Iterator[Problem]:
    if found.loss is not None and found.loss.value > 1:
        yield Problem("loss", f"received {found.loss.value:g}; allowed: a share, at most 1")


@cache
def _installed() -> dict[str, LinkClass]:
    return read_all("links", parse_link_class)
