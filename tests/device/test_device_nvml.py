"""GPUs by NVML, faked at its edge: no driver is at hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from edge_sdk.device.nvml import gpu_free_mb, gpu_names, read_gpus


class NVMLError(Exception):
    """As pynvml's."""


class Library:
    """Two GPUs: one that tells everything, and one that tells as little as a laptop's may."""

    NVMLError = NVMLError

    def __init__(self, count: int = 2, broken: str = "") -> None:
        self._count, self._broken, self.open = count, broken, 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self._broken:
            raise NVMLError(self._broken)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self._count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid not in ("GPU-a", "GPU-b"):
            raise NVMLError("Not Found")
        return ("GPU-a", "GPU-b").index(uuid)

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        return "NVIDIA A" if handle == 0 else b"NVIDIA B"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=8_000_000_000, free=6_000_000_000 + handle, used=0)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return self._told(handle, 45_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:  # noqa: N802
        return self._told(handle, 80_000)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        return 71 + sensor

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return self._told(handle, 0x01 | 0x04 | 0x20)

    def _told(self, handle: int, value: int) -> int:
        if handle:
            raise NVMLError("Not Supported")
        return value


def test_all_that_it_tells() -> None:
    library = Library()
    (one, other), why = read_gpus(library)
    assert (why, library.open) == ("", 0)
    assert (one.index, one.name, one.memory_mb, one.free_mb) == (0, "NVIDIA A", 8000.0, 6000.0)
    assert (one.power_w, one.power_limit_w, one.temperature_c) == (45.5, 80.0, 71.0)
    assert one.throttling == ("power limit", "heat (driver)"), "an idle GPU is not held down"
    assert one.reasons == {}
    assert (other.name, other.power_w, other.throttling, other.temperature_c) == (
        "NVIDIA B",
        None,
        None,
        71.0,
    )
    assert other.reasons.keys() == {"power_w", "power_limit_w", "throttling"}
    assert other.reasons["power_w"] == "NVML: Not Supported"


def test_names_and_free_memory() -> None:
    assert gpu_names(Library()) == (("NVIDIA A", "NVIDIA B"), "")
    assert gpu_free_mb(0, nvml=Library()) == 6000.0
    assert gpu_free_mb(7, nvml=Library()) is None


def test_a_gpu_is_found_by_its_uuid_whatever_cuda_counts() -> None:
    """CUDA counts the fastest first, or only those in CUDA_VISIBLE_DEVICES: its number is not NVML's."""
    assert gpu_free_mb(0, "GPU-b", Library()) == 6000.000001
    assert gpu_free_mb(5, "GPU-a", Library()) == 6000.0
    assert gpu_free_mb(0, "GPU-part", Library()) is None, "which of the two it is part of is not known"
    assert gpu_free_mb(0, "GPU-part", Library(count=1)) == 6000.0


def test_a_driver_that_does_not_answer_or_has_nothing() -> None:
    assert read_gpus(Library(broken="Driver Not Loaded")) == ((), "NVML: Driver Not Loaded")
    assert read_gpus(Library(count=0)) == ((), "NVML reports no GPU")
    assert gpu_free_mb(0, nvml=Library(broken="Driver Not Loaded")) is None
