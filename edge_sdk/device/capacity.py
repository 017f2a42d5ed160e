"""What an estimate needs of a device class: memory for a program, arithmetic, bandwidth; what is not known.

Two amounts are assumed here, and said so wherever they enter: what the system keeps of shared memory, where
no such board's own figure is known, and what CUDA and a desktop keep of a GPU's memory. Nothing else is.
"""

from __future__ import annotations

from edge_sdk.device.classes import DeviceClass, PowerMode
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.base import Record, Text

__all__ = ["GPU_SYSTEM_MB", "SYSTEM_MB", "Capacity", "capacity"]

SYSTEM_MB = 1000.0
"""Assumed share of the system, where no board's idle figure is known; those known are 99 to 2,400 MB,

the larger ones with a desktop."""

GPU_SYSTEM_MB = 500.0
"""Assumed share of CUDA's context and of a desktop, of a GPU's own memory."""


class Capacity(Record, frozen=True, kw_only=True):
    """Of a class in one power mode. None: no figure is known; ``absent`` says which and why."""

    memory_mb: float | None = None
    """What a program can have; of the accelerator's memory where it has its own."""
    memory_how: Text = ""
    fp32_tflops: float | None = None
    """Peak of the accelerator; no program reaches it."""
    fp32_how: Text = ""
    fp16_tflops: float | None = None
    """Peak as stated, for the highest clock; other modes are slower."""
    memory_gb_s: float | None = None
    """Peak as stated, for the highest memory clock."""
    cores: int | None = None
    watts: float | None = None
    absent: tuple[Text, ...] = ()


def capacity(of: DeviceClass, power_mode: str | None = None) -> Capacity:
    """What the class has in that mode; None: with nothing switched off and at its highest clocks.

    Raises ConfigError for a mode that it does not have.
    """
    if power_mode is not None and power_mode not in of.power_modes:
        raise ConfigError(
            f'{of.name} has no power mode "{power_mode}"', f"it has {', '.join(of.power_modes) or 'none'}"
        )
    mode = None if power_mode is None else of.power_modes[power_mode]
    memory, memory_how = _memory(of)
    fp32, fp32_how = _fp32(of, mode)
    cores = mode.cores if mode is not None and mode.cores is not None else _value(of, "cores")
    found = {
        "memory_mb": memory,
        "fp32_tflops": fp32,
        "fp16_tflops": _value(of, "fp16_tflops"),
        "memory_gb_s": _value(of, "memory_gb_s"),
    }
    return Capacity(
        memory_how=memory_how,
        fp32_how=fp32_how,
        cores=None if cores is None else int(cores),
        watts=None if mode is None else mode.watts,
        absent=tuple(f"{name}: {_WHY[name]}" for name, value in found.items() if value is None),
        **found,
    )


_WHY = {
    "memory_mb": "such machines are sold with different memory, or no figure is known here",
    "fp32_tflops": "no stated peak, and no number of CUDA cores with a clock",
    "fp16_tflops": "no stated peak of dense arithmetic",
    "memory_gb_s": "no stated peak",
}


def _memory(of: DeviceClass) -> tuple[float | None, str]:
    if of.accelerator_memory_mb is not None:
        whole = of.accelerator_memory_mb.value
        return round(
            whole - GPU_SYSTEM_MB, 1
        ), f"{whole:.0f} MB of its own, less {GPU_SYSTEM_MB:.0f} (assumed)"
    if of.memory_mb is None:
        return None, ""
    if of.visible_mb is None:
        whole = of.memory_mb.value
        return round(
            whole - SYSTEM_MB, 1
        ), f"{whole:.0f} MB as sold, less {SYSTEM_MB:.0f} for the system (assumed)"
    whole = of.visible_mb.value
    if of.idle_mb is None:
        return round(
            whole - SYSTEM_MB, 1
        ), f"{whole:.0f} MB that Linux has, less {SYSTEM_MB:.0f} for the system (assumed)"
    idle = of.idle_mb.value
    return round(whole - idle, 1), f"{whole:.0f} MB that Linux has, less {idle:.0f} in use on an idle board"


def _fp32(of: DeviceClass, mode: PowerMode | None) -> tuple[float | None, str]:
    """Stated; or two operations a clock and CUDA core, which is what a stated peak is."""
    if of.fp32_tflops is not None and mode is None:
        return of.fp32_tflops.value, "stated"
    cores = mode.cuda_cores if mode is not None and mode.cuda_cores is not None else _value(of, "cuda_cores")
    unlimited = mode is None or (mode.gpu_mhz is None and mode.watts is None)
    clock = _value(of, "gpu_mhz") if mode is None or unlimited else mode.gpu_mhz
    if cores is None or clock is None:
        return None, ""
    return round(2e-6 * cores * clock, 4), f"2 · {cores:.0f} CUDA cores · {clock:g} MHz"


def _value(of: DeviceClass, key: str) -> float | None:
    figure = getattr(of, key)
    return None if figure is None else float(figure.value)
