"""Content-addressed files."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from edge_sdk.errors import ContainerError, ProtocolError
from edge_sdk.transport.objects import ObjectStore


def put(folder: Path, data: bytes) -> Path:
    path = folder / "fresh"
    path.write_bytes(data)
    return path


def test_adopting_moves_and_names_by_content(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "store")
    path = put(tmp_path, b"some bytes")
    digest, size = store.adopt(path)
    assert (digest, size) == (hashlib.sha256(b"some bytes").hexdigest(), 10)
    assert not path.exists()
    assert store.path(digest).read_bytes() == b"some bytes"
    assert store.has(digest)
    assert store.adopt(put(tmp_path, b"some bytes")) == (digest, 10)
    assert list(store.digests()) == [digest]
    store.remove(digest)
    store.remove(digest)
    assert not store.has(digest)


def test_another_digest_than_expected_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "store")
    path = put(tmp_path, b"some bytes")
    with pytest.raises(ContainerError, match="altered"):
        store.adopt(path, expect="a" * 64)
    assert path.exists()
    assert list(store.digests()) == []


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "/x", "a" * 64 + "\n"]
)
def test_only_digests_are_names(tmp_path: Path, name: str) -> None:
    store = ObjectStore(tmp_path)
    for call in (store.path, store.has, store.remove):
        with pytest.raises(ProtocolError):
            call(name)


def test_sweep_keeps_what_is_named_and_removes_leftovers(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "store")
    kept, _ = store.adopt(put(tmp_path, b"kept"))
    gone, _ = store.adopt(put(tmp_path, b"gone"))
    (store.folder / f"{'c' * 64}.incoming").write_bytes(b"half")
    assert store.sweep({kept}) == [gone]
    assert [p.name for p in store.folder.iterdir()] == [kept]


def test_across_file_systems_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(tmp_path / "store")
    path = put(tmp_path, b"some bytes")
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self == path:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    digest, _ = store.adopt(path)
    assert store.path(digest).read_bytes() == b"some bytes"
    assert not path.exists()
    assert [p.name for p in store.folder.iterdir()] == [digest]
