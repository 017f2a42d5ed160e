"""A token bucket: holds what a device sends to the rate that its owner set."""

from __future__ import annotations

from edge_sdk.clock import Clock

__all__ = ["TokenBucket"]


class TokenBucket:
    """Fills at ``bits_per_second`` up to ``burst_bytes``; None: no limit.

    ``wait`` before sending keeps the rate; ``spend`` is never refused and may go into debt, so that small
    urgent records pass and bulk pays for them.
    """

    def __init__(self, bits_per_second: float | None, clock: Clock, burst_bytes: int) -> None:
        if bits_per_second is not None and bits_per_second <= 0:
            raise ValueError(f"a rate of {bits_per_second} bits per second is not above zero")
        if burst_bytes <= 0:
            raise ValueError(f"a burst of {burst_bytes} bytes is not above zero")
        self._rate = None if bits_per_second is None else bits_per_second / 8
        self._clock = clock
        self._burst = float(burst_bytes)
        self._level = self._burst
        self._at = clock.monotonic()

    def spend(self, size: int) -> None:
        """Takes ``size`` bytes out of the bucket."""
        if self._rate is not None:
            self._refill()
            self._level -= size

    def wait(self, size: int) -> float:
        """Seconds until ``size`` bytes may go; 0: now. More than a burst may go from a full bucket."""
        if self._rate is None:
            return 0.0
        self._refill()
        short = min(float(size), self._burst) - self._level
        # Less than a byte is rounding; waiting for it may be too short to move a clock at all.
        return short / self._rate if short >= 1 else 0.0

    def _refill(self) -> None:
        now = self._clock.monotonic()
        if self._rate is not None:
            self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
