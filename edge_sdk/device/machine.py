"""This machine, as read: memory, processor, heat, battery, accelerators. Nothing is computed or set here.

Files are read below ``root``, so that trees recorded on other machines can be tested. What cannot be read
is None, and ``Profile.reasons`` says why. MB are 10^6 bytes.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from edge_sdk.device.accelerators import accelerators, gpu_free_mb
from edge_sdk.device.cgroups import memory_limits, processor_limit
from edge_sdk.device.files import number_in, text_in
from edge_sdk.protocol.measure import Profile

__all__ = ["free_memory_mb", "gpu_free_mb", "process_rss_mb", "read_profile", "total_memory_mb"]

_ROOT = Path("/")


def read_profile(root: Path = _ROOT, disk: Path | None = None) -> Profile:
    """Reads the machine.

    Args:
        root: where ``proc``, ``sys`` and ``etc`` are looked for.
        disk: a folder on the disk whose free space counts; None: ``root``.
    """
    reasons: dict[str, str] = {}

    def known(field: str, value: float | None, reason: str) -> float | None:
        if value is None:
            reasons[field] = reason
        return value

    machine = _machine(root)
    if not machine:
        reasons["machine"] = "neither a device tree nor DMI names it"
    processor = _processor(root)
    if not processor:
        reasons["processor"] = "/proc/cpuinfo does not name it"
    found, reason = accelerators(root)
    if reason:
        reasons["accelerators"] = reason
    battery, on_ac, power_reason = _power(root)
    if on_ac is None:
        reasons["on_ac"] = "no power supply is reported"
    return Profile(
        machine=machine,
        processor=processor,
        cores=_cores(root),
        memory_mb=known("memory_mb", total_memory_mb(root), "/proc/meminfo cannot be read"),
        free_mb=known("free_mb", free_memory_mb(root), "/proc/meminfo cannot be read"),
        disk_free_mb=known("disk_free_mb", _disk_free_mb(disk or root), "the disk cannot be asked"),
        accelerators=found,
        temperature_c=known("temperature_c", _temperature_c(root), "no sensor can be read"),
        battery_percent=known("battery_percent", battery, power_reason),
        on_ac=on_ac,
        reasons=reasons,
    )


def total_memory_mb(root: Path = _ROOT) -> float | None:
    """Memory that this process may ever use: the machine's, or what its memory cgroups leave of it."""
    total = _meminfo(root).get("MemTotal")
    if total is None:
        return None
    return min([total, *(limit for limit, _ in memory_limits(root))]) / 1e6


def free_memory_mb(root: Path = _ROOT) -> float | None:
    """Memory that can be had now without swapping: MemAvailable, or what the memory cgroups leave."""
    free = _meminfo(root).get("MemAvailable")
    if free is None:
        return None
    return max(0.0, min([free, *(limit - used for limit, used in memory_limits(root))])) / 1e6


def process_rss_mb(pid: int) -> float | None:
    """Resident memory of a process; None where it is gone or not ours to see."""
    try:
        return float(psutil.Process(pid).memory_info().rss) / 1e6
    except psutil.Error:
        return None


def _meminfo(root: Path) -> dict[str, float]:
    """Bytes by name."""
    entries = {}
    for line in text_in(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            entries[name] = float(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return entries


def _machine(root: Path) -> str:
    tree = text_in(root / "proc/device-tree/model") or text_in(root / "sys/firmware/devicetree/base/model")
    if tree:
        return tree
    dmi = root / "sys/devices/virtual/dmi/id"
    return " ".join(filter(None, (text_in(dmi / "sys_vendor"), text_in(dmi / "product_name"))))


def _cpuinfo(root: Path) -> Iterator[tuple[str, str]]:
    for line in text_in(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _processor(root: Path) -> str:
    names = {name: value for name, value in _cpuinfo(root) if value}
    if "model name" in names:
        return names["model name"]
    if "CPU part" in names:  # Arm boards give numbers only
        return f"Arm implementer {names.get('CPU implementer', '?')} part {names['CPU part']}"
    return names.get("Hardware", "")


def _cores(root: Path) -> int:
    if root == _ROOT and hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = sum(name == "processor" for name, _ in _cpuinfo(root))
    quota = processor_limit(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _disk_free_mb(folder: Path) -> float | None:
    try:
        while not folder.exists():  # the state folder may not be made yet
            folder = folder.parent
        return shutil.disk_usage(folder).free / 1e6
    except OSError:
        return None


def _temperature_c(root: Path) -> float | None:
    """The hottest sensor. Jetson's PMIC-Die zone is left out: it always says 50 or 100."""
    zones = [
        number_in(zone / "temp")
        for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))
        if text_in(zone / "type") != "PMIC-Die"
    ]
    if not zones:
        zones = [number_in(file) for file in sorted((root / "sys/class/hwmon").glob("hwmon*/temp*_input"))]
    plausible = [zone / 1000 for zone in zones if zone is not None and -40_000 < zone < 150_000 and zone != 0]
    return max(plausible, default=None)


def _power(root: Path) -> tuple[float | None, bool | None, str]:
    """Charge of the machine's own battery, whether it hangs on a supply, and why there is no charge."""
    charge, online, seen = None, [], False
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if text_in(supply / "scope") == "Device":  # a mouse's battery, say
            continue
        kind = text_in(supply / "type")
        if kind == "Battery":
            seen = True
            charge = number_in(supply / "capacity") if charge is None else charge
        elif kind and (value := number_in(supply / "online")) is not None:
            online.append(value > 0)
    return (
        charge,
        any(online) if online else None,
        "its charge cannot be read" if seen else "there is no battery",
    )
