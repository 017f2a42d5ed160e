"""Finding allocators to preload: by name, by place, for this machine only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.device import allocators
from edge_sdk.device.allocators import Allocator, find_allocator, library_folders
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.preload import PRELOADED

HEADER = Path("/proc/self/exe").read_bytes()[:64]
pytestmark = pytest.mark.skipif(not allocators._has_glibc(), reason="nothing is preloaded without glibc")


def _library(folder: Path, name: str, header: bytes = HEADER) -> Path:
    path = folder / name
    path.write_bytes(header)
    return path


def test_the_best_there_is_comes_first(tmp_path: Path) -> None:
    assert find_allocator(folders=[tmp_path]) == find_allocator("glibc")
    for name, kind in (
        ("libjemalloc.so.2", "jemalloc"),
        ("libtcmalloc_minimal.so.4", "tcmalloc"),
        ("libmimalloc.so.2", "mimalloc"),
        ("libmimalloc.so.3", "mimalloc"),
    ):
        path = _library(tmp_path, name)
        found = find_allocator(folders=[tmp_path])
        assert (found.name, found.library) == (kind, path) and found.options
    assert find_allocator("jemalloc", folders=[tmp_path]).name == "jemalloc"
    assert find_allocator("glibc", folders=[tmp_path]).library is None


def test_what_cannot_be_loaded_here_is_passed_over(tmp_path: Path) -> None:
    other = bytearray(HEADER)
    other[18] ^= 0xFF  # another processor
    blank = tmp_path / "a folder"
    blank.mkdir()
    _library(tmp_path, "libtcmalloc_minimal.so.4", bytes(other))
    _library(tmp_path, "libjemalloc.so.2", b"INPUT(libjemalloc.a)")
    _library(blank, "libmimalloc.so.3")
    assert find_allocator(folders=[tmp_path, blank]) == find_allocator("glibc")
    for name, place in (("libjemalloc.so.2", tmp_path), ("libmimalloc.so.3", blank)):
        with pytest.raises(ConfigError, match="cannot be preloaded"):
            find_allocator(str(place / name))


def test_one_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"libmimalloc\.so\.3 is not installed"):
        find_allocator("mimalloc", folders=[tmp_path])
    with pytest.raises(ConfigError, match="is not there"):
        find_allocator(str(tmp_path / "x.so"))
    with pytest.raises(ConfigError, match="not known"):
        find_allocator("dlmalloc")
    mine = find_allocator(str(_library(tmp_path, "libmimalloc-own.so")))
    assert mine.name == "mimalloc" and mine.options["MIMALLOC_ARENA_EAGER_COMMIT"] == "0"
    assert find_allocator(str(_library(tmp_path, "my.so"))).options == {}


def test_without_glibc_nothing_is_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _library(tmp_path, "libmimalloc.so.3")
    monkeypatch.setattr(allocators, "_has_glibc", lambda: False)
    assert find_allocator(folders=[tmp_path]) == find_allocator("glibc")


def test_the_environment_adds_to_what_is_there() -> None:
    one = Allocator("mimalloc", Path("/l/libmimalloc.so.3"), {"A": "1", "B": "2"})
    assert one.environment({"LD_PRELOAD": "/l/own.so", "A": "9"}) == {
        "LD_PRELOAD": "/l/own.so:/l/libmimalloc.so.3", PRELOADED: "/l/libmimalloc.so.3", "B": "2",
    }  # fmt: skip
    assert one.environment({})["LD_PRELOAD"] == "/l/libmimalloc.so.3"
    assert Allocator("glibc").environment({"LD_PRELOAD": "/l/own.so"}) == {}
    glibc = find_allocator("glibc")
    assert glibc.environment({"GLIBC_TUNABLES": "mine"}) == {}
    preloaded = {"LD_PRELOAD": "/l/own.so:/x/libmimalloc.so.3", "GLIBC_TUNABLES": "mine"}
    assert glibc.environment(preloaded) == {"LD_PRELOAD": "/l/own.so"}


@pytest.mark.parametrize(("size", "found"), [("2097152", True), ("33554432", False), (None, False)])
def test_only_small_huge_pages_are_asked_for(tmp_path: Path, size: str | None, found: bool) -> None:
    file = tmp_path / "hpage_pmd_size"
    if size is not None:
        file.write_text(size + "\n")
    assert bool(allocators._glibc_options(file)) == found


def test_wheels_come_before_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/site", "relative", ""])
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine:")
    folders = library_folders()
    assert folders[:2] == [Path("/site/cmeel.prefix/lib"), Path("/mine")]
    assert Path("/usr/lib") in folders and all(folder.is_absolute() for folder in folders)


def test_finding_imports_nothing_heavy() -> None:
    code = "import sys, edge_sdk.device.allocators as a; a.find_allocator(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert not {"torch", "numpy", "psutil"} & set(done.stdout.split())
