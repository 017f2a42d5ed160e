"""An inbox with one reader: nothing is lost, and a wait has an end."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from edge_sdk.clock import next_within


def test_what_is_there_comes_at_once_and_what_comes_later_within_the_time() -> None:
    inbox: queue.SimpleQueue[int] = queue.SimpleQueue()
    inbox.put(1)
    assert next_within(inbox, 0) == 1
    threading.Timer(0.05, inbox.put, (2,)).start()
    assert next_within(inbox, 20) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seconds", [0.0, 1e-6])
def test_a_wait_that_is_over_at_once_has_an_end(seconds: float) -> None:
    """The plain get(timeout=0.0) of Python 3.10 hangs here within some ten thousand turns."""
    inbox: queue.SimpleQueue[int] = queue.SimpleQueue()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        inbox.put(1)
        assert next_within(inbox, seconds) == 1
        with pytest.raises(queue.Empty):
            next_within(inbox, seconds)
