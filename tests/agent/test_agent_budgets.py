"""Memory and link, as the choice sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_fakes import FIT, World

from edge_sdk.agent.budgets import keep_rate, link_now, memory_now
from edge_sdk.agent.link import keep_link
from edge_sdk.device.capacity import GPU_SYSTEM_MB
from edge_sdk.errors import MissingExtraError
from edge_sdk.planning.work import prices
from edge_sdk.protocol.measure import Link


def world(folder: Path, **limits: float) -> World:
    one = World(folder, **limits)
    one.start()
    return one


def test_free_memory_less_what_the_trainer_will_hold(tmp_path: Path) -> None:
    one = world(tmp_path)
    one.machine.free_mb = 400
    assert memory_now(one.core.context, FIT, "cpu").budget_mb == 300


def test_a_resident_trainer_holds_its_rest_already(tmp_path: Path) -> None:
    one = world(tmp_path)
    one.machine.free_mb, one.trainer.loaded = 400, True
    assert memory_now(one.core.context, FIT, "cpu").budget_mb == 400
    one.trainer.pid, one.machine.rss_mb = 1, 150.0  # type: ignore[attr-defined]
    assert memory_now(one.core.context, FIT, "cpu").budget_mb == 450


def test_the_limit_and_the_machine_both_bind(tmp_path: Path) -> None:
    one = world(tmp_path, memory_mb=250.0)
    one.machine.free_mb = 400
    assert memory_now(one.core.context, FIT, "cpu").budget_mb == 150
    one.machine.free_mb = 180
    assert memory_now(one.core.context, FIT, "cpu").budget_mb == 80
    one.machine.free_mb = 50
    assert memory_now(one.core.context, FIT, "cpu").budget_mb == 0


def test_a_gpu_has_its_own_memory(tmp_path: Path) -> None:
    one = world(tmp_path)
    with pytest.raises(MissingExtraError, match="cuda:0"):
        memory_now(one.core.context, FIT, "cuda:0")
    one.machine.gpu_mb, one.trainer.loaded = 5000.0, True
    assert memory_now(one.core.context, FIT, "cuda:0").budget_mb == 5000
    one.trainer.loaded = False
    assert memory_now(one.core.context, FIT, "cuda:0").budget_mb == 5000 - 100 - GPU_SYSTEM_MB


def test_one_pool_is_shared_with_an_integrated_gpu(tmp_path: Path) -> None:
    one = world(tmp_path)
    one.machine.free_mb, one.machine.gpu_mb = 3000, 9000.0
    one.machine.facts["accelerators"] = ("NVIDIA tegra234 (integrated)",)
    memory = memory_now(one.core.context, FIT, "cuda:0")
    taken = GPU_SYSTEM_MB + prices().process_mb  # by a process that does not run yet
    assert (memory.free_mb, memory.budget_mb) == pytest.approx((3000, 3000 - 100 - taken), rel=1e-12)
    one.trainer.loaded, one.trainer.pid, one.machine.rss_mb = True, 1, 1500.0  # type: ignore[attr-defined]
    memory = memory_now(one.core.context, FIT, "cuda:0")
    assert memory.budget_mb == 3000, "what the process holds on the host is nothing that training may use"


def test_links_are_configured_or_measured(tmp_path: Path) -> None:
    one = world(tmp_path)
    assert link_now(one.core.context).source == "unknown"
    for rate in (1e6, 2e6):
        keep_rate(one.core.context, "up", rate)
    link = link_now(one.core.context)
    assert (link.up_bps, link.down_bps, link.source) == (1.5e6, None, "measured")
    keep_link(one.core.context.record, Link(up_bps=3e6, down_bps=4e6, rtt_ms=12.5, source="measured"), 7.0)
    assert link_now(one.core.context) == Link(up_bps=3e6, down_bps=4e6, rtt_ms=12.5, source="measured")
