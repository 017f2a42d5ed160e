"""fedavg in place of fedquad, then the same run's files damaged; an app that embeds the agent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_fleet import Fleet, Spy, mqtt_section
from test_e2e_errors import check_error

from examples.demo.children import AGGREGATOR

pytestmark = [pytest.mark.e2e, pytest.mark.train]
ROOT = Path(__file__).parents[2]
RECORD_LIMIT = 256 * 1024


@pytest.fixture(scope="module")
def fedavg(fleets: Callable[[str], Fleet]) -> tuple[Fleet, int]:
    """A finished run of fedavg with two devices, and the largest message that its broker saw."""
    fleet = fleets("fedavg")
    fleet.write_run(method="fedavg", rounds=2, devices=2)
    fleet.start_server()
    url = fleet.broker_url()
    spy = Spy(url)
    for device in ("one", "two"):
        fleet.write_agent(device, mqtt_section(url))
        fleet.start_agent(device)
    fleet.run_out()
    spy.close()
    return fleet, spy.largest


def test_fedavg_trains_everything_plain_on_every_device(fedavg: tuple[Fleet, int]) -> None:
    fleet, _ = fedavg
    for device in ("one", "two"):
        for choice in fleet.events(device, "round.choice"):
            assert (choice["depth"], choice["quantized_layers"]) == (4, 0)
        for receipt in fleet.events(device, "update.receipt"):
            assert receipt["bytes"] > 4 * 36_000 * 4  # fp32
    assert [one["outcome"] for one in fleet.ask_server("rounds") if one["number"]] == ["merged"] * 2
    assert fleet.ask_server("status")["method"] == "fedavg"


def test_no_message_is_large(fedavg: tuple[Fleet, int]) -> None:
    _, largest = fedavg
    assert 30 * 1024 < largest <= RECORD_LIMIT + 40


def test_an_altered_version_is_not_exported(fedavg: tuple[Fleet, int], tmp_path: Path) -> None:
    fleet, _ = fedavg
    newest = fleet.ask_server("versions")[-1]["object"]
    (path,) = [p for p in (fleet.folder / "server").rglob(f"*{newest}*") if p.is_file()]
    whole = path.read_bytes()
    command = [AGGREGATOR, "export", "--config", str(fleet.run_toml), "--out", str(tmp_path / "a")]
    command += ["--version", "2"]
    for damaged in (whole[:-100], whole[: len(whole) // 2] + b"\x01\x02" + whole[len(whole) // 2 + 2 :]):
        path.chmod(0o600)
        path.write_bytes(damaged)
        done = subprocess.run(command, capture_output=True, text=True)
        check_error(done, 68, ("version 2",))
        assert not (tmp_path / "a").exists()
    path.write_bytes(whole)
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_the_example_that_embeds_the_agent_runs_as_it_stands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/embed_in_app.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "run.finished" in done.stdout and "the adapter is in" in done.stdout
