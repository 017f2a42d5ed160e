"""What the control groups of a process leave it of the machine (cgroup v2 and v1), and whom they killed.

A limit may stand at any level, so all are read from the process's own group up. In a container the path in
/proc/self/cgroup may be the host's; then the mount's root is the container's group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_sdk.device.files import number_in, text_in

__all__ = ["memory_group", "memory_limits", "oom_kills", "processor_limit"]

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


def memory_group(root: Path, process: int) -> Path | None:
    """The folder that counts a process's deaths for want of memory; None: the machine counts them.

    A dead process that nobody has waited for may seem to be in the topmost group: None, too.
    """
    found = None
    for controller, counter in (("", "memory.events"), ("memory", "memory.oom_control")):
        own = next(_groups(root, controller, str(process)), None)
        if own is not None and (own / counter).is_file():
            found = own
    state = text_in(root / f"proc/{process}/stat").rpartition(")")[2].split()
    return found if state and state[0] not in "ZX" else None


def oom_kills(root: Path, group: Path | None) -> int:
    """How often the kernel killed a process of the group, or any of the machine, for want of memory."""
    counters = [group / "memory.events", group / "memory.oom_control"] if group else [root / "proc/vmstat"]
    for counter in counters:
        for line in text_in(counter).splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.isdigit():
                return int(count)
    return 0


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


def _groups(root: Path, controller: str, process: str = "self") -> Iterator[Path]:
    """The folders of a process's group and those above it; ``controller`` empty: cgroup v2."""
    for line in text_in(root / "proc" / process / "cgroup").splitlines():
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
