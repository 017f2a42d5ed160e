"""Gates in the agent: what is postponed, what is shrunk, and who is told. Fake clock, fake machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from agent_fakes import World, version_object

from edge_sdk.agent.inbox import GatesAltered, Pause, Resume
from edge_sdk.agent.record import AgentRecord
from edge_sdk.agent.reporting import folder_status
from edge_sdk.agent.traffic import Traffic
from edge_sdk.config.agent import GatesSection
from edge_sdk.device import machine as real_machine
from edge_sdk.errors import StateError
from edge_sdk.protocol.measure import Profile
from edge_sdk.protocol.wire import Choice, Decline, Status

Build = Callable[..., World]


@pytest.fixture
def joined(tmp_path: Path) -> Build:
    def build(**gates: object) -> World:
        world = World(tmp_path, gates=GatesSection(**gates))  # type: ignore[arg-type]
        world.clock.now = datetime(2026, 3, 2, 12, 0).timestamp()
        world.trainer.auto = False
        world.machine.facts = {"battery_percent": 80.0, "on_ac": False, "temperature_c": 50.0}
        world.start()
        world.aggregator.hello()
        world.settle()
        return world

    return build


def status(world: World) -> Status:
    last: Status = world.aggregator.got(Status)[-1]
    return last


def choices(world: World) -> list[Choice]:
    return world.aggregator.got(Choice)


def declines(world: World) -> list[tuple[str, str]]:
    return [(one.reason, one.message) for one in world.aggregator.got(Decline)]


def test_heat_interrupts_the_training_and_the_same_choice_goes_on(joined: Build) -> None:
    world = joined(max_temperature_c=80)
    world.aggregator.offer()
    world.settle()
    assert world.core.rounds.state == "training"
    world.machine.facts["temperature_c"] = 84.0
    world.settle(10)
    assert world.trainer.interrupts == 1 and world.core.rounds.state == "training"
    said = status(world)
    assert (said.permission, said.reason) == (
        "gated", "temperature: 84 °C, closed above 80, open again below 75"
    )  # fmt: skip
    live = json.loads(world.core.context.record.get("live") or "")
    assert live["permission"] == "gated" and "84 °C" in live["reason"]
    reports = len(world.aggregator.got(Status))
    for degrees in (86.0, 79.0, 76.0):
        world.machine.facts["temperature_c"] = degrees
        world.settle(10)
    assert len(world.trainer.trained) == 1 and len(world.aggregator.got(Status)) == reports
    world.machine.facts["temperature_c"] = 74.0
    world.settle(10)
    assert status(world).permission == "running" and status(world).reason == ""
    assert [one.candidate.id for one in world.trainer.trained] == ["d4", "d4"]
    world.trainer.finish()
    world.settle()
    assert "update.receipt" in world.names()
    assert {one.candidate.id for one in choices(world)} == {"d4"} and not declines(world)


def test_a_gate_that_outlasts_the_deadline_declines_for_the_gate(joined: Build) -> None:
    world = joined(min_battery_percent=50)
    world.aggregator.offer(deadline_s=100.0)
    world.settle()
    world.machine.facts["battery_percent"] = 49.0
    world.settle(105)
    why = "battery: 49 %, and 50 % are needed on battery"
    assert declines(world) == [("gate", f"closed gates until the round's deadline: {why}")]
    assert world.core.rounds.state == "idle" and world.trainer.interrupts == 1


def test_an_offer_behind_a_closed_gate_is_declined_with_its_reason(joined: Build) -> None:
    world = joined(ac_only=True)
    assert world.core.context.permission == "gated" and not world.trainer.requests  # not even the probe
    world.machine.facts["on_ac"] = True
    world.settle(10)
    assert status(world).permission == "running"
    world.machine.facts["on_ac"] = False
    world.settle(10)
    world.aggregator.offer()
    world.settle()
    assert declines(world) == [("gate", "closed gates: supply: on battery")]


def test_quiet_hours_begin_and_end_by_the_devices_clock(joined: Build) -> None:
    world = joined(quiet_hours=("12:01-12:03", "22:00-06:00"))
    world.aggregator.offer(deadline_s=1000.0)
    world.settle(50)
    assert world.trainer.interrupts == 0
    world.settle(20)
    assert world.trainer.interrupts == 1 and status(world).reason.startswith("quiet hours: 12:01-12:03")
    world.settle(120)
    assert status(world).permission == "running" and len(world.trainer.trained) == 2


def test_another_gate_that_closes_is_told_too(joined: Build) -> None:
    world = joined(ac_only=True, max_temperature_c=80)
    world.machine.facts["on_ac"] = True
    world.settle(10)
    for facts, told in (
        ({"on_ac": False}, "supply: on battery"),
        ({"temperature_c": 90.0}, "supply: on battery; temperature: 90 °C"),
        ({"on_ac": True}, "temperature: 90 °C"),
    ):
        world.machine.facts.update(facts)
        world.settle(10)
        assert status(world).reason.startswith(told)


def test_on_battery_a_shorter_training_is_chosen(joined: Build) -> None:
    """Five steps of depth 4, 2, 1 take 0.45, 0.35 and 0.3 s by the fit."""
    world = joined(battery_training_s=0.4)
    world.aggregator.offer()
    world.settle()
    (choice,) = choices(world)
    assert (choice.candidate.id, choice.binding) == ("d2", "energy") and "on battery" in choice.reason
    world.trainer.finish()
    world.machine.facts["on_ac"] = True
    world.aggregator.offer(round=2)
    world.settle()
    assert choices(world)[-1].candidate.id == "d4"


def test_an_apps_gate_is_asked_and_one_that_raises_is_closed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.trainer.auto = False
    typing = [False]

    def idle() -> bool:
        if typing[0] is None:
            raise ZeroDivisionError("nobody there")
        return not typing[0]

    own: dict[str, Callable[[], object]] = {"user": idle}
    world.start(gates=own)
    world.aggregator.hello()
    world.settle()
    world.aggregator.offer()
    world.settle()
    typing[0] = True
    world.settle(10)
    assert (status(world).permission, status(world).reason) == ("gated", "user: closed by the app")
    typing[0] = None  # type: ignore[call-overload]
    world.settle(30)
    problems = [event.fields["message"] for event in world.events if event.name == "problem"]
    assert problems == ["gate user: its check failed: ZeroDivisionError: nobody there"]
    assert world.core.context.permission == "gated"
    del own["user"]
    world.core.inbox.put(GatesAltered())
    world.settle()
    assert world.core.context.permission == "running" and len(world.trainer.trained) == 2


def test_a_gate_without_its_sensor_is_told_once_and_passes(joined: Build) -> None:
    world = joined(ac_only=False, max_temperature_c=80)
    world.machine.facts["temperature_c"] = None
    world.settle(30)
    assert [event.fields["message"] for event in world.events if event.name == "problem"] == [
        "gates.max_temperature_c has no effect: not read"
    ]
    assert world.core.context.permission == "running"


def test_a_paused_agent_that_resumes_behind_a_gate_waits_for_it(joined: Build) -> None:
    world = joined(max_temperature_c=80)
    world.core.inbox.put(Pause())
    world.settle()
    world.machine.facts["temperature_c"] = 90.0
    world.settle(10)
    assert world.core.context.permission == "paused"
    world.core.inbox.put(Resume())
    world.settle()
    assert status(world).permission == "gated"


def test_a_restart_looks_at_the_gates_before_it_trains(joined: Build) -> None:
    world = joined(max_temperature_c=80)
    world.aggregator.offer()
    world.settle()
    world.machine.facts["temperature_c"] = 90.0
    world.kill()
    world.start()
    world.settle()
    assert world.core.rounds.state == "training" and not world.trainer.trained


# -- traffic -----------------------------------------------------------------------------------------------


def test_what_is_left_of_the_days_traffic_shrinks_the_choice(joined: Build) -> None:
    """The updates of depth 4, 2, 1 take about 5.2, 3.8 and 3.1 kB, the version 5 kB."""
    world = joined(traffic_mb_per_day=0.024)
    spent = world.core.context.traffic.used
    world.core.context.traffic.count("run-1", bytes_up=14_500 - spent)
    world.aggregator.offer()
    world.settle()
    sizes = {}
    for choice in choices(world):
        sizes[choice.candidate.id] = choice.candidate.bytes_up + choice.candidate.bytes_down
    (taken,) = sizes
    assert taken != "d4" and choices(world)[0].binding == "traffic"
    assert "left for today" in choices(world)[0].reason


def test_an_offer_beyond_the_days_traffic_is_declined_as_a_gate(joined: Build) -> None:
    world = joined(traffic_mb_per_day=0.02)
    world.core.context.traffic.count("run-1", bytes_down=15_000)
    world.aggregator.offer()
    world.settle()
    ((reason, message),) = declines(world)
    assert reason == "gate" and "MB are left for today" in message
    assert folder_status(world.config, world.clock)["traffic_today"] > 15_000


def test_an_update_waits_until_tomorrow_also_over_a_restart(joined: Build) -> None:
    world = joined(traffic_mb_per_day=1.0)
    world.aggregator.offer(deadline_s=200_000.0)
    world.settle()
    world.core.context.traffic.count("run-1", bytes_up=1_000_000)
    world.trainer.finish()
    world.settle(5)
    (item,) = world.core.uploads.items
    assert item.bytes_sent == 0
    (spent,) = [event for event in world.events if event.name == "traffic.spent"]
    assert datetime.fromtimestamp(spent.fields["until"]) == datetime(2026, 3, 3)
    world.kill()
    world.start()
    world.settle(5)
    assert world.core.uploads.items[0].bytes_sent == 0
    world.clock.now = datetime(2026, 3, 2, 23, 59, 50).timestamp()
    world.settle(5)
    assert world.core.uploads.items[0].bytes_sent == 0
    world.settle(15)
    assert "update.receipt" in world.names() and not world.core.uploads.items
    assert 9600 < world.core.context.traffic.used < 100_000


def test_a_final_version_is_fetched_when_there_is_room_again(joined: Build) -> None:
    world = joined(traffic_mb_per_day=0.02)
    world.core.context.traffic.count("run-1", bytes_down=18_000)
    ref, data = version_object(3)
    world.aggregator.objects[ref.object] = data
    world.aggregator.state(finished=True, version=ref)
    world.settle(5)
    assert "run.finished" not in world.names() and "traffic.spent" in world.names()
    world.clock.now = datetime(2026, 3, 3, 0, 1).timestamp()
    world.settle(70)
    assert "run.finished" in world.names()


def test_a_month_of_days_is_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start()
    traffic = world.core.context.traffic
    for _ in range(40):
        traffic.count("run-1", bytes_up=10)
        world.clock.advance(86_400)
    traffic.count("run-1", bytes_up=7)
    assert traffic.used == 7
    record = world.core.context.record
    days = record._db.execute("SELECT count(DISTINCT run) FROM ledger WHERE run LIKE 'day %'").fetchone()
    assert days == (31,) and record.ledger("run-1")["bytes_up"] >= 407


def test_a_state_folder_that_may_not_be_looked_into(joined: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = joined().config

    def refused(_self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(StateError, match="cannot be used: Permission denied"):
        folder_status(config)


class AClock:
    """Both ways to tell the time, apart."""

    def __init__(self) -> None:
        self.since_boot, self.told = 0.0, 0.0

    def monotonic(self) -> float:
        return self.since_boot

    def wall(self) -> float:
        return self.told

    def at(self, day: str, since_boot: float) -> None:
        self.told, self.since_boot = datetime.fromisoformat(day).timestamp(), since_boot


def test_a_clock_that_is_not_set_or_put_back_opens_no_new_allowance(tmp_path: Path) -> None:
    record, clock = AgentRecord(tmp_path / "agent.db"), AClock()
    traffic = Traffic(record, clock, 1.0)
    clock.at("1970-01-01 00:01", 60)
    traffic.count("run-1", bytes_up=300_000)
    clock.at("2026-03-02 23:50", 120)
    assert traffic.used == 300_000, "it was today all the while"
    traffic.count("run-1", bytes_down=600_000)
    assert (traffic.used, traffic.left) == (900_000, 100_000)
    for day in ("2026-03-01 12:00", "1970-01-01 00:00"):  # put back; and booted without a battery
        traffic = Traffic(record, clock, 1.0)
        clock.at(day, 180)
        assert traffic.used == 900_000
        traffic.count("run-1", bytes_up=50_000)
        clock.at("2026-03-02 23:59", 240)
        assert traffic.used == 950_000
        record.count("day 2026-03-02", bytes_up=-50_000)
    clock.at("2026-03-03 00:01", 300)
    assert (traffic.used, traffic.left) == (0, 1_000_000)
    clock.at("1970-01-01 00:00", 310)
    traffic.count("run-1", bytes_up=70_000)
    clock.at("2026-03-04 00:01", 400)
    assert traffic.used == 70_000, "counted before it was known which day it is"


def test_a_clock_that_was_ahead_once_holds_the_allowance_for_a_day_at_most(tmp_path: Path) -> None:
    record, clock = AgentRecord(tmp_path / "agent.db"), AClock()
    traffic = Traffic(record, clock, 1.0)
    clock.at("2099-01-01 10:00", 60)
    traffic.count("run-1", bytes_up=1_000_000)
    clock.at("2026-03-02 12:00", 120)
    assert (traffic.left, traffic.tomorrow_s) == (0, 86_400)
    clock.at("2026-03-03 11:59", 86_460)
    assert traffic.left == 0
    clock.at("2026-03-03 12:00", 86_520)
    assert traffic.left == 1_000_000
    traffic.count("run-1", bytes_up=1)
    assert record.newest_day() == "day 2026-03-03" and traffic.used == 1


def test_a_device_that_restarts_all_the_time_is_not_held_by_a_wrong_day_for_ever(tmp_path: Path) -> None:
    record, clock = AgentRecord(tmp_path / "agent.db"), AClock()
    clock.at("2030-01-01 10:00", 60)
    Traffic(record, clock, 1.0).count("run-1", bytes_up=1_000_000)
    for day in ("2026-03-02 23:58", "1970-01-01 00:00", "2026-03-02 23:59", "2026-03-03 00:01"):
        traffic = Traffic(record, clock, 1.0)
        clock.at(day, 60)
        assert traffic.left == 0
        traffic.count("run-1", bytes_up=10)
    clock.at("2026-03-03 23:00", 120)
    assert traffic.tomorrow_s == 3600
    clock.at("2026-03-04 00:00", 60)
    assert Traffic(AgentRecord(record.path, read_only=True), clock, 1.0).left == 1_000_000
    assert Traffic(record, clock, 1.0).left == 1_000_000
    assert record.newest_day() == "" and record.get("traffic.doubt") is None


def test_what_was_counted_before_the_day_was_known_outlives_a_restart(tmp_path: Path) -> None:
    record, clock = AgentRecord(tmp_path / "agent.db"), AClock()
    for day in ("2026-03-04 12:00", "2026-03-04 12:01"):
        clock.at("1970-01-01 00:00", 10)
        Traffic(record, clock, 1.0).count("run-1", bytes_up=30_000)
        Traffic(record, clock, 1.0).count("run-1", bytes_down=5_000)
        clock.at(day, 20)
        traffic = Traffic(record, clock, 1.0)
        assert traffic.used == 35_000 * (1 + (day > "2026-03-04 12:00")), "of that day, and once"
    clock.at("1970-01-01 00:00", 10)
    Traffic(record, clock, 1.0).count("run-1", bytes_up=7)
    clock.at("2026-03-05 12:00", 20)
    assert Traffic(record, clock, 1.0).used == 7


# -- real files --------------------------------------------------------------------------------------------


def test_battery_and_heat_from_files_as_the_kernel_writes_them(joined: Build, tmp_path: Path) -> None:
    files = {
        "sys/class/power_supply/BAT0/type": "Battery\n",
        "sys/class/power_supply/BAT0/capacity": "64\n",
        "sys/class/power_supply/AC/type": "Mains\n",
        "sys/class/power_supply/AC/online": "0\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48500\n",
    }
    root = tmp_path / "root"

    def write(name: str, text: str) -> None:
        file = root / "sys/class" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    for name, text in files.items():
        write(name.removeprefix("sys/class/"), text)
    world = joined(min_battery_percent=30, max_temperature_c=80)

    def read_profile(*, disk: Path | None = None, gpus: bool = False) -> Profile:
        return real_machine.read_profile(root=root, disk=disk, gpus=gpus)

    world.machine.read_profile = read_profile  # type: ignore[method-assign]
    world.aggregator.offer(deadline_s=1000.0)
    world.settle(10)
    assert world.core.context.permission == "running"
    write("thermal/thermal_zone0/temp", "91000\n")
    world.settle(10)
    assert status(world).reason.startswith("temperature: 91 °C")
    write("power_supply/BAT0/capacity", "12\n")
    write("thermal/thermal_zone0/temp", "60000\n")
    world.settle(10)
    assert status(world).reason == "battery: 12 %, and 30 % are needed on battery"
    write("power_supply/AC/online", "1\n")
    world.settle(10)
    assert status(world).permission == "running" and len(world.trainer.trained) == 2
