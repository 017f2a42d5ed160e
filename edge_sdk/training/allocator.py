"""The memory allocator of this process: which one it is, how it is set up, how it gives memory back.

No torch here: it is settled before torch is loaded. The host may have preloaded one (``edge_sdk.device.
allocators``); what is in use is asked of the process, not believed: ld.so only warns of a library that it
cannot load, and goes on.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from edge_sdk.protocol.preload import PRELOADED

__all__ = [
    "HEAP",
    "allocator_kind",
    "allocator_word",
    "cap_heap",
    "empty_gpu_cache",
    "settle_allocator",
    "trim",
]

_log = logging.getLogger(__name__)

# names in malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MMAP_BYTES = 128 << 10
"""glibc: what is larger gets pages of its own, which go back at once. This is its first value; setting it
stops glibc from raising it. Peaks then are straight in depth, and packed activations show in them (MiniLM,
batch 16, length 32, every layer tuned, above rest: 84 MB plain, 50 packed; left to glibc 108 and 100), at
1.3 to 1.5 times the step time. From 1 MiB on they show no more, at 512 KiB time is no better."""

HEAP = 1.3
"""What the other allocators hold for a byte of tensors, as mimalloc did over 16 settings of a RoBERTa shape.
glibc, set so, holds within a few percent of it."""

_MB = 1e6

_TCMALLOC_BOOKS = 8 << 20
"""tcmalloc takes room for its own bookkeeping in pieces of so much; its limit counts the first one too."""


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def settle_allocator(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets the allocator up for this process, and says in the log which it is.

    What the host preloaded is taken out of ``environ``: processes that this one starts do without.
    """
    wanted = environ.pop(PRELOADED, None)
    if wanted is not None:
        others = [path for path in environ.pop("LD_PRELOAD", "").split(":") if path not in ("", wanted)]
        if others:
            environ["LD_PRELOAD"] = ":".join(others)
        if not _in_use(wanted):
            _log.warning("%s was to be preloaded and is not in use: see the lines above", wanted)
    kind, libc = allocator_kind(), _process()
    if kind == "glibc":
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _MMAP_BYTES)
    _log.info("memory is allocated by %s", _word())
    if kind == "other":
        _log.warning("this allocator is not known: memory peaks will vary more")


@functools.cache
def allocator_kind() -> str:
    """``glibc``, ``mimalloc``, ``tcmalloc``, ``jemalloc`` or ``other``: whoever answers to malloc."""
    name = Path(_library_of_malloc()).name
    for kind in ("mimalloc", "tcmalloc", "jemalloc"):
        if kind in name:
            return kind
    return "glibc" if hasattr(_process(), "gnu_get_libc_version") and name.startswith("libc.so") else "other"


def allocator_word() -> str:
    """Kind and version, as in ``mimalloc 3.4.3``: part of what a cost fit depends on."""
    return _word()


@functools.cache
def _word() -> str:
    kind, process = allocator_kind(), _process()
    if kind == "mimalloc":
        number = process.mi_version()  # 209 or 2109 in the second generation, 30403 in the third
        parts = (number // 10000, number // 100 % 100, number % 100) if number >= 10000 else (
            number // 100 if number < 1000 else number // 1000, number // 10 % 10, number % 10
        )  # fmt: skip
        return "mimalloc {}.{}.{}".format(*parts)
    if kind == "tcmalloc":
        process.tc_version.restype = ctypes.c_char_p
        said = (process.tc_version(None, None, None) or b"").decode()
        return f"tcmalloc ({said})" if said else kind
    if kind == "jemalloc":
        version, size = ctypes.c_char_p(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_char_p))
        process.mallctl(b"version", ctypes.byref(version), ctypes.byref(size), None, ctypes.c_size_t(0))
        return f"jemalloc {(version.value or b'').decode().partition('-')[0]}".rstrip()
    if kind == "glibc":
        process.gnu_get_libc_version.restype = ctypes.c_char_p
        return f"glibc {process.gnu_get_libc_version().decode()}"
    return f"{Path(_library_of_malloc()).name or 'malloc'} (not known)"


def trim() -> None:
    """Collects garbage and gives free pages back to the system, and a GPU's to its driver."""
    gc.collect()
    empty_gpu_cache()
    kind, process = allocator_kind(), _process()
    if kind == "mimalloc":
        process.mi_collect(ctypes.c_bool(True))
    elif kind == "tcmalloc":
        process.MallocExtension_ReleaseFreeMemory()
    elif kind == "jemalloc":
        # 4096 stands for all arenas
        process.mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0))
    elif hasattr(process, "malloc_trim"):
        process.malloc_trim(ctypes.c_size_t(0))


def empty_gpu_cache() -> None:
    """What torch's CUDA allocator keeps of past trainings looks taken to whoever asks the driver for free
    memory, as the agent does before it chooses."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def cap_heap(growth_mb: float | None) -> bool:
    """Forbids the heap to grow by more than ``growth_mb`` from what it holds now; None lifts that.

    Only tcmalloc can: it counts what it holds, less what it gave back, and gives its free pages back before
    it refuses. False where the allocator has no such limit.
    """
    if allocator_kind() != "tcmalloc":
        return False
    mebibytes = 0 if growth_mb is None else max(1, int((_tcmalloc_held() + growth_mb * _MB) / (1 << 20)))
    cap = ctypes.c_size_t(mebibytes)
    return bool(_process().MallocExtension_SetNumericProperty(b"tcmalloc.heap_limit_mb", cap))


def _tcmalloc_held() -> int:
    def value(name: bytes) -> int:
        number = ctypes.c_size_t()
        _process().MallocExtension_GetNumericProperty(name, ctypes.byref(number))
        return number.value

    held = value(b"generic.heap_size") - value(b"tcmalloc.pageheap_unmapped_bytes")
    return held + _TCMALLOC_BOOKS


def _process() -> Any:
    """The symbols of this process."""
    return ctypes.CDLL(None)


def _in_use(library: str) -> bool:
    own = _library_of_malloc()
    return bool(own) and Path(own).resolve() == Path(library).resolve()


@functools.cache
def _library_of_malloc() -> str:
    """The file that malloc comes from; empty where that cannot be told."""
    process, info = _process(), _DlInfo()
    if not hasattr(process, "dladdr"):
        return ""
    address = ctypes.cast(process.malloc, ctypes.c_void_p)
    return os.fsdecode(info.file) if process.dladdr(address, ctypes.byref(info)) and info.file else ""
