"""Where the base comes from: a hub id is fetched, waited for, and fetched on where that was cut short."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.train

from edge_sdk.errors import BaseModelError  # noqa: E402
from edge_sdk.training.base import local_base  # noqa: E402
from edge_sdk.training.failures import InterruptError  # noqa: E402


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of org/tiny in the hub's cache, as a fetch leaves it that was ended before the weights were there."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")  # set and undone here, whatever the code does
    repository = tmp_path / "models--org--tiny"
    folder = repository / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (folder / "config.json").write_text("{}")
    return folder


def hub(monkeypatch: pytest.MonkeyPatch, fetch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fetch))


@pytest.mark.parametrize("there", ["tokenizer.json", "model.safetensors"])
def test_a_fetch_that_was_cut_short_goes_on(
    there: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snapshot / there).write_bytes(b"")
    asked = []

    def fetch(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(hub_id)
        assert "*.bin" not in allow_patterns
        for name in ("tokenizer.json", "model.safetensors"):
            (snapshot / name).write_bytes(b"")
        return str(snapshot)

    hub(monkeypatch, fetch)
    assert local_base("org/tiny") == snapshot and asked == ["org/tiny"]
    assert local_base("org/tiny") == snapshot and len(asked) == 1


def test_without_a_connection_it_says_what_is_missing(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    hub(monkeypatch, fetch)
    with pytest.raises(BaseModelError, match=r"no model\.safetensors, and cannot be fetched: no route"):
        local_base("org/tiny")


def test_waiting_for_a_fetch_is_interrupted(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def fetch(*_: Any, **__: Any) -> str:
        over.wait(30.0)
        return str(snapshot)

    def check() -> None:
        raise InterruptError

    hub(monkeypatch, fetch)
    try:
        with pytest.raises(InterruptError):
            local_base("org/tiny", check)
    finally:
        over.set()
