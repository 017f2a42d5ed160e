"""GPUs with memory of their own, by NVIDIA's management library (nvidia-ml-py, extra ``nvidia``).

It is loaded only where somebody asks: it costs a process several MB.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from edge_sdk.protocol.measure import Gpu

__all__ = ["gpu_free_mb", "gpu_names", "read_gpus"]

_T = TypeVar("_T")
_MISSING = "needs nvidia-ml-py: pip install 'edge-sdk[nvidia]'"
_HOLDS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "heat (driver)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""Bits of NVML's reasons for low clocks. An idle GPU, set clocks and a display's are no throttling."""


def read_gpus(nvml: Any | None = None) -> tuple[tuple[Gpu, ...], str]:
    """All GPUs in NVML's order, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID; or why none.

    Args:
        nvml: the library; None: the installed one.
    """
    return _ask(nvml, lambda lib, count: tuple(_gpu(lib, index) for index in range(count)), ())


def gpu_names(nvml: Any | None = None) -> tuple[tuple[str, ...], str]:
    """Their names; or why none."""

    def names(lib: Any, count: int) -> tuple[str, ...]:
        return tuple(_text(lib.nvmlDeviceGetName(lib.nvmlDeviceGetHandleByIndex(i))) for i in range(count))

    return _ask(nvml, names, ())


def gpu_free_mb(index: int, uuid: str = "", nvml: Any | None = None) -> float | None:
    """Free memory of one of them in MB; None where it cannot be read.

    Args:
        index: CUDA's. It is NVML's too where there is one GPU; where there are several, CUDA may put the
            fastest first, and sees only some of them with CUDA_VISIBLE_DEVICES.
        uuid: as CUDA tells it, which is right in any case; empty: not known.
    """

    def free(lib: Any, count: int) -> float | None:
        try:
            handle = lib.nvmlDeviceGetHandleByUUID(uuid) if uuid else None
        except lib.NVMLError:  # not NVML's name of it: a part of a GPU, say
            handle = None
        if handle is None:
            if index >= count or (uuid and count > 1):
                return None
            handle = lib.nvmlDeviceGetHandleByIndex(index)
        return float(lib.nvmlDeviceGetMemoryInfo(handle).free) / 1e6

    return _ask(nvml, free, None)[0]


def _ask(nvml: Any | None, ask: Callable[[Any, int], _T], nothing: _T) -> tuple[_T, str]:
    lib = nvml or _installed()
    if lib is None:
        return nothing, _MISSING
    try:
        lib.nvmlInit()
        try:
            count = int(lib.nvmlDeviceGetCount())
            return ask(lib, count), "" if count else "NVML reports no GPU"
        finally:
            lib.nvmlShutdown()
    except lib.NVMLError as error:
        return nothing, f"NVML: {error}"


def _gpu(lib: Any, index: int) -> Gpu:
    handle = lib.nvmlDeviceGetHandleByIndex(index)
    reasons: dict[str, str] = {}

    def value(field: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (lib.NVMLError, AttributeError) as error:  # AttributeError: an older library has no such call
            reasons[field] = f"NVML: {error}"
            return None

    memory = value("memory_mb", lambda: lib.nvmlDeviceGetMemoryInfo(handle))
    if memory is None:
        reasons["free_mb"] = reasons["memory_mb"]
    milliwatts = value("power_w", lambda: lib.nvmlDeviceGetPowerUsage(handle))
    limit = value("power_limit_w", lambda: lib.nvmlDeviceGetEnforcedPowerLimit(handle))
    bits = value("throttling", lambda: lib.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    temperature = value("temperature_c", lambda: lib.nvmlDeviceGetTemperature(handle, 0))
    return Gpu(
        index=index,
        name=_text(value("name", lambda: lib.nvmlDeviceGetName(handle)) or ""),
        memory_mb=None if memory is None else memory.total / 1e6,
        free_mb=None if memory is None else memory.free / 1e6,
        power_w=None if milliwatts is None else milliwatts / 1000,
        power_limit_w=None if limit is None else limit / 1000,
        temperature_c=None if temperature is None else float(temperature),
        throttling=None if bits is None else tuple(word for bit, word in _HOLDS.items() if bits & bit),
        reasons=reasons,
    )


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name


def _installed() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml  # type: ignore[no-any-return]
