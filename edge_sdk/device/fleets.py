"""Fleets: which devices there are, how they are connected, and how that changes; ``device_profiles/fleets``.

``members`` makes of a fleet its devices in one round: the same for the same seed, on any machine, in any
order of asking, since every number is drawn by its own key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Literal

import msgspec

from edge_sdk.config.problems import Problem
from edge_sdk.device.classes import DeviceClass, device_classes
from edge_sdk.device.links import LinkClass, link_classes
from edge_sdk.device.sourced import Source, named, parse, read_all
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.base import Name, Positive, Record, Text

__all__ = ["Count", "Fleet", "Group", "Member", "Span", "fleet", "fleets", "members", "parse_fleet"]

Evidence = Literal["stated", "reported", "recalled", "assumed"]
"""``stated`` by those whose fleet it is; ``reported`` of them by others; ``recalled`` as a habit of theirs,

not found in a text; ``assumed`` here."""


class Count(Record, frozen=True, kw_only=True):
    """A whole number, how sure it is, and the name of its source."""

    value: Positive
    evidence: Evidence
    source: Name
    note: Text = ""


class Span(Record, frozen=True, kw_only=True):
    """A range that a number is drawn from, evenly."""

    low: Annotated[float, msgspec.Meta(gt=0)]
    high: Annotated[float, msgspec.Meta(gt=0)]
    evidence: Evidence
    source: Name
    note: Text = ""


class Group(Record, frozen=True, kw_only=True):
    """Devices of one class."""

    device_class: Name
    count: Count
    power_modes: tuple[Text, ...] = ()
    """Those that are drawn from; none named: all that the class has."""
    links: tuple[Name, ...] = ()
    """Link classes, of which each device draws one for good; none: the fleet's rates."""


class Fleet(Record, frozen=True, kw_only=True):
    """Devices by class, the rates of their links, and after how many rounds what is drawn again."""

    name: Name
    title: Text
    groups: Annotated[tuple[Group, ...], msgspec.Meta(min_length=1)]
    modes_every: Count | None = None
    """Rounds after which every device draws its power mode again; None: it keeps the first one."""
    up_mbps: Span | None = None
    down_mbps: Span | None = None
    rates_every: Count | None = None
    """Rounds after which every device draws its rates again; None: it keeps the first ones."""
    sources: dict[str, Source] = msgspec.field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(group.count.value for group in self.groups)


class Member(Record, frozen=True, kw_only=True):
    """A device of a fleet in one round. None: not known, as its class or link has no figure."""

    device: Name
    device_class: Name
    power_mode: Text | None = None
    link: Name | None = None
    """Its link class, where it has one."""
    up_mbps: float | None = None
    down_mbps: float | None = None
    rtt_ms: float | None = None


def fleets() -> dict[str, Fleet]:
    """All fleets by name, in order of name. Raises ConfigError for a damaged file."""
    return dict(_installed())


def fleet(name: str) -> Fleet:
    """The fleet of that name. Raises ConfigError, with those that exist, where there is none."""
    return named(name, "fleet", _installed())


def members(of: Fleet, *, seed: int, round: int) -> tuple[Member, ...]:
    """A fleet's devices in a round, the first being 1; in the order of its groups."""
    if round < 1:
        raise ValueError(f"rounds are counted from 1; received {round}")
    return tuple(
        _member(of, group, f"{group.device_class}-{number:03d}", seed, round)
        for group in of.groups
        for number in range(1, group.count.value + 1)
    )


def parse_fleet(file: str, text: str) -> Fleet:
    """One TOML file's fleet. Raises ConfigError with the file's name and every error of it."""
    return parse(file, text, Fleet, _problems)


def _member(of: Fleet, group: Group, device: str, seed: int, round: int) -> Member:
    modes = group.power_modes or tuple(device_classes()[group.device_class].power_modes)
    modes_epoch, rates_epoch = _epoch(round, of.modes_every), _epoch(round, of.rates_every)

    def drawn(span: Span | None, purpose: str) -> float | None:
        if span is None:
            return None
        return span.low + (span.high - span.low) * _unit(seed, rates_epoch, device, purpose)

    mode = modes[int(_unit(seed, modes_epoch, device, "mode") * len(modes))] if modes else None
    if not group.links:
        return Member(
            device=device,
            device_class=group.device_class,
            power_mode=mode,
            up_mbps=drawn(of.up_mbps, "up"),
            down_mbps=drawn(of.down_mbps, "down"),
        )
    link = link_classes()[group.links[int(_unit(seed, 0, device, "link") * len(group.links))]]
    return Member(
        device=device,
        device_class=group.device_class,
        power_mode=mode,
        link=link.name,
        up_mbps=None if link.up_mbps is None else link.up_mbps.value,
        down_mbps=None if link.down_mbps is None else link.down_mbps.value,
        rtt_ms=None if link.rtt_ms is None else link.rtt_ms.value,
    )


def _epoch(round: int, every: Count | None) -> int:
    return 0 if every is None else (round - 1) // every.value


def _unit(seed: int, epoch: int, device: str, purpose: str) -> float:
    """A number in [0, 1), by a sha256 of its key; 53 bits, which a float holds exactly."""
    key = f"{seed}\n{epoch}\n{device}\n{purpose}".encode()
    return (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 11) / 2**53


def _problems(found: Fleet) -> Iterator[Problem]:
    classes, links = device_classes(), link_classes()
    for at, group in enumerate(found.groups):
        yield from _of_group(f"groups[{at}]", found, group, classes, links)
    for at, name in enumerate(names := [group.device_class for group in found.groups]):
        if name in names[:at]:
            yield Problem(
                f"groups[{at}].device_class", f'"{name}" has a group already', "add its count to that"
            )
    for key in ("up_mbps", "down_mbps"):
        span: Span | None = getattr(found, key)
        if span is not None and span.high < span.low:
            yield Problem(key, f"received low {span.low:g} above high {span.high:g}")


def _of_group(
    key: str, of: Fleet, group: Group, classes: Mapping[str, DeviceClass], links: Mapping[str, LinkClass]
) -> Iterator[Problem]:
    if group.device_class not in classes:
        yield _unknown(f"{key}.device_class", group.device_class, "device class", classes)
    else:
        modes = classes[group.device_class].power_modes
        for mode in group.power_modes:
            if mode not in modes:
                yield Problem(
                    f"{key}.power_modes",
                    f'"{mode}" is no power mode of {group.device_class}',
                    f"it has {', '.join(modes) or 'none'}",
                )
    for link in group.links:
        if link not in links:
            yield _unknown(f"{key}.links", link, "link class", links)
    if not group.links and (of.up_mbps is None or of.down_mbps is None):
        yield Problem(
            f"{key}.links", "is missing", "name link classes, or give the fleet up_mbps and down_mbps"
        )


def _unknown(key: str, name: str, what: str, those: Mapping[str, Record]) -> Problem:
    try:
        named(name, what, those)
    except ConfigError as error:
        return Problem(key, error.message, error.hint)
    raise AssertionError(name)


@cache
def _installed() -> dict[str, Fleet]:
    return read_all("fleets", parse_fleet)
