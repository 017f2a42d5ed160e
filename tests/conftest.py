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


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "only tests that may run side by side, or only the others"
    parser.addoption("--stage", choices=("beside", "alone"), help=told)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves one stage's tests; without ``--stage`` all stay. End to end is always alone."""
    stage = config.getoption("--stage")
    if stage is None:
        return
    kept, left_out = [], []
    for item in items:
        alone = any(item.get_closest_marker(name) for name in ("alone", "e2e"))
        (kept if alone == (stage == "alone") else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A broker on loopback, shared by all tests: use a namespace of your own."""
    with start_embedded(tmp_path_factory.mktemp("broker")) as broker:
        yield broker
