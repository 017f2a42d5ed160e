"""Nothing accepted is lost: one run in which, round by round, something is killed or cut."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from brokers import Cable
from e2e_fleet import CHUNK_KIB, WINDOW, Fleet, Spy, mqtt_section

pytestmark = [pytest.mark.e2e, pytest.mark.train]

SLOW, FAST = "slow-link", "fast-link"
ONE_WINDOW = WINDOW * CHUNK_KIB * 1024
ROUNDS = 4


@dataclass
class Told:
    """What the run of all faults left behind."""

    fleet: Fleet
    orphans: list[int]
    rounds: list[Any]
    statuses: dict[str, Any]

    def receipt(self, device: str, number: int) -> Any:
        found = [f for f in self.fleet.events(device, "update.receipt") if f["round"] == number]
        assert len(found) == 1, found
        return found[0]


@pytest.fixture(scope="module")
def told(fleets: Callable[[str], Fleet]) -> Iterator[Told]:
    fleet = fleets("faults")
    fleet.write_run(method="e2e_method:METHOD", rounds=ROUNDS, steps=20, devices=2, evaluate=False)
    fleet.start_server()
    url = fleet.broker_url()
    cable = Cable(int(url.rsplit(":", 1)[1]))
    fleet.write_agent(SLOW, mqtt_section(f"mqtt://127.0.0.1:{cable.port}"), uplink_kbps=300)
    fleet.write_agent(FAST, mqtt_section(url))
    for device in (SLOW, FAST):
        fleet.start_agent(device)

    def opened(number: int) -> None:
        fleet.wait_for("server", "round.opened", lambda f: f["round"] == number)

    # Round 1: kill -9 of an agent in the middle of its upload
    opened(1)
    spy = Spy(url)
    spy.wait_for_chunks(SLOW, 2)
    agent = fleet.children[SLOW]
    trainers = [child.pid for child in psutil.Process(agent.process.pid).children(recursive=True)]
    assert trainers
    agent.kill_alone()
    orphans = _alive_after(trainers, 10.0)
    fleet.start_agent(SLOW)

    # Round 2: kill -9 of the aggregator in the middle of an upload; its broker goes with it
    opened(2)
    before = spy.chunks[SLOW]
    spy.wait_for_chunks(SLOW, before + 2)
    spy.close()
    fleet.children["server"].kill_alone()
    fleet.start_server()

    # Round 3: the link of the device with most to send is cut after its third chunk
    opened(3)
    spy = Spy(url)
    spy.wait_for_chunks(SLOW, 3)
    cable.cut()
    time.sleep(2.0)
    cable.mend()

    # Round 4: the trainer is killed in the middle of training
    fleet.wait_for(SLOW, "training.progress", lambda f: f["round"] == 4 and f["stage"] == "training")
    for child in psutil.Process(fleet.children[SLOW].process.pid).children(recursive=True):
        os.kill(child.pid, signal.SIGKILL)

    fleet.run_out()
    spy.close()
    cable.close()
    statuses = {device: fleet.agent_status(device) for device in (SLOW, FAST)}
    yield Told(fleet, orphans, fleet.ask_server("rounds"), statuses)


def _alive_after(pids: list[int], seconds: float) -> list[int]:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not alive:
            return []
        time.sleep(0.2)
    return alive


def test_every_round_was_merged_of_both_devices(told: Told) -> None:
    merged = [one for one in told.rounds if one["number"] > 0]
    assert [one["outcome"] for one in merged] == ["merged"] * ROUNDS
    assert [one["version"] for one in merged] == [1, 2, 3, 4]
    for one in merged:
        assert {d["device"]: d["state"] for d in one["devices"]} == {SLOW: "received", FAST: "received"}


def test_no_update_counts_twice(told: Told) -> None:
    received = [(f["device"], f["round"]) for f in told.fleet.events("server", "update.received")]
    assert sorted(received) == sorted({(d, n) for d in (SLOW, FAST) for n in range(1, ROUNDS + 1)})


@pytest.mark.parametrize(
    ("number", "fault"),
    [(1, "agent killed"), (2, "aggregator killed"), (3, "link cut"), (4, "trainer killed")],
)
def test_at_most_one_window_is_sent_again(told: Told, number: int, fault: str) -> None:
    receipt = told.receipt(SLOW, number)
    assert receipt["bytes"] > 4 * CHUNK_KIB * 1024
    assert receipt["bytes_resent"] <= ONE_WINDOW, fault


def test_the_ledger_knows_what_was_sent_again(told: Told) -> None:
    resent = sum(told.receipt(SLOW, n)["bytes_resent"] for n in range(1, ROUNDS + 1))
    assert told.statuses[SLOW]["ledger"].get("bytes_resent", 0) == resent
    assert told.statuses[FAST]["ledger"].get("bytes_resent", 0) <= ONE_WINDOW


def test_a_killed_agent_leaves_no_trainer(told: Told) -> None:
    assert told.orphans == []


def test_a_killed_trainer_means_the_same_round_and_the_same_choice(told: Told) -> None:
    fleet = told.fleet
    failed = [f for f in fleet.events(SLOW, "training.failed") if f["round"] == 4]
    assert len(failed) == 1 and not failed[0]["memory"]
    choices = [f for f in fleet.events(SLOW, "round.choice") if f["round"] == 4]
    assert len({(f["candidate"], f["attempt"]) for f in choices}) == 1
    starts = [f for f in fleet.events(SLOW, "training.start") if f["round"] == 4]
    assert len(starts) == 2


def test_a_choice_is_not_made_again_after_a_crash(told: Told) -> None:
    choices = [f for f in told.fleet.events(SLOW, "round.choice") if f["round"] == 1]
    assert len(choices) == 1


def test_both_hold_the_final_version(told: Told) -> None:
    assert all(ROUNDS in status["versions"] for status in told.statuses.values())
    assert all(status["outbox"] == [] for status in told.statuses.values())
