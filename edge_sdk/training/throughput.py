"""What this machine computes and copies in a second: small kernels, timed, bounded in memory and time.

Products of square matrices per dtype, as training is made of; and, of vectors larger than caches as a rule
are, a copy and a triad (a = b + s c). A dtype that a device cannot multiply is told with torch's reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from edge_sdk.device.machine import free_memory_mb, read_profile
from edge_sdk.protocol.measure import Throughput
from edge_sdk.training.memory import is_out_of_memory

__all__ = ["compute_devices", "measure_throughput"]

Kernel = Callable[[], object]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_SIDES = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096, 8192)}
"""Of matrices: grown until one product takes ``_LONG_S``."""
_LONG_S = {"cpu": 0.02, "cuda": 0.002}
_VECTOR_MB = {"cpu": 64, "cuda": 256}
_SHARE_OF_FREE = 0.05
"""Of free memory, that one vector may take at most; there are three."""
_LEAST_REPEATS, _MOST_REPEATS = 3, 50


def compute_devices() -> list[str]:
    """``cpu``, and every CUDA device that torch sees."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def measure_throughput(device: str, seconds: float, check: Callable[[], None]) -> Throughput:
    """Measures one device, each kernel for its share of ``seconds``; a slow one ends after a repeat.

    Args:
        check: called between repeats; raises to end the request.
    """
    kind = device.partition(":")[0]
    began, rates, spread, reasons = time.monotonic(), {}, {}, {}
    names = ["copy", "triad", *_DTYPES]  # what may be slow comes last
    for position, name in enumerate(names):
        left = began + seconds - time.monotonic()
        if left <= 0:
            reasons[name] = f"no time was left of {seconds:g} s"
            continue
        try:
            build = _product if name in _DTYPES else _stream
            work, kernel = build(name, device, left / (len(names) - position), check)
            taken = _times(kernel, device, left / (len(names) - position), check)
        except (RuntimeError, NotImplementedError, MemoryError) as error:
            out = is_out_of_memory(error)
            reasons[name] = "not enough memory" if out else f"torch: {str(error).splitlines()[0][:200]}"
            continue
        middle = statistics.median(taken)
        rates[name] = work / middle / 1e9
        if len(taken) > 1:
            spread[name] = (max(taken) - min(taken)) / middle
    return Throughput(
        device=device,
        name=read_profile().processor if kind == "cpu" else torch.cuda.get_device_name(device),
        at=time.time(),
        gflops={name: rate for name, rate in rates.items() if name in _DTYPES},
        gb_s={name: rate for name, rate in rates.items() if name not in _DTYPES},
        spread=spread,
        reasons=reasons,
    )


def _product(name: str, device: str, seconds: float, check: Callable[[], None]) -> tuple[float, Kernel]:
    """Floating point operations (or those of integers) of one product, and the product: the largest side that
    time allows."""
    kind = device.partition(":")[0]
    work = 0.0
    kernel: Kernel = _nothing
    for side in _SIDES[kind]:
        work, kernel = 2.0 * side**3, _multiply(_operand(side, name, device), _operand(side, name, device))
        _once(kernel, device)  # libraries load, scratch is taken
        check()
        took = _once(kernel, device)
        if took >= _LONG_S[kind] or 8 * took * _LEAST_REPEATS > seconds:
            break
    return work, kernel


def _operand(side: int, name: str, device: str) -> Any:
    if name == "int8":
        return torch.randint(-8, 8, (side, side), dtype=torch.int8, device=device)
    return torch.randn(side, side, device=device).to(_DTYPES[name])


def _multiply(left: Any, right: Any) -> Kernel:
    if left.dtype == torch.int8:
        transposed = right.t().contiguous().t()  # the layout that CUDA's kernel wants of the right side
        return lambda: torch._int_mm(left, transposed)
    out = torch.empty_like(left)
    return lambda: torch.matmul(left, right, out=out)


def _stream(name: str, device: str, _seconds: float, _check: Callable[[], None]) -> tuple[float, Kernel]:
    """Bytes read and written, and the kernel."""
    kind = device.partition(":")[0]
    free = free_memory_mb() if kind == "cpu" else torch.cuda.mem_get_info(device)[0] / 1e6
    megabytes = _VECTOR_MB[kind] if free is None else min(_VECTOR_MB[kind], _SHARE_OF_FREE * free)
    count = max(1, int(megabytes * 1e6) // 4)
    source, target = torch.ones(count, device=device), torch.zeros(count, device=device)
    if name == "copy":
        return 2 * 4.0 * count, lambda: target.copy_(source)
    other = torch.ones(count, device=device)
    return 3 * 4.0 * count, lambda: torch.add(source, other, alpha=3.0, out=target)


def _times(kernel: Kernel, device: str, seconds: float, check: Callable[[], None]) -> list[float]:
    _once(kernel, device)
    taken: list[float] = []
    began = time.monotonic()
    while not taken or len(taken) < _MOST_REPEATS:
        spent = time.monotonic() - began
        if taken and spent >= (seconds if len(taken) >= _LEAST_REPEATS else 2 * seconds):
            break  # one repeat is better than nothing for the next kernel
        check()
        taken.append(_once(kernel, device))
    return taken


def _once(kernel: Kernel, device: str) -> float:
    """Seconds of one call, finished."""
    began = time.perf_counter()
    with torch.inference_mode():
        kernel()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _nothing() -> None:
    """In place of a kernel, before there is one."""
