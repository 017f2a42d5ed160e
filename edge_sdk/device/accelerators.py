"""Which accelerators this machine has, by name. Whether they compute is the trainer's to find out."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.device.files import text_in

__all__ = ["accelerators", "gpu_free_mb"]


def accelerators(root: Path) -> tuple[tuple[str, ...], str]:
    """Their names, and, where there is none, why.

    The kernel driver's own files come first: loading NVML costs an agent several MB.
    """
    compatible = text_in(root / "proc/device-tree/compatible").split("\0")
    chips = [name.removeprefix("nvidia,") for name in compatible if name.startswith("nvidia,tegra")]
    if chips:
        return (f"NVIDIA {chips[0]} (integrated)",), ""
    names = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        for line in text_in(file).splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model" and value.strip():
                names.append(value.strip())
    if names:
        return tuple(names), ""
    if root == Path("/") and any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return _by_nvml()
    return (), "no NVIDIA driver is loaded"


def gpu_free_mb(index: int) -> float | None:
    """Free memory of a GPU that has its own, in MB; None where it cannot be read (NVML, nvidia-ml-py).

    ``index`` is NVML's, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID and every device visible.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            return float(pynvml.nvmlDeviceGetMemoryInfo(handle).free) / 1e6
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _by_nvml() -> tuple[tuple[str, ...], str]:
    try:
        import pynvml
    except ImportError:
        return (), "an NVIDIA device is there; its name needs nvidia-ml-py (extra 'nvidia')"
    try:
        pynvml.nvmlInit()
        try:
            count = pynvml.nvmlDeviceGetCount()
            names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return (), f"NVML: {error}"
    return tuple(str(name) for name in names), "" if names else "NVML reports none"
