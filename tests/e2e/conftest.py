"""Real processes: every test here is slow, and says so by its marker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sqlalchemy")

from e2e_fleet import METHOD, Fleet, make_base

from examples.demo.children import Children


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("small-base"))


@pytest.fixture(scope="module")
def fleets(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Fleet]]:
    """Makes fleets; ends all their processes after the module."""
    made: list[Children] = []
    patch = pytest.MonkeyPatch()

    def make(name: str) -> Fleet:
        folder = tmp_path_factory.mktemp(name)
        (folder / "e2e_method.py").write_text(METHOD)
        patch.setenv("PYTHONPATH", str(folder))
        made.append(Children(folder / "logs"))
        return Fleet(folder, small_base, made[-1])

    yield make
    for children in made:
        children.end()
    patch.undo()
