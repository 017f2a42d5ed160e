"""Fixtures for every room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aggregator.broker.embedded import EmbeddedBroker, start_embedded


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A broker on loopback, shared by all tests: use a namespace of your own."""
    with start_embedded(tmp_path_factory.mktemp("broker")) as broker:
        yield broker
