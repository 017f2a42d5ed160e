"""Whether a device's work moves on: told by what is heard of it, not by a clock for every step."""

from __future__ import annotations

from edge_sdk.clock import Clock

__all__ = ["Progress"]


class Progress:
    """When each device last showed that its work moves: a choice, a chunk either way, a status at work.

    Kept in memory: after a restart everybody has just been heard, so an outage makes nobody late.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.monotonic()
        self._moved: dict[str, float] = {}

    def moved(self, device: str) -> None:
        self._moved[device] = self._clock.monotonic()

    def still_s(self, device: str) -> float:
        """Seconds since its work last moved."""
        return self._clock.monotonic() - self._moved.get(device, self._began)
