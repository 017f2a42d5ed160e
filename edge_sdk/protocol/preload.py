"""Between a host and the trainer process that it starts: the environment that names what was preloaded."""

from __future__ import annotations

__all__ = ["PRELOADED"]

PRELOADED = "EDGE_TRAINER_PRELOADED"
"""Holds the path of the allocator that the host put into LD_PRELOAD."""
