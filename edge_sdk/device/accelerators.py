"""Which accelerators this machine has, by name. Whether they compute is the trainer's to find out."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.device.files import text_in
from edge_sdk.device.nvml import gpu_names
from edge_sdk.device.tegra import tegra_chip

__all__ = ["accelerators", "gpus_sleep"]


def accelerators(root: Path) -> tuple[tuple[str, ...], str]:
    """Their names, and, where there is none, why.

    The kernel driver's own files come first: loading NVML costs an agent several MB.
    """
    chip = tegra_chip(root)
    if chip:
        return (f"NVIDIA {chip} (integrated)",), ""
    names = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        for line in text_in(file).splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model" and value.strip():
                names.append(value.strip())
    if names:
        return tuple(names), ""
    if root == Path("/") and any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return gpu_names()
    return (), "no NVIDIA driver is loaded"


def gpus_sleep(root: Path) -> bool:
    """Whether there are NVIDIA GPUs with memory of their own, and the kernel has switched off all of them."""
    places = [file.parent.name for file in (root / "proc/driver/nvidia/gpus").glob("*/information")]
    states = [text_in(root / "sys/bus/pci/devices" / place / "power/runtime_status") for place in places]
    return bool(states) and all(state == "suspended" for state in states)
