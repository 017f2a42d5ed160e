"""The most that config files and commands take: far above any use, and below where sums stop being finite."""

from __future__ import annotations

__all__ = ["LARGEST", "MAX_BATCH", "MAX_LABELS", "MAX_LENGTH", "MAX_RANK", "MAX_STEPS"]

LARGEST = 1_000_000_000
"""Of seconds (32 years), of 10^6 bytes, of a rate."""
MAX_LABELS = 4096
MAX_BATCH = 65_536
MAX_LENGTH = 32_768
MAX_RANK = 4096
MAX_STEPS = 1_000_000
