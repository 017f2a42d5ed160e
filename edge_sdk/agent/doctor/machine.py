"""Findings about the machine: Python, JetPack, memory and what holds it down. Nothing is started."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from edge_sdk.agent.doctor.finding import Finding
from edge_sdk.config.agent import AgentConfig
from edge_sdk.device.cgroups import memory_limits
from edge_sdk.device.machine import free_memory_mb, read_profile, total_memory_mb
from edge_sdk.device.tegra import l4t_release, tegra_chip
from edge_sdk.errors import TrainerError

__all__ = ["machine_findings"]

_JETPACK_6 = "JetPack 6 comes with Python 3.10 and CUDA 12"


def machine_findings(root: Path, config: AgentConfig | None) -> Iterator[Finding]:
    yield _python()
    yield _jetpack(root)
    yield _memory(root, config)
    yield _held_down(root)


def _python() -> Finding:
    told = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.maxsize < 1 << 32:
        return Finding(
            id="python", level="error", text=f"{told}, in 32 bits: there is no torch for it",
            fix="install the system's 64-bit edition", exit_code=TrainerError.exit_code,
        )  # fmt: skip
    return Finding(id="python", level="ok", text=told)


def _jetpack(root: Path) -> Finding:
    release = l4t_release(root)
    if release is None:
        if not tegra_chip(root):
            return Finding(id="jetpack", level="skipped", text="this is no Jetson")
        return Finding(
            id="jetpack", level="warning",
            text="a Jetson whose JetPack is not told (/etc/nv_tegra_release): a container without it?",
            fix="mount /etc/nv_tegra_release into the container, or start it with NVIDIA's runtime",
        )  # fmt: skip
    match release.jetpack:
        case 4:
            return Finding(
                id="jetpack", level="error",
                text=f"{release} is refused: it comes with Python 3.6 and CUDA 10.2, for which there is no "
                "current torch, in a container neither",
                fix="such a board (Nano, TX2) has no newer JetPack: simulate it by agent.device_class with "
                "agent.emulated = true on another machine; Xavier boards take JetPack 5, in a container",
                exit_code=TrainerError.exit_code,
            )  # fmt: skip
        case 5:
            return Finding(
                id="jetpack", level="note",
                text=f"{release} comes with Python 3.8; this needs 3.10, so it runs in a container there",
                fix=f"on an Orin install JetPack 6; {_JETPACK_6}",
            )  # fmt: skip
        case None:
            return Finding(
                id="jetpack", level="warning", text=f"{release} is not known to this version",
                fix="see below whether torch computes on the GPU",
            )  # fmt: skip
    return Finding(id="jetpack", level="ok", text=str(release))


def _memory(root: Path, config: AgentConfig | None) -> Finding:
    total, free = total_memory_mb(root), free_memory_mb(root)
    if total is None or free is None:
        return Finding(
            id="memory", level="warning", text="/proc/meminfo does not tell how much memory there is",
            fix="set limits.memory_mb: nothing else holds the trainer back",
        )  # fmt: skip
    groups = memory_limits(root)
    told = f"{total:.0f} MB, of which {free:.0f} are free"
    if groups:
        told += f"; a control group limits this process to {min(limit for limit, _ in groups) / 1e6:.0f} MB"
    wanted = None if config is None else config.limits.memory_mb
    if wanted is not None and wanted > free:
        less = "than there is" if wanted > total else "than is free now"
        return Finding(
            id="memory", level="warning", text=f"{told}; limits.memory_mb is {wanted:g}, more {less}",
            fix="end other programs, or lower it: training that needs it all would meet the kernel's killer",
        )  # fmt: skip
    return Finding(id="memory", level="ok", text=told)


def _held_down(root: Path) -> Finding:
    profile = read_profile(root)
    if profile.throttling is None:
        return Finding(id="throttling", level="skipped", text=profile.reasons["throttling"])
    mode = f"power mode {profile.power_mode}" if profile.power_mode else "no power modes here"
    if profile.throttling:
        return Finding(
            id="throttling", level="warning",
            text=f"clocks are held down by {', '.join(profile.throttling)} ({mode})",
            fix="look at its cooling and its power supply: rounds take longer than predicted",
        )  # fmt: skip
    return Finding(id="throttling", level="ok", text=f"nothing holds the clocks down; {mode}")
