"""What the control groups of this process leave it of the machine (cgroup v2 and v1).

A limit may stand at any level, so all are read from the process's own group up. In a container the path in
/proc/self/cgroup may be the host's; then the mount's root is the container's group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_sdk.device.files import number_in, text_in

__all__ = ["memory_limits", "processor_limit"]

_UNLIMITED = float(1 << 60)
"""cgroup v1 writes its 'no limit' as a number a little below 2^63."""


def memory_limits(root: Path) -> list[tuple[float, float]]:
    """(limit, used) in bytes for every group that sets a limit. Used: without file cache that can go."""
    found = []
    for group in _groups(root, ""):
        found += _memory(group, "memory.max", "memory.current", "inactive_file")
    for group in _groups(root, "memory"):
        found += _memory(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return found


def processor_limit(root: Path) -> float | None:
    """Processors' worth of time that the groups allow; None: no limit."""
    limits = []
    for group in _groups(root, ""):
        quota, _, period = text_in(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
    for group in _groups(root, "cpu"):
        quota_us, period_us = number_in(group / "cpu.cfs_quota_us"), number_in(group / "cpu.cfs_period_us")
        if quota_us and period_us and quota_us > 0:
            limits.append(quota_us / period_us)
    return min(limits, default=None)


def _memory(group: Path, limit_file: str, used_file: str, cache_name: str) -> list[tuple[float, float]]:
    limit, used = number_in(group / limit_file), number_in(group / used_file)
    if limit is None or used is None or limit >= _UNLIMITED:  # v2 writes "max"
        return []
    for line in text_in(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == cache_name and value.isdigit():
            used -= int(value)
    return [(limit, max(0.0, used))]


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and those above it; ``controller`` empty: cgroup v2."""
    for line in text_in(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller not in controllers.split(","):
            continue
        for mount in _mounts(root, controller):
            group = mount / path.lstrip("/")
            while group != mount:
                if group.is_dir():
                    yield group
                group = group.parent
            yield mount


def _mounts(root: Path, controller: str) -> list[Path]:
    base = root / "sys/fs/cgroup"
    if controller:
        return [base / controller]
    return [base / "unified" if (base / "unified").is_dir() else base]
