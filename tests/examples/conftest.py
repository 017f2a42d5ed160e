"""The rows of the docstring tasks: reading the whole standard library takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the first test that asks for the rows leaves them to the others."""
    return tmp_path_factory.mktemp("cache")
