"""Whom the kernel killed for want of memory: read as version 2, version 1 and the machine write it."""

from pathlib import Path

import pytest

from edge_sdk.device.cgroups import memory_group, oom_kills


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/7/stat", "7 (a trainer) S 1 7")
    write(tmp_path / "proc/vmstat", "nr_free_pages 5\noom_kill 9\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_version_2(root: Path) -> None:
    write(root / "proc/7/cgroup", "0::/system.slice/trainer.service\n")
    group = root / "sys/fs/cgroup/system.slice/trainer.service"
    write(group / "memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert memory_group(root, 7) == group and oom_kills(root, group) == 2


def test_version_1_beside_a_version_2_without_memory(root: Path) -> None:
    write(root / "proc/7/cgroup", "4:memory:/box\n0::/\n")
    (root / "sys/fs/cgroup/unified").mkdir(parents=True)
    group = root / "sys/fs/cgroup/memory/box"
    write(group / "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    assert memory_group(root, 7) == group and oom_kills(root, group) == 4


def test_without_memory_groups_the_machine_counts(root: Path) -> None:
    write(root / "proc/7/cgroup", "0::/user.slice\n")
    (root / "sys/fs/cgroup/user.slice").mkdir(parents=True)
    assert memory_group(root, 7) is None and oom_kills(root, None) == 9


def test_a_dead_process_is_in_no_group(root: Path) -> None:
    write(root / "proc/7/cgroup", "4:memory:/\n")
    write(root / "sys/fs/cgroup/memory/memory.oom_control", "oom_kill 0\n")
    assert memory_group(root, 7) == root / "sys/fs/cgroup/memory"
    write(root / "proc/7/stat", "7 (a trainer) Z 1 7")
    assert memory_group(root, 7) is None
    assert memory_group(root, 8) is None
