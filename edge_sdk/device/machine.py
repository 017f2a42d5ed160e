"""This machine, as read: memory, processor, power, heat, battery, accelerators. Nothing is computed or set.

Files are read below ``root``, so that trees recorded on other machines can be tested. What cannot be read
is None, and ``Profile.reasons`` says why. MB are 10^6 bytes.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from edge_sdk.device.accelerators import accelerators, gpus_sleep
from edge_sdk.device.cgroups import memory_limits, processor_limit
from edge_sdk.device.files import number_or_why, text_in, text_or_why
from edge_sdk.device.heat import temperatures_c, throttling
from edge_sdk.device.nvml import gpu_free_mb, read_gpus
from edge_sdk.device.power import battery, draw, power_mode
from edge_sdk.device.tegra import l4t_release, tegra_chip
from edge_sdk.protocol.measure import Gpu, Profile

__all__ = ["free_memory_mb", "gpu_free_mb", "process_rss_mb", "read_profile", "total_memory_mb"]

_ROOT = Path("/")
_T = TypeVar("_T")


def read_profile(
    root: Path = _ROOT,
    disk: Path | None = None,
    *,
    gpus: bool = False,
    wake: bool = False,
    interval_s: float = 0.0,
) -> Profile:
    """Reads the machine.

    Args:
        root: where ``proc``, ``sys`` and ``etc`` are looked for.
        disk: a folder on the disk whose space counts; None: ``root``.
        gpus: ask NVML for GPUs with memory of their own, which loads it.
        wake: also those that sleep, as a laptop's does: asking wakes them, and they draw watts until they
            sleep again.
        interval_s: to wait for meters that count energy; 0: these are left out.
    """
    reasons: dict[str, str] = {}

    def known(field: str, found: tuple[_T, str]) -> _T:
        value, why = found
        if why:
            reasons[field] = why
        return value

    machine = known("machine", _machine(root))
    drawn = draw(root, interval_s)
    known("power_w", (drawn.watts, drawn.why))
    temperatures = known("temperature_c", temperatures_c(root))
    names = known("accelerators", accelerators(root))
    found = known("gpus", _gpus(root, names, wanted=gpus, wake=wake))
    charge, no_charge, on_ac, no_supply = battery(root)
    (total, free), no_disk = _disk_mb(disk or root)
    hottest = [*temperatures.values(), *(gpu.temperature_c for gpu in found if gpu.temperature_c is not None)]
    return Profile(
        at=time.time(),
        machine=machine,
        system=known("system", _system(root)),
        processor=known("processor", _processor(root)),
        cores=_cores(root),
        cpu_mhz=known("cpu_mhz", _fastest_mhz(root, "scaling_cur_freq")),
        cpu_max_mhz=known("cpu_max_mhz", _fastest_mhz(root, "scaling_max_freq")),
        memory_mb=known("memory_mb", (total_memory_mb(root), _no_meminfo(root, "MemTotal"))),
        free_mb=known("free_mb", (free_memory_mb(root), _no_meminfo(root, "MemAvailable"))),
        shared_memory=known("shared_memory", _shared(root, names)),
        disk_mb=known("disk_mb", (total, no_disk)),
        disk_free_mb=known("disk_free_mb", (free, no_disk)),
        accelerators=names,
        gpus=found,
        power_mode=known("power_mode", power_mode(root)),
        power_w=drawn.watts,
        rails_w=drawn.rails,
        temperature_c=max(hottest, default=None),
        temperatures_c=temperatures,
        throttling=known("throttling", throttling(root)),
        battery_percent=known("battery_percent", (charge, no_charge)),
        on_ac=known("on_ac", (on_ac, no_supply)),
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


def _no_meminfo(root: Path, name: str) -> str:
    if name in _meminfo(root):
        return ""
    return text_or_why(root / "proc/meminfo")[1] or f"meminfo does not tell {name}"


def _machine(root: Path) -> tuple[str, str]:
    tree = text_in(root / "proc/device-tree/model") or text_in(root / "sys/firmware/devicetree/base/model")
    if tree:
        return tree, ""
    dmi = root / "sys/devices/virtual/dmi/id"
    name = " ".join(filter(None, (text_in(dmi / "sys_vendor"), text_in(dmi / "product_name"))))
    return name, "" if name else "neither a device tree nor DMI names it"


def _system(root: Path) -> tuple[str, str]:
    release = l4t_release(root)
    if release is not None:
        return str(release), ""
    text, why = text_or_why(root / "etc/os-release")
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "PRETTY_NAME":
            return value.strip("\"'"), ""
    return "", why or "os-release does not name it"


def _cpuinfo(root: Path) -> Iterator[tuple[str, str]]:
    for line in text_in(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _processor(root: Path) -> tuple[str, str]:
    names = {name: value for name, value in _cpuinfo(root) if value}
    if "model name" in names:
        return names["model name"], ""
    if "CPU part" in names:  # Arm boards give numbers only
        return f"Arm implementer {names.get('CPU implementer', '?')} part {names['CPU part']}", ""
    name = names.get("Hardware", "")
    return name, "" if name else "cpuinfo does not name it"


def _fastest_mhz(root: Path, file: str) -> tuple[float | None, str]:
    """Of all clusters; the kernel writes kHz."""
    why = "the kernel sets no clocks here (no cpufreq)"
    clocks = []
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        clock, reason = number_or_why(policy / file)
        why = reason or why
        if clock is not None:
            clocks.append(clock / 1000)
    return max(clocks, default=None), "" if clocks else why


def _shared(root: Path, names: tuple[str, ...]) -> tuple[bool | None, str]:
    return (bool(tegra_chip(root)), "") if names else (None, "there is no accelerator")


def _gpus(root: Path, names: tuple[str, ...], *, wanted: bool, wake: bool) -> tuple[tuple[Gpu, ...], str]:
    if not names or tegra_chip(root):
        return (), "no GPU here has memory of its own"
    if not wanted:
        return (), "their driver was not asked"
    if not wake and gpus_sleep(root):
        return (), "they sleep, and asking would wake them"
    return read_gpus()


def _cores(root: Path) -> int:
    if root == _ROOT and hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = sum(name == "processor" for name, _ in _cpuinfo(root))
    quota = processor_limit(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _disk_mb(folder: Path) -> tuple[tuple[float | None, float | None], str]:
    """All of it, and what is free."""
    try:
        while not folder.exists():  # the state folder may not be made yet
            folder = folder.parent
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return (None, None), f"the disk cannot be asked: {error.strerror}"
    return (usage.total / 1e6, usage.free / 1e6), ""
