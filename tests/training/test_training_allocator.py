"""The allocator of a process: told truly, set up, and gone from the environment of its children."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.device.allocators import Allocator, find_allocator, library_folders
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.preload import PRELOADED

CODE = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
from edge_sdk.training.allocator import allocator_kind, allocator_word, cap_heap, settle_allocator, trim
settle_allocator()
trim()
assert "torch" not in sys.modules
print(allocator_kind(), "|", allocator_word(), "|", os.environ.get("LD_PRELOAD"), "|",
      [name for name in os.environ if name.startswith("EDGE_TRAINER")])
print("capped", cap_heap(20.0))
blocks = []
try:
    for _ in range(640):
        blocks.append(bytearray(1 << 16))
except MemoryError:
    print("held", len(blocks) >> 4)
blocks.clear()
cap_heap(None)
print("free", len(bytearray(64 << 20)) >> 20)
"""


PACKAGES = {"tcmalloc": "libtcmalloc-minimal4", "jemalloc": "libjemalloc2", "mimalloc": "libmimalloc2.0"}


def _there(name: str) -> Allocator:
    try:
        return find_allocator(name)
    except ConfigError:
        pytest.skip(f"needs Debian's {PACKAGES[name]}, installed or on LD_LIBRARY_PATH")


def _run(environment: dict[str, str]) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", PRELOADED)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["glibc", "mimalloc", "tcmalloc", "jemalloc"])
def test_the_one_in_use_is_told(name: str) -> None:
    lines = _run(_there(name).environment({}))
    told, capped = next(line for line in lines if line.startswith(f"{name} |")), name == "tcmalloc"
    kind, word, preload, ours = (piece.strip() for piece in told.split("|"))
    assert kind == name and word.startswith(name) and any(c.isdigit() for c in word)
    assert preload == "None" and ours == "[]"
    assert any(f"memory is allocated by {word}" in line for line in lines)
    assert not any(line.startswith("WARNING") for line in lines)
    assert f"capped {capped}" in lines and "free 64" in lines
    held = [int(line.split()[1]) for line in lines if line.startswith("held")]
    assert (15 <= held[0] <= 20) if capped else not held


def test_one_that_was_not_loaded_is_noticed(tmp_path: Path) -> None:
    broken = tmp_path / "libmimalloc.so.3"
    broken.write_bytes(Path("/proc/self/exe").read_bytes()[:64])
    lines = _run(Allocator("mimalloc", broken).environment({}))
    assert any(line.startswith(f"WARNING {broken} was to be preloaded and is not in use") for line in lines)
    assert any(line.startswith(("glibc |", "other |")) for line in lines)


def test_what_else_was_preloaded_stays() -> None:
    other = next(
        (folder / "libm.so.6" for folder in library_folders() if (folder / "libm.so.6").is_file()), None
    )
    if other is None:
        pytest.skip("no library to preload")
    lines = _run(_there("mimalloc").environment({"LD_PRELOAD": str(other)}))
    assert any(line.startswith("mimalloc |") and f"| {other} |" in line for line in lines)
