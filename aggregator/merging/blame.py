"""Whose fault it is that a merge fails: that of some of its updates, or nobody's among them."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np

from aggregator.merging.base import Contribution, MergeRule
from aggregator.merging.streaming import Fresh, Merge, Source
from edge_sdk.errors import ContainerError, EdgeError
from edge_sdk.transport.objects import file_digest

__all__ = ["faults"]

_LARGEST = float(np.finfo(np.float16).max)


def faults(
    rule: MergeRule, before: Source, contributions: Sequence[Contribution], fresh: Fresh | None
) -> dict[int, str]:
    """Which of the contributions cannot be merged, by their place among them, and why.

    First those whose file is not what was accepted; only where all are, those that cannot be merged alone.
    It is slow, and asked only of a merge that failed. Raises where the fault is of the disk or of memory.
    """
    damaged = {i: why for i, one in enumerate(contributions) if (why := _damage(one)) is not None}
    if damaged:
        return damaged
    tried = ((i, _alone(rule, before, one, fresh)) for i, one in enumerate(contributions))
    return {i: why for i, why in tried if why is not None}


def _damage(one: Contribution) -> str | None:
    try:
        digest, _ = file_digest(one.path)
    except OSError as error:
        if error.errno == errno.EIO:
            return f"its file cannot be read: {error.strerror}"
        raise ContainerError(
            f"the stored update of {one.device}, {one.path.name[:12]}, cannot be read: {error.strerror}",
            "restore it from a backup",
        ) from error
    if one.digest in (None, digest):
        return None
    return f"its file was altered on the disk since it was accepted: its digest is {digest[:12]} now"


def _alone(rule: MergeRule, before: Source, one: Contribution, fresh: Fresh | None) -> str | None:
    try:
        for key, _, rows in Merge(rule, before, [one], fresh).parts():
            largest = float(np.abs(rows).max(initial=0.0))
            if largest > _LARGEST:
                return f"it leads to a value of {largest:.3g} in {key!r}, which no version holds"
    except Exception as error:  # whatever the rule does with it
        if isinstance(error, MemoryError) or isinstance(error.__cause__ or error, OSError):
            raise
        return error.message if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
    return None
