"""Fixtures for every room."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from aggregator.broker.embedded import EmbeddedBroker, start_embedded

# What the core alone cannot run: where an extra is not installed, its rooms' tests are not collected.
_EXTRAS = {
    "numpy": ("aggregator", "benchmarks", "examples", "faults", "merging", "methods", "planner", "updates"),
    "sqlalchemy": ("aggregator",),
    "torch": ("e2e", "training"),
}
collect_ignore = [room for extra, rooms in _EXTRAS.items() if find_spec(extra) is None for room in rooms]


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A broker on loopback, shared by all tests: use a namespace of your own."""
    with start_embedded(tmp_path_factory.mktemp("broker")) as broker:
        yield broker
