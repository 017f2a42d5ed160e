"""What Prometheus reads, over HTTP, of a run that goes on."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import pytest
from fake_device import World
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from edge_sdk.config.run import MetricsSection
from edge_sdk.errors import ConfigError


def read(url: str) -> dict[str, float]:
    """Samples by name and labels, as ``name{value,...}``."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name + (f"{{{','.join(sample.labels.values())}}}" if sample.labels else ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, min_devices=2)
    world.config = replace(world.config, metrics=MetricsSection(listen="127.0.0.1:0"))
    return world


def test_a_run_in_figures(world: World) -> None:
    server = world.open()
    url = world.last("metrics.served")["url"]
    assert read(url)["edge_broker_connected"] == 0 and read(url)["edge_devices_online"] == 0
    world.device("kitchen")
    world.device("garden", decline="no")
    world.device("cellar", alter_announce=lambda announce: replace(announce, samples=10**9))
    world.pump()
    told = read(url)
    server.close()
    assert told["edge_run_info{fedquad,demo}"] == told["edge_run_info{fedquad,demo}"] == 1
    assert told["edge_rounds_total{merged}"] == told["edge_rounds_planned"] == told["edge_round"] == 2
    assert told["edge_version"] == 2 and told["edge_version_accuracy"] > 0
    assert told["edge_updates_received_total"] == 2
    assert told["edge_updates_refused_total{samples}"] >= 2
    assert told["edge_offers_declined_total{memory}"] == 1, "it is not asked in the next round"
    assert told["edge_devices_online"] == 3 and told["edge_broker_connected"] == 1
    assert told["edge_round_seconds_count{open}"] == told["edge_training_seconds_count"] == 2
    assert told["edge_training_seconds_sum"] == 4.0
    received = told["edge_updates_received_bytes_total"]
    assert 0 < received <= told["edge_transfer_bytes_total{up}"]
    assert told["edge_transfer_bytes_total{down}"] > received
    assert told["edge_disk_free_bytes"] > 0 and told["edge_paused{storage}"] == 0


def test_who_leaves_is_not_there(world: World) -> None:
    server = world.open()
    kitchen = world.device("kitchen")
    world.pump()
    kitchen.leave()
    world.pump()
    assert read(world.last("metrics.served")["url"])["edge_devices_online"] == 0
    server.close()


def test_nobody_listens_after_the_end(world: World) -> None:
    world.open().close()
    with pytest.raises(OSError):
        read(world.last("metrics.served")["url"])


def test_a_port_in_use_is_told_in_one_line(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="nobody can listen") as refused:
            world.open(metrics=MetricsSection(listen=listen))
    assert "port that is free" in refused.value.hint


def test_by_default_nothing_listens(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.open().close()
    assert "metrics.served" not in world.names()
