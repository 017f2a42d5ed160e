"""A broker of one's own, with TLS and passwords: one round, and what a wrong secret gives."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from brokers import AGGREGATOR as SERVER
from brokers import DEVICES, Authority, TlsWorld, require_mosquitto
from e2e_fleet import Fleet, broker_section
from test_e2e_errors import check_error

from edge_sdk.config.broker import BrokerConfig
from examples.demo.children import AGENT

pytestmark = [pytest.mark.e2e, pytest.mark.train]
DEVICE = DEVICES[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsWorld]:
    require_mosquitto()
    folder = tmp_path_factory.mktemp("tls")
    world = TlsWorld(folder / "broker", Authority(folder / "ca"), passwords=True)
    yield world
    world.close()


@pytest.fixture(scope="module")
def fleet(fleets: Callable[[str], Fleet], world: TlsWorld) -> Fleet:
    """A run that waits for its one device."""
    fleet = fleets("tls-run")
    fleet.write_run(broker=broker_section(world.config(SERVER)))
    fleet.start_server()
    fleet.wait_for("server", "run.ready")
    return fleet


def run_agent(fleet: Fleet, broker: BrokerConfig, name: str) -> subprocess.CompletedProcess[str]:
    fleet.write_agent(DEVICE, broker_section(broker))
    path = fleet.agent_toml(DEVICE).rename(fleet.folder / f"{name}.toml")
    command = [AGENT, "run", "--once", "--config", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_wrong_password(fleet: Fleet, world: TlsWorld, tmp_path: Path) -> None:
    wrong = tmp_path / "password"
    wrong.write_text("guessed\n")
    config = msgspec.structs.replace(world.config(DEVICE), password_file=str(wrong))
    check_error(run_agent(fleet, config, "wrong-password"), 77, ("password",))


def test_a_broker_of_another_authority(fleet: Fleet, world: TlsWorld, tmp_path: Path) -> None:
    config = world.config(DEVICE)
    tls = msgspec.structs.replace(config.tls, ca=str(Authority(tmp_path / "other", "Another").ca))
    check_error(run_agent(fleet, msgspec.structs.replace(config, tls=tls), "wrong-ca"), 77, ("certificate",))


def test_one_round_over_tls(fleet: Fleet, world: TlsWorld) -> None:
    fleet.write_agent(DEVICE, broker_section(world.config(DEVICE)))
    fleet.start_agent(DEVICE)
    fleet.run_out()
    assert [one["outcome"] for one in fleet.ask_server("rounds") if one["number"]] == ["merged"]
    assert fleet.ask_server("status")["broker"]["url"].startswith("mqtts://")
    assert fleet.agent_status(DEVICE)["insecure"] is False
