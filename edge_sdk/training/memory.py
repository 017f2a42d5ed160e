"""Memory of the trainer, measured and limited one way. MB are 10^6 bytes.

At rest: resident memory with the model loaded, after a discarded warm-up step, collected and trimmed.
Peak: ``VmHWM`` after clearing it (5 into /proc/self/clear_refs), above rest; on CUDA the allocator's own
highest figure, above what is allocated at rest.
"""

from __future__ import annotations

import logging
import resource
from pathlib import Path
from typing import Any

import torch

from edge_sdk.training.allocator import allocator_kind, cap_heap, trim

__all__ = ["Meter", "is_out_of_memory", "limit_growth", "read_status"]

_log = logging.getLogger(__name__)
_MB = 1e6


def read_status() -> dict[str, float]:
    """VmRSS, VmHWM, VmData, RssAnon and the like of this process, in MB."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value[:-3]) * 1024 / _MB
    return fields


class Meter:
    """Measures from its making: ``rest_mb`` at the start, ``peak_mb()`` above that since then."""

    def __init__(self, device: Any) -> None:
        self._cuda = device if device.type == "cuda" else None
        trim()
        if self._cuda is not None:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.rest_mb: float = torch.cuda.memory_allocated(device) / _MB
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:  # a container may forbid it; the mark then is that of the whole life
            _log.warning("the memory peak cannot be cleared (%s): peaks are upper bounds", error)
        self.rest_mb = read_status()["VmRSS"]

    def peak_mb(self) -> float:
        return max(0.0, self.highest_mb() - self.rest_mb)

    def highest_mb(self) -> float:
        """The most that was held since the start, in all."""
        if self._cuda is not None:
            return float(torch.cuda.max_memory_allocated(self._cuda)) / _MB
        return read_status()["VmHWM"]


def limit_growth(device: Any, growth_mb: float | None) -> None:
    """From now on this process may hold ``growth_mb`` more than it does; None lifts the limit.

    CPU: the soft RLIMIT_DATA becomes what the process has mapped writable (VmData), plus the growth; beyond
    it mmap, mprotect and brk fail, and torch raises. Some of what is mapped is not resident, holes of the
    heap above all, and can become so: this stops a growth that nobody looks at, and who must be exact
    compares VmHWM with the limit, as the engine does between layers. An allocator fills few of its holes
    and makes new ones, hence ``_pieces_mb``; tcmalloc has a limit of its own on what it holds, set as well.
    CUDA: a cap on torch's caching allocator.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        held = torch.cuda.memory_reserved(device)
        share = 1.0 if growth_mb is None else min(1.0, (held + growth_mb * _MB) / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    cap_heap(growth_mb)
    if growth_mb is None:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        return
    soft = int((read_status()["VmData"] + growth_mb + _pieces_mb(growth_mb)) * _MB)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _pieces_mb(growth_mb: float) -> float:
    """What the heap may map beyond the growth. mimalloc's pages for large tensors are not used for small
    ones, and batches of every length leave pieces: trainings that held 36 MB were refused at 56."""
    return 16.0 + growth_mb if allocator_kind() == "mimalloc" else 0.0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had: Python's, torch's, or the C++ library's."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error)
    # oneDNN could not map its code; of what it does not support it says "primitive descriptor"
    if isinstance(error, RuntimeError) and text.strip() == "could not create a primitive":
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(
        sign in text
        for sign in ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory",
                     "could not create a memory", "out of memory")
    )  # fmt: skip
