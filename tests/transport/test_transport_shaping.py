"""The token bucket."""

from __future__ import annotations

import pytest

from edge_sdk.clock import ManualClock
from edge_sdk.transport.shaping import TokenBucket


def test_the_rate_is_kept_over_time() -> None:
    clock = ManualClock()
    bucket = TokenBucket(80_000, clock, 5_000)  # 10,000 bytes a second
    sent = 0
    while clock.now < 10:
        wait = bucket.wait(1_000)
        if wait == 0:
            bucket.spend(1_000)
            sent += 1_000
        else:
            clock.advance(wait)
    assert sent == pytest.approx(10 * 10_000 + 5_000, abs=1_000)


def test_more_than_a_burst_goes_from_a_full_bucket_and_is_paid_for() -> None:
    clock = ManualClock()
    bucket = TokenBucket(8_000, clock, 100)
    assert bucket.wait(500) == 0
    bucket.spend(500)
    assert bucket.wait(100) == pytest.approx(0.5)
    assert bucket.wait(500) == pytest.approx(0.5)
    clock.advance(0.5)
    assert bucket.wait(500) == pytest.approx(0.0)


def test_without_a_rate_nothing_waits() -> None:
    bucket = TokenBucket(None, ManualClock(), 100)
    bucket.spend(1 << 30)
    assert bucket.wait(1 << 30) == 0.0


@pytest.mark.parametrize(("rate", "burst"), [(0, 100), (-1, 100), (1000, 0)])
def test_senseless_settings_are_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="not above zero"):
        TokenBucket(rate, ManualClock(), burst)
