"""A run over the in-memory broker, from the first start to the end, and through a crash in every state."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import World, a_fit
from msgspec.structs import replace

from aggregator.evaluation import Evaluator
from aggregator.participations import Participations
from aggregator.rounds import Rounds
from aggregator.running import Running
from aggregator.state.base import RoundRow, Store
from edge_sdk.config.run import RunBaseSection, StorageSection
from edge_sdk.errors import BaseModelError, BrokerError, ConfigError, CredentialsError, StateError
from edge_sdk.protocol.trainer import Describe, Evaluate, Progress
from edge_sdk.protocol.wire import Choice, RoundPosition
from edge_sdk.transport.base import Connection
from edge_sdk.updates.versions import read_adapter


@pytest.fixture
def world(tmp_path: Path) -> World:
    return with_all_versions(World(tmp_path))


def with_all_versions(world: World) -> World:
    """Also those that nobody needs any more: these tests look at what each round made."""
    world.config = replace(world.config, storage=StorageSection(keep_versions=True))
    return world


def rounds_of(world: World) -> Rounds:
    assert world.server is not None and world.server._running is not None
    return world.server._running.rounds


def store_of(world: World) -> Store:
    assert world.server is not None
    return world.server._store


def values(world: World, number: int) -> Any:
    assert world.server is not None
    chain = rounds_of(world).chain(number)
    return read_adapter([world.server._objects.path(version.object) for version in chain])


def test_a_run_of_two_rounds(world: World) -> None:
    server = world.open()
    device = world.device()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]
    assert world.names().count("version.evaluated") == 3
    assert server.done and server.error is None, "the device told that it holds the final version"
    assert device.holds == {0, 1, 2}

    before, after = values(world, 0), values(world, 1)
    for key in before:
        np.testing.assert_allclose(after[key], before[key] + 0.01, atol=2e-3)

    update = store_of(world).participation("demo", 1, "one")
    assert update is not None and update.bytes is not None

    server.close()
    ledger = store_of(world).ledger("demo")[0]
    assert ledger.bytes_up >= 2 * update.bytes and ledger.duplicate_bytes == 0
    assert ledger.bytes_down == sum(version.bytes for version in store_of(world).versions("demo"))
    assert set(server._objects.digests()) == {version.object for version in store_of(world).versions("demo")}


@pytest.mark.parametrize("seconds", [1.0, 10.0])
def test_what_a_round_costs(world: World, seconds: float) -> None:
    """Overhead is what is left of a round without training, shaped upload and evaluation."""
    world.open(auto=False, rounds=replace(world.config.rounds, total=1))
    world.trainer.finish()
    world.pump()
    world.trainer.finish()
    device = world.device(limits={"uplink_kbps": 8.0}, frames_left=1)
    world.pump()
    world.pass_time(seconds)
    device.frames_left = None
    world.pass_time(5)
    world.trainer.finish()
    world.pump()
    row = store_of(world).rounds("demo")[1]
    update = store_of(world).participation("demo", 1, "one")
    assert update is not None and update.bytes is not None
    assert update.upload_s == pytest.approx(seconds, abs=1.1)
    shaped = min(8 * update.bytes / 8000, update.upload_s)
    assert (row.slowest_train_s, row.evaluation_s) == (2.0, 0.5)
    assert row.shaped_upload_s == pytest.approx(shaped)
    assert row.critical_s == pytest.approx(2.0 + shaped)
    wall = row.open_s + row.merge_s + row.evaluating_s
    assert row.overhead_s == pytest.approx(max(0.0, wall - 2.0 - shaped - 0.5))


def test_same_run_again_only_lingers(world: World) -> None:
    world.open().tick()
    world.device()
    world.pump()
    assert world.server is not None
    world.server.close()
    server = world.open()
    world.pump()
    assert server.done and store_of(world).last_round("demo").number == 2  # type: ignore[union-attr]
    server.close()


def test_a_finished_run_waits_for_nobody_who_has_its_last_version(world: World) -> None:
    server = world.open()
    device = world.device()
    world.pump()
    server.close()
    device.leave()
    again = world.open()
    again.tick()
    assert again.done and world.last("run.over")["lacking"] == []
    again.close()


def test_more_rounds_go_on(world: World) -> None:
    server = world.open()
    device = world.device()
    world.pump()
    server.close()
    server = world.open(rounds=replace(world.config.rounds, total=3))
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2, 3]
    server.close()


def test_waits_for_min_devices(tmp_path: Path) -> None:
    world = with_all_versions(World(tmp_path, min_devices=2))
    world.open()
    first = world.device("one")
    world.pump()
    assert rounds_of(world).row.state == "waiting"
    assert world.last("round.waiting") == {"round": 1, "ready": 1, "needed": 2}
    second = world.device("two", samples=300, change=0.03)
    world.pump()
    assert [receipt.round for receipt in first.receipts] == [1, 2]
    assert [receipt.round for receipt in second.receipts] == [1, 2]
    before, after = values(world, 0), values(world, 1)
    for key in before:
        np.testing.assert_allclose(after[key], before[key] + (0.01 + 3 * 0.03) / 4, atol=2e-3)


def test_a_device_without_a_fit_is_not_ready(world: World) -> None:
    world.open()
    world.device(fit=None)
    world.pump()
    assert rounds_of(world).row.state == "waiting"


def test_who_joins_in_the_middle_waits_for_the_next_round(world: World) -> None:
    world.open()
    first = world.device("one", until="announce")
    world.pump()
    second = world.device("two")
    world.pump()
    assert rounds_of(world).row.state == "open" and second.offer is None
    first.until = "receipt"
    first.send_announce()
    world.pump()
    assert [receipt.round for receipt in second.receipts] == [2]


def test_deadline_closes_without_the_late_one_and_its_update_is_owed(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, min_devices=2, deadline_s=100.0, late="refuse"))
    slow = world.device("slow", until="announce")
    world.device("fast")
    world.pump()
    late = slow.announce
    assert late is not None
    world.pass_time(99)
    assert rounds_of(world).row.state == "open" and rounds_of(world).row.number == 1
    world.pass_time(2)
    assert rounds_of(world).row.number == 2
    assert world.last("round.closed")["missed"] == ["slow"]
    for _ in range(2):  # decided once, told as often as asked
        slow.say(late)
        world.pump()
    assert [refusal.reason for refusal in slow.refusals] == ["round", "round"]


def test_offline_is_not_the_end_of_a_participation(world: World) -> None:
    world.open()
    device = world.device(until="announce")
    world.pump()
    device.leave()
    world.pass_time(30)
    assert rounds_of(world).row.state == "open"
    device.until = "receipt"
    device.come_back()
    world.pump()
    assert 1 in [receipt.round for receipt in device.receipts]


def test_declines_close_the_round_and_the_version_stays(world: World) -> None:
    world.open()
    device = world.device(decline="no")
    world.pump()
    assert world.last("round.empty") == {"round": 1, "version": 0}
    assert rounds_of(world).row.number == 2 and rounds_of(world).row.state == "waiting"
    world.pass_time(4)
    assert rounds_of(world).row.state == "waiting", "rounds in which nobody delivers do not chase one another"
    device.decline = None
    world.pass_time(2)
    assert [receipt.round for receipt in device.receipts] == [2]
    row = store_of(world).rounds("demo")[1]
    assert (row.outcome, row.version, row.overhead_s) == ("empty", 0, None)


def test_evaluation_that_fails_ends_nothing(world: World) -> None:
    world.open(auto=False)
    world.trainer.finish()  # describe
    world.pump()
    world.trainer.die()
    world.pump()
    assert isinstance(world.trainer.pending, Evaluate), "a dead trainer is started once more"
    world.trainer.fail("out of luck")
    world.trainer.auto = True
    device = world.device()
    world.pump()
    version = store_of(world).version("demo", 0)
    assert version is not None and version.evaluation_error == "out of luck" and version.accuracy is None
    assert [receipt.round for receipt in device.receipts] == [1, 2]


def test_an_evaluation_that_hangs_ends_nothing(world: World) -> None:
    world.open(auto=False)
    world.trainer.finish()  # describe
    world.pump()
    hanging = world.trainer.pending
    assert isinstance(hanging, Evaluate)
    world.pass_time(500, step=100)
    world.server._inbox.put(Progress(id=hanging.id, stage="evaluating", done=1, total=9))  # type: ignore[union-attr]
    world.pass_time(500, step=100)
    assert rounds_of(world).row.state == "evaluating" and not world.trainer.unloaded
    world.pass_time(200, step=100)
    version = store_of(world).version("demo", 0)
    assert version is not None and version.evaluation_error is not None
    assert "for 600 s" in version.evaluation_error and world.trainer.unloaded
    world.trainer.auto = True
    device = world.device()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]


def test_who_gets_no_offer_is_told_once(world: World) -> None:
    world.open()
    world.device(fit=a_fit(max_length=64))
    world.pump()
    world.pass_time(60)
    assert world.names().count("offer.none") == 1


def test_layers_that_a_fixed_deadline_leaves_untrained_are_told_once(tmp_path: Path) -> None:
    world = World(tmp_path, deadline_s=60.0)
    world.open()
    device = world.device(fit=a_fit(layer_s=10.0))
    world.pump()
    assert len(device.receipts) == 2 and world.names().count("round.uncovered") == 1
    assert world.last("round.uncovered")["message"].startswith("rounds.deadline_s is 60: ")


def test_the_rest_after_empty_rounds_has_an_end(world: World) -> None:
    world.open()
    world.pump()
    rounds = rounds_of(world)
    with store_of(world).transaction():
        for number in range(2, 1500):
            store_of(world).add_round(RoundRow("demo", number, "closed", outcome="empty"))
    assert rounds._rest_s() == 300.0


def test_a_base_that_cannot_be_described_is_an_error(world: World) -> None:
    server = world.open(auto=False)
    world.trainer.fail("no such model")
    world.pump()
    assert server.done and server.error is not None and "no such model" in str(server.error)


def test_a_hub_id_that_is_not_on_this_disk_is_fetched_by_the_trainer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(world.folder / "empty"))
    folder = world.config.base.path
    server = world.open(auto=False, base=RunBaseSection(path="someone/a-model"))
    assert isinstance(world.trainer.pending, Describe)
    assert world.trainer.pending.setup.base == "someone/a-model"
    world.trainer.fetched = folder
    world.trainer.auto = True
    world.trainer.finish()
    device = world.device()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]
    row = store_of(world).run("demo")
    assert row is not None and row.base_folder == folder
    server.close()
    with pytest.raises(BaseModelError):
        World(world.folder / "other").open(base=RunBaseSection(path=str(world.folder / "nowhere")))


@pytest.mark.parametrize("there", ["tokenizer.json", "model.safetensors"])
def test_a_hub_id_whose_fetch_was_cut_short_is_fetched_on_by_the_trainer(
    world: World, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(world.folder / "hub"))
    snapshot = world.folder / "hub" / "models--someone--a-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    whole = Path(world.config.base.path)
    for name in ("config.json", there):
        (snapshot / name).write_bytes((whole / name).read_bytes())
    server = world.open(auto=False, base=RunBaseSection(path="someone/a-model"))
    assert isinstance(world.trainer.pending, Describe)
    assert world.trainer.pending.setup.base == "someone/a-model"
    shutil.copytree(whole, snapshot, dirs_exist_ok=True)
    world.trainer.fetched = str(snapshot)
    world.trainer.finish()
    world.pump()
    row = store_of(world).run("demo")
    assert row is not None and row.base_folder == str(snapshot) and server.error is None
    server.close()


def test_other_mathematics_are_refused_by_name(world: World) -> None:
    world.open().close()
    world.open()
    world.pump()
    world.kill()
    with pytest.raises(StateError, match=r"lora\.rank was 2 and is 4.*training\.steps was 5 and is 6"):
        world.open(lora=replace(world.config.lora, rank=4), training=replace(world.config.training, steps=6))


def test_the_folder_has_one_server(world: World) -> None:
    server = world.open()
    with pytest.raises(StateError, match="in use"):
        World(world.folder).open()
    server.close()


def test_an_agents_folder_is_left_alone(world: World) -> None:
    folder = world.folder / "state"
    (folder / "objects").mkdir(parents=True)
    for name in ("agent.db", "objects/update"):
        (folder / name).write_text("what it learnt")
    with pytest.raises(ConfigError, match=r"run\.state_dir.*of an agent"):
        world.open()
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert found == ["agent.db", "objects", "objects/update"]


def test_a_run_under_the_former_default_is_not_begun_anew(world: World) -> None:
    world.open().close()
    renamed = replace(world.config.run, state_dir=str(world.folder / "server-state"))
    with pytest.raises(ConfigError, match=str(world.folder / "state")) as told:
        world.open(run=renamed)
    assert 'state_dir = "state"' in told.value.hint and not (world.folder / "server-state").exists()
    shutil.rmtree(world.folder / "state")
    world.open(run=renamed).close()


def test_a_state_folder_that_cannot_be_made(world: World) -> None:
    (world.folder / "file").write_text("")
    (world.folder / "odd").mkdir()
    (world.folder / "odd" / "objects").write_text("")
    for name in ("file", "file/state", "odd"):
        with pytest.raises(StateError, match=r"file|objects"):
            world.open(run=replace(world.config.run, state_dir=str(world.folder / name)))


def test_the_state_folder_is_its_users_alone(world: World) -> None:
    world.open().close()
    assert (world.folder / "state").stat().st_mode & 0o777 == 0o700


def test_time_to_read_the_base_is_not_the_brokers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.broker.stop()
    original = Evaluator.describe

    def slowly(*args: Any) -> None:
        world.clock.advance(1000)
        original(*args)

    monkeypatch.setattr(Evaluator, "describe", slowly)
    server = world.open()
    world.pump()
    assert not server.done
    world.pass_time(31)
    assert isinstance(server.error, BrokerError)


def test_a_refused_password_ends_only_who_was_never_connected(world: World) -> None:
    refused = Connection(up=False, error=CredentialsError("no such account"), final=True)
    server = world.open()
    world.pump()
    server.handle(refused)
    assert not server.done and "no such account" in world.last("broker.down")["error"]
    server.close()
    world.broker.stop()
    server = world.open()
    server.handle(refused)
    assert server.done and isinstance(server.error, CredentialsError)


def test_a_missing_object_stops_the_server(world: World) -> None:
    server = world.open()
    world.pump()
    version = store_of(world).version("demo", 0)
    assert version is not None
    server.close()
    server._objects.remove(version.object)
    with pytest.raises(StateError, match="missing"):
        world.open()


# Crashes


def test_killed_before_the_run_is_made(world: World) -> None:
    world.open(auto=False)
    assert isinstance(world.trainer.pending, Describe)
    world.kill()
    world.open()
    device = world.device()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]


def test_killed_while_waiting(world: World) -> None:
    world.open()
    world.pump()
    assert rounds_of(world).row.state == "waiting"
    world.kill()
    world.open()
    device = world.device()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]
    assert isinstance(world.trainer.requests[0], Evaluate), "not described again"


@pytest.mark.parametrize("until", ["offer", "choice", "announce"])
def test_killed_while_open(world: World, until: str) -> None:
    world.open(rounds=replace(world.config.rounds, deadline_s=100.0))
    device = world.device(until=until)
    world.pump()
    world.pass_time(40)
    world.kill()
    world.pass_time(500)
    world.open()
    device.until = "receipt"
    if until != "announce":
        device.offer = None
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2], "the outage did not count"


def test_the_deadline_counts_up_time_only(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, deadline_s=100.0))
    device = world.device(until="choice")
    world.pump()
    world.pass_time(40)
    world.kill()
    world.clock.advance(1000)
    world.open()
    world.pump()
    assert rounds_of(world).row.open_s == pytest.approx(40, abs=2.5)
    assert device.offer is not None and device.offer.deadline_s == pytest.approx(60, abs=2.5)
    world.pass_time(58)
    assert rounds_of(world).row.number == 1 and rounds_of(world).row.state == "open"
    world.pass_time(5)
    assert world.last("round.empty")["round"] == 1


def test_killed_in_the_middle_of_an_upload(world: World) -> None:
    world.open()
    device = world.device(frames_left=2)
    world.pump()
    size = device.announce.bytes if device.announce else 0
    assert size > 2048
    world.kill()
    device.frames_left = None
    world.open(rounds=replace(world.config.rounds, total=1))
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1]
    sent = device.receipts[0].duplicate_bytes
    assert sent <= 2 * 1024, "no more than a window again"


def crash_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def crash(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, crash)


@pytest.mark.parametrize("where", ["before the row", "before the merge", "after the blob", "evaluating"])
def test_killed_around_the_merge(world: World, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world.open(auto=where != "evaluating", rounds=replace(world.config.rounds, total=1))
    if where == "evaluating":
        world.trainer.finish()
        world.pump()
        world.trainer.finish()
    world.pump()
    device = world.device()
    with monkeypatch.context() as patch:
        if where == "before the row":
            crash_in(patch, Participations, "on_received")
        elif where == "before the merge":
            crash_in(patch, Running, "merged_version")
        elif where == "after the blob":
            crash_in(patch, type(store_of(world)), "add_version")
        if where == "evaluating":
            world.pump()
            assert rounds_of(world).row.state == "evaluating"
        else:
            with pytest.raises(KeyboardInterrupt):
                world.pump()
    world.kill()
    server = world.open()
    world.pump()
    assert server.done and server.error is None
    assert [receipt.round for receipt in device.receipts][-1] == 1
    assert {receipt.object for receipt in device.receipts} == {device.receipts[0].object}
    before, after = values(world, 0), values(world, 1)
    for key in before:
        np.testing.assert_allclose(after[key], before[key] + 0.01, atol=2e-3)
    assert len(store_of(world).versions("demo")) == 2
    assert store_of(world).version("demo", 1).accuracy is not None  # type: ignore[union-attr]
    ledger = store_of(world).ledger("demo")
    assert all(row.duplicate_bytes == 0 for row in ledger)


def test_a_merge_done_twice_gives_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.open()
    world.pump()
    world.device()
    made = []
    original = Running.merged_version

    def twice(self: Any, *args: Any) -> Any:
        made.append(original(self, *args))
        made.append(original(self, *args))
        return made[-1]

    monkeypatch.setattr(Running, "merged_version", twice)
    world.pump()
    assert made[0] == made[1] and made[2] == made[3] and made[0] != made[2]


def test_broker_restart_and_lost_link(world: World) -> None:
    world.open()
    device = world.device(frames_left=2)
    world.pump()
    world.broker.stop()
    world.pump()
    device.frames_left = None
    world.broker.start()
    world.pump()
    assert [receipt.round for receipt in device.receipts] == [1, 2]


def test_who_left_during_an_outage_is_not_there_after_it(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, min_devices=3))
    stays, goes = world.device("stays"), world.device("goes")
    world.pump()
    world.broker.stop()
    world.pump()
    fleet = world.server._running.fleet  # type: ignore[union-attr]
    assert not fleet["stays"].online and not fleet["goes"].online
    goes.transport.stop()
    world.devices.remove(goes)
    world.broker.start()
    world.pump()
    assert [member.device for member in fleet.ready()] == ["stays"]
    assert stays.offer is None


def test_who_says_anything_is_there(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, min_devices=2))
    device = world.device()
    world.pump()
    fleet = world.server._running.fleet  # type: ignore[union-attr]
    for say in (device.report, lambda: device._fetch("0" * 64, 5)):
        fleet.lose_all()
        say()
        world.pump()
        assert fleet["one"].online is (say == device.report), "of use, that is"


def test_an_abandoned_download_ends(world: World) -> None:
    world.open()
    device = world.device(until="choice")
    world.pump()
    assert device.offer is not None
    downloads = world.server._running.downloads  # type: ignore[union-attr]
    version = device.offer.versions[-1]
    device._on_chunk = lambda payload: None  # type: ignore[method-assign]
    device._fetch(version.object, version.bytes)
    world.pass_time(119)
    assert downloads.due(world.clock.now) is not None
    world.pass_time(3)
    assert downloads.due(world.clock.now) is None


def test_a_lost_offer_comes_again_to_who_was_busy(world: World) -> None:
    world.open()
    device = world.device(until="offer")
    world.pump()
    offer, device.offer = device.offer, None
    device.report(position=RoundPosition(round=1, state="training"))
    world.pump()
    assert device.offer is None, "it has it"
    device.report(position=RoundPosition(round=0, state="awaiting-receipt"))
    world.pump()
    assert offer is not None and device.offer is not None and device.offer.round == offer.round == 1


def test_a_choice_after_the_announce_is_noted_all_the_same(world: World) -> None:
    world.open(rounds=replace(world.config.rounds, min_devices=2))
    world.device("two", until="choice")
    device = world.device("one", until="offer")
    world.pump()
    assert device.offer is not None
    version, candidate = device.offer.versions[-1], device.offer.candidates[0]
    device.until = "receipt"
    device._fetch(version.object, version.bytes)
    world.pump()
    row = store_of(world).participation("demo", 1, "one")
    assert row is not None and (row.state, row.choice) == ("received", None)
    device.say(Choice(device="one", run="demo", round=1, candidate=candidate, binding="none"))
    world.pump()
    row = store_of(world).participation("demo", 1, "one")
    assert row is not None and row.state == "received" and row.choice is not None


def test_lingers_for_who_took_part(world: World) -> None:
    server = world.open()
    device = world.device()
    other = world.device("two")
    world.pump()
    assert server.done
    server.close()
    assert device.holds == other.holds


def test_linger_ends(world: World) -> None:
    server = world.open(rounds=replace(world.config.rounds, total=1, linger_s=10.0))
    device = world.device(until="announce")
    world.pump()
    device.until = "receipt"
    device.holds = set()
    original = device._fetch
    device._fetch = lambda digest, size: None  # type: ignore[method-assign]
    device.send_announce()
    world.pump()
    assert rounds_of(world).finished and not server.done
    world.pass_time(9)
    assert not server.done
    world.pass_time(2)
    assert server.done and world.last("run.over")["lacking"] == ["one"]
    assert original is not None
    server.close()
