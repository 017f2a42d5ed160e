"""Memory allocators that the trainer can be started under: found by reading files, never by loading them.

What torch's C library offers either takes longer (every large block goes back at once) or holds peaks that
say little; see ``benchmarks/allocator``. A quicker one is loaded ahead of it, for the trainer's process
alone. Under a memory limit glibc is the better one, set so that blocks go back: what it holds is within a few
percent of what the tensors take, where the others hold a tenth to a half more.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.preload import PRELOADED

__all__ = ["ALLOCATORS", "Allocator", "find_allocator", "library_folders"]

_ELF_HEADER = 20
_HUGE_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_SEPARATORS = (" ", ":")
"""ld.so splits LD_PRELOAD at these, and knows no quotes."""


@dataclass(frozen=True)
class Allocator:
    """A library to preload, and the environment that sets it up. ``library`` None: the C library's own."""

    name: str
    library: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def environment(self, own: Mapping[str, str] = os.environ) -> dict[str, str]:
        """What to add to a process's environment, to start it under this; what ``own`` sets stands, but for
        another allocator that it preloads where the C library's own is wanted."""
        added = {name: value for name, value in self.options.items() if name not in own}
        if self.library is None:
            loaded = own.get("LD_PRELOAD", "")
            others = [path for path in re.split("[ :]", loaded) if not any(name in path for name in _FILES)]
            return added if ":".join(others) == loaded else {**added, "LD_PRELOAD": ":".join(others)}
        added["LD_PRELOAD"] = ":".join(filter(None, (own.get("LD_PRELOAD"), str(self.library))))
        added[PRELOADED] = str(self.library)
        return added


_GLIBC = "glibc"
_FILES: Mapping[str, tuple[str, ...]] = {
    "mimalloc": ("libmimalloc.so.3", "libmimalloc.so.2"),
    "tcmalloc": ("libtcmalloc_minimal.so.4",),
    "jemalloc": ("libjemalloc.so.2",),
}
"""The order is that of preference: by step time, and by how well peaks of mixed plans are foretold."""
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "tcmalloc": {
        # Its warnings of large blocks would fill the trainer's log.
        "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(1 << 40),
    },
    "mimalloc": {
        # Mapped writable only as needed: else a GiB counts against RLIMIT_DATA from the start.
        "MIMALLOC_ARENA_EAGER_COMMIT": "0",
        "MIMALLOC_PAGE_COMMIT_ON_DEMAND": "1",
    },
    "jemalloc": {
        "MALLOC_CONF": "background_thread:false,narenas:1,retain:false",
    },
}

ALLOCATORS = ("auto", _GLIBC, *_FILES)
"""What ``trainer.allocator`` may say, besides the path of a library."""


def find_allocator(wanted: str = "auto", *, folders: Iterable[Path] | None = None) -> Allocator:
    """The allocator to start the trainer under.

    Args:
        wanted: ``auto`` (the quickest there is), ``glibc`` (none is preloaded), ``mimalloc``, ``tcmalloc``,
            ``jemalloc``, or the absolute path of one of their libraries.
        folders: where to look; None: this Python's packages and the system's library folders.

    Raises:
        ConfigError: one was named and is not there, or is not for this machine.
    """
    if wanted == _GLIBC:
        return Allocator(_GLIBC, options=_glibc_options())
    if wanted.startswith("/"):
        return _named(Path(wanted))
    if wanted not in ALLOCATORS:
        raise ConfigError(
            f"trainer.allocator = {wanted!r} is not known",
            f"take one of {', '.join(ALLOCATORS)}, or the absolute path of a library",
        )
    places = list(library_folders() if folders is None else folders)
    if not _has_glibc():
        places = []  # these libraries are linked against glibc
    for name in _FILES if wanted == "auto" else (wanted,):
        for file in _FILES[name]:
            for folder in places:
                if _usable(folder / file):
                    return Allocator(name, folder / file, _OPTIONS[name])
    if wanted != "auto":
        raise ConfigError(
            f"trainer.allocator = {wanted!r}, and {_FILES[wanted][0]} is not installed for this machine",
            'set it to "auto" to start under the best there is; '
            "pip install 'edge-sdk[train]' brings mimalloc, Debian's libtcmalloc-minimal4 brings tcmalloc",
        )
    return Allocator(_GLIBC, options=_glibc_options())


def library_folders() -> list[Path]:
    """Where such libraries lie: in the prefix of wheels that hold C++ libraries, then the system's."""
    packages = [Path(entry) / "cmeel.prefix" / "lib" for entry in sys.path if entry.startswith("/")]
    triple = getattr(sys.implementation, "_multiarch", "") or f"{os.uname().machine}-linux-gnu"
    system = [f"/usr/lib/{triple}", f"/lib/{triple}", "/usr/lib64", "/usr/lib", "/usr/local/lib"]
    told = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [*packages, *(Path(folder) for folder in [*told, *system] if folder.startswith("/"))]


def _glibc_options(size: Path = _HUGE_PAGE) -> dict[str, str]:
    """Large blocks of their own are zeroed by the kernel each time: in huge pages that is a tenth quicker.

    Only in those of 2 MiB: with pages of 16 KiB they are of 32 MiB, and what is held grows in such steps.
    """
    try:
        small = int(size.read_text()) <= 1 << 21
    except (OSError, ValueError):
        small = False
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if small else {}


def _named(library: Path) -> Allocator:
    if not library.is_file():
        raise ConfigError(f"trainer.allocator: {library} is not there", 'set it to "auto", or to a library')
    if not _usable(library):
        raise ConfigError(
            f"trainer.allocator: {library} cannot be preloaded on this machine",
            "it must be a library of this processor's kind, and its path free of blanks and colons",
        )
    name = next((name for name in _FILES if name in library.name), library.name)
    return Allocator(name, library, _OPTIONS.get(name, {}))


def _usable(library: Path) -> bool:
    """Whether it is a library of the kind that this interpreter is; both headers are read."""
    if any(separator in str(library) for separator in _SEPARATORS):
        return False
    own = _kind(Path("/proc/self/exe"))
    return own is not None and _kind(library) == own


def _kind(file: Path) -> tuple[bytes, bytes] | None:
    """Word size and byte order; processor. None: no ELF file, or not readable."""
    try:
        with file.open("rb") as stream:
            header = stream.read(_ELF_HEADER)
    except OSError:
        return None
    if len(header) < _ELF_HEADER or header[:4] != b"\x7fELF":
        return None
    return header[4:6], header[18:20]


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # musl does not know the name
        return False
