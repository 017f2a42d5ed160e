"""Memory of the trainer, measured and limited one way. MB are 10^6 bytes.

At rest: resident memory with the model loaded, after a discarded warm-up step, collected and trimmed.
Peak: ``VmHWM`` after clearing it (5 into /proc/self/clear_refs), above rest; on CUDA the allocator's own
highest figure, above what is allocated at rest.
"""

from __future__ import annotations

import logging
import math
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
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

    CPU: the soft RLIMIT_DATA becomes what the process holds of its own (RssAnon), plus what it has mapped
    writable and not touched (``_untouched_mb``), plus the growth; beyond it mmap, mprotect and brk fail, and
    torch raises. What is mapped and untouched can still become resident, so the caller compares VmHWM with
    the limit after every step as well. tcmalloc has a limit of its own on what it holds: set too, and exact.
    CUDA: a cap on torch's caching allocator.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        held = torch.cuda.memory_reserved(device)
        share = 1.0 if growth_mb is None else min(1.0, (held + growth_mb * _MB) / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    capped = cap_heap(growth_mb)
    status = read_status()
    untouched = _untouched_mb(status)
    if growth_mb is None:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        return
    mapped = status["VmData"] if capped else status["RssAnon"] + untouched
    slack = _FRAGMENTS * growth_mb if allocator_kind() == "mimalloc" else 0.0
    soft = int((mapped + growth_mb + slack) * _MB)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


_FRAGMENTS = 0.25
"""Share of the growth that mimalloc may map beyond it: of the holes that it has, some are never filled, and
a training that held 28 MB was refused at a growth of 36. Who fills them all is found out by VmHWM."""

_least_untouched = [math.inf]


def _untouched_mb(status: dict[str, float]) -> float:
    """What is mapped writable, not touched, and not for the heap to fill: stacks, scratch of libraries.

    The least that was seen: an allocator that keeps its address space (mimalloc) has more of it after every
    deep training, and a limit on top of that would limit nothing.
    """
    untouched = status["VmData"] - status["RssAnon"] - _holes_mb()
    _least_untouched[0] = min(_least_untouched[0], untouched)
    return _least_untouched[0]


def _holes_mb() -> float:
    """What the heap has mapped writable and given back, in holes that a tensor fits: those it fills again.

    The heap: what brk gave, and mimalloc's arenas, told by their name where the kernel keeps names, by the
    addresses that mimalloc asks for where it does not.
    """
    page, pages = resource.getpagesize(), 0
    try:
        mappings = Path("/proc/self/maps").read_text().splitlines()
        with Path("/proc/self/pagemap").open("rb", buffering=0) as stream:
            for entry in filter(None, map(_MAPPING.match, mappings)):
                start, end, name = int(entry["start"], 16), int(entry["end"], 16), entry["name"]
                if name in ("[heap]", "[anon:mimalloc]") or (not name and start in _ARENA_ADDRESSES):
                    stream.seek(start // page * 8)
                    entries = np.frombuffer(stream.read((end - start) // page * 8), dtype=np.uint64)
                    away = (entries >> np.uint64(62)) == 0  # neither in memory nor swapped out
                    edges = np.diff(away.astype(np.int8), prepend=0, append=0)
                    runs = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
                    pages += int(runs[runs * page >= _HOLE_BYTES].sum())
    except OSError as error:
        _log.info("which pages are resident cannot be read (%s): the limit is less exact", error)
    return pages * page / _MB


_MAPPING = re.compile(r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) rw\S\S \S+ \S+ 0\s*(?P<name>.*)")
_ARENA_ADDRESSES = range(2 << 40, 32 << 40)
"""Between 2 and 32 TiB: the kernel places nothing there by itself."""
_HOLE_BYTES = 3 << 20
"""Smaller holes seldom take a tensor of training. MiniLM under mimalloc, 35 MB given back at rest, of which
20 in such holes: training that holds 92 MB passes from a growth of 95 on; with all holes taken off from 110,
with none from 60."""


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
