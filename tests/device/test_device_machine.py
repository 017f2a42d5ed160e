"""This machine, read from recorded trees of files and from itself."""

import os

import pytest

from edge_sdk.device.machine import free_memory_mb, process_rss_mb, read_profile, total_memory_mb

LAPTOP = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n\nprocessor\t: 1\n",
    "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n",
}
GB = 10**9


@pytest.fixture
def tree(tmp_path):
    def make(*parts):
        for files in parts:
            for name, text in files.items():
                file = tmp_path / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        return tmp_path

    return make


def test_nothing_can_be_read(tmp_path):
    profile = read_profile(tmp_path)
    assert profile.cores == 1
    unknown = {
        "machine", "system", "processor", "accelerators", "gpus", "cpu_mhz", "cpu_max_mhz", "memory_mb",
        "free_mb", "power_mode", "power_w", "temperature_c", "throttling", "battery_percent", "on_ac",
        "shared_memory",
    }  # fmt: skip
    assert profile.reasons.keys() == unknown
    assert all(profile.reasons.values())
    assert free_memory_mb(tmp_path) is None


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert read_profile(tmp_path, tmp_path / "a" / "b").disk_free_mb > 0


V2 = {
    "proc/self/cgroup": "0::/app/agent\n",
    "sys/fs/cgroup/app/memory.max": f"{4 * GB}\n",
    "sys/fs/cgroup/app/memory.current": f"{3 * GB}\n",
    "sys/fs/cgroup/app/memory.stat": f"anon 1\ninactive_file {GB}\n",
    "sys/fs/cgroup/app/agent/memory.max": "max\n",
    "sys/fs/cgroup/app/agent/memory.current": f"{GB}\n",
    "sys/fs/cgroup/app/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/app/agent/cpu.max": "max 100000\n",
}


def test_a_limit_of_a_group_above(tree):
    root = tree(LAPTOP, V2)
    assert total_memory_mb(root) == 4000
    assert free_memory_mb(root) == 2000
    assert read_profile(root).cores == 2


def test_a_limit_above_what_is_there_changes_nothing(tree):
    root = tree(LAPTOP, V2, {"sys/fs/cgroup/app/memory.max": f"{400 * GB}"})
    assert free_memory_mb(root) == pytest.approx(8192)
    assert total_memory_mb(root) == pytest.approx(16384)


def test_more_used_than_allowed_is_nothing_left(tree):
    assert free_memory_mb(tree(LAPTOP, V2, {"sys/fs/cgroup/app/memory.max": f"{GB}"})) == 0


def test_cgroup_v1_in_a_container(tree):
    root = tree(
        LAPTOP,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n1:name=systemd:/docker/a\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GB // 2}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert free_memory_mb(root) == 1500
    assert read_profile(root).cores == 1


def test_cgroup_v1_without_a_limit(tree):
    root = tree(
        LAPTOP,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
        },
    )
    assert free_memory_mb(root) == pytest.approx(8192)


def test_this_machine():
    profile = read_profile()
    assert profile.memory_mb > profile.free_mb > 0
    assert profile.cores >= 1
    assert 0 < process_rss_mb(os.getpid()) < profile.memory_mb
    assert process_rss_mb(2**22 + 1) is None
