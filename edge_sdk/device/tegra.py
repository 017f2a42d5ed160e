"""Jetson boards: which chip, which JetPack, which power mode. All of it from files, no vendor tool is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from edge_sdk.device.files import text_in, text_or_why

__all__ = ["L4t", "l4t_release", "power_mode", "tegra_chip"]

_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([0-9.]+)")
_STATUS = re.compile(r"pmode:\s*0*(\d+)")
_DEFAULT = re.compile(r"<\s*PM_CONFIG\s+DEFAULT=(\d+)")
_JETPACK = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7}
"""Major releases of L4T, and the JetPack that brings them."""


class L4t(NamedTuple):
    """A release of the board's Linux: 36.4.3. ``jetpack``: its major version; None: not known here."""

    major: int
    revision: str

    @property
    def jetpack(self) -> int | None:
        return _JETPACK.get(self.major)

    def __str__(self) -> str:
        pack = "an unknown JetPack" if self.jetpack is None else f"JetPack {self.jetpack}"
        return f"{pack} (L4T {self.major}.{self.revision})"


def tegra_chip(root: Path) -> str:
    """``tegra234``, say; ``tegra`` where only the family is told; empty: no Jetson.

    A container does not see the device tree as a rule; the chip's family and, with NVIDIA's runtime, the
    release file are there all the same.
    """
    for tree in ("proc/device-tree/compatible", "sys/firmware/devicetree/base/compatible"):
        for name in text_in(root / tree).split("\0"):
            if name.startswith("nvidia,tegra"):
                return name.removeprefix("nvidia,")
    family = text_in(root / "sys/devices/soc0/family")
    return "tegra" if family.lower() == "tegra" or l4t_release(root) is not None else ""


def l4t_release(root: Path) -> L4t | None:
    """None: no Jetson, or not NVIDIA's Linux on it."""
    found = _RELEASE.search(text_in(root / "etc/nv_tegra_release"))
    return None if found is None else L4t(int(found[1]), found[2].strip("."))


def power_mode(root: Path) -> tuple[str | None, str]:
    """The mode that nvpmodel set, by name and number, and, where it is None, why.

    Before the first change of it there is no state: the default of the configuration is in force.
    """
    config, _ = text_or_why(root / "etc/nvpmodel.conf")
    state, why = text_or_why(root / "var/lib/nvpmodel/status")
    found = _STATUS.search(state) or (_DEFAULT.search(config) if not state else None)
    if found is None:
        return None, f"nvpmodel: {why or f'status holds {state[:40]!r}'}"
    number = int(found[1])
    named = re.search(rf"<\s*POWER_MODEL\s+ID={number}\s+NAME=([^\s>]+)", config)
    if named is None:
        return f"mode {number}", ""
    return f"{named[1].removeprefix('MODE_')} (mode {number})", ""
