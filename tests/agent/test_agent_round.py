"""One round and its surroundings, the core driven by hand: no thread, no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from agent_fakes import FIT, LORA, PRINT, SHAPE, FakeBase, World, a_candidate, a_run, answer, version_object
from msgspec.structs import replace

from edge_sdk.agent.inbox import ExportRequest, GateChanged, Pause, Resume
from edge_sdk.config.agent import BaseSection
from edge_sdk.data.base_files import check_whole, find_base
from edge_sdk.errors import BaseModelError, DataError, FingerprintError, MechanismError, StateError
from edge_sdk.planning.cost import peak_mb
from edge_sdk.protocol.model import Fingerprint
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import Describe, Probe, Progress, Trained, TrainerRequest
from edge_sdk.protocol.wire import Announce, Choice, Decline, Have, Presence, Receipt, Refusal, Status
from edge_sdk.transport.memory import MemoryTransport


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def joined(world: World, **state: object) -> World:
    world.start()
    world.aggregator.hello(**state)
    world.settle()
    return world


def test_a_round_from_the_run_record_to_the_receipt(world: World) -> None:
    joined(world)
    (status,) = world.aggregator.got(Status)
    assert status.samples == 50 and status.fit is not None and status.memory.budget_mb > 1000
    assert [type(request) for request in world.trainer.requests] == [Describe, Probe]
    world.aggregator.offer()
    world.settle()
    (choice,) = world.aggregator.got(Choice)
    assert (choice.candidate.id, choice.binding, choice.attempt) == ("d4", "none", 0)
    assert choice.candidate.peak_mb == 50
    (announce,) = world.aggregator.got(Announce)
    assert announce.bytes == 9600 and announce.builds_on == 0 and announce.candidate == choice.candidate
    assert "update.receipt" in world.names() and not world.core.uploads.items
    assert world.core.rounds.state == "idle"
    ledger = world.core.context.record.ledger("run-1")
    assert ledger["chunks_up"] == 10 and ledger["chunk_bytes_up"] == 9600 and "bytes_resent" not in ledger
    assert ledger["bytes_down"] > 5000 and ledger["updates_received"] == 1
    assert {path.name for path in world.core.context.store.folder.iterdir()} == {
        world.core.context.record.residual, version_object(0)[0].object
    }  # fmt: skip


def test_a_fold_is_declined_with_what_the_base_is_held_in(world: World) -> None:
    """The fake trainer has all but that word, as one whose base is quantized."""
    joined(world)
    world.aggregator.offer(spec=TrainSpec(fold="low-rank"))
    world.settle()
    (decline,) = world.aggregator.got(Decline)
    assert decline.reason == "mechanism"
    assert "lacks fold:low-rank: nothing can be folded into a quantized base" in decline.message


@pytest.mark.parametrize(("now", "counted"), [(80, 50), (20, 20)])
def test_rows_that_came_since_it_joined_do_not_count_yet(world: World, now: int, counted: int) -> None:
    """More than its status tells no aggregator takes."""
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    assert world.trainer.pending is not None
    world.trainer.reply(replace(answer(world.trainer.pending), samples=now))
    world.settle()
    (announce,) = world.aggregator.got(Announce)
    assert announce.samples == counted


def test_residual_goes_into_the_next_round(world: World) -> None:
    joined(world)
    world.aggregator.offer()
    world.settle()
    first = world.core.context.record.residual
    world.aggregator.offer(round=2)
    world.settle()
    assert [Path(one.residual).name if one.residual else None for one in world.trainer.trained] == [
        None,
        first,
    ]
    assert world.core.context.record.residual != first


def test_without_error_feedback_no_residual_travels(world: World) -> None:
    joined(world)
    for number in (1, 2):
        world.aggregator.offer(round=number, spec=TrainSpec(error_feedback=False))
        world.settle()
    assert [one.residual for one in world.trainer.trained] == [None, None]
    assert world.core.context.record.residual is None


def test_the_choice_meets_the_owners_limit_and_names_it(tmp_path: Path) -> None:
    world = joined(World(tmp_path, memory_mb=140.0))
    world.aggregator.offer()
    world.settle()
    (choice,) = world.aggregator.got(Choice)
    assert (choice.candidate.id, choice.binding) == ("d2", "memory")
    assert world.trainer.trained[0].setup.memory_mb == 140.0


@pytest.mark.parametrize(("place", "given_mb"), [("memory", 0.1024), ("disk", 4.0)])
def test_the_trainer_may_keep_what_the_choice_reckoned_with(
    tmp_path: Path, place: str, given_mb: float
) -> None:
    """50 rows of 32 tokens and 16 values, which come 16 times each."""
    world = joined(World(tmp_path, prefix_cache_mb=4.0, prefix_cache=place))
    world.aggregator.offer(candidates=(a_candidate(2, steps=100),))
    world.settle()
    (choice,) = world.aggregator.got(Choice)
    plain = peak_mb(FIT, SHAPE, LORA, a_candidate(2).setting(TrainSpec()))
    assert choice.candidate.peak_mb == pytest.approx(plain + (0.1024 if place == "memory" else 0))
    setup = world.trainer.trained[0].setup
    assert setup.prefix_place == place and setup.prefix_mb == pytest.approx(given_mb, abs=2e-6)


def test_nothing_fits_is_declined_and_said_again(tmp_path: Path) -> None:
    world = joined(World(tmp_path, memory_mb=105.0))
    world.aggregator.offer()
    world.settle()
    world.aggregator.offer()
    world.settle()
    assert [one.reason for one in world.aggregator.got(Decline)] == ["memory", "memory"]
    assert not world.trainer.trained


def test_a_missing_mechanism_is_named(world: World) -> None:
    joined(world)
    world.aggregator.offer(spec=TrainSpec(objective="distill"))
    world.settle()
    (decline,) = world.aggregator.got(Decline)
    assert decline.reason == "mechanism" and "objective:distill" in decline.message


def test_a_duplicate_offer_repeats_the_choice_and_trains_once(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.aggregator.offer()
    world.settle()
    assert len(world.aggregator.got(Choice)) == 2 and len(world.trainer.trained) == 1
    world.aggregator.receipts = False
    world.trainer.finish()
    world.settle()
    announces = len(world.aggregator.got(Announce))
    world.aggregator.offer()
    world.settle()
    assert len(world.aggregator.got(Choice)) == 3 and len(world.trainer.trained) == 1
    assert len(world.aggregator.got(Announce)) == announces + 1


def test_out_of_memory_steps_down_and_says_so(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.trainer.fail("memory", "no room")
    world.settle()
    world.trainer.die(memory=True, exit=-9)
    world.settle()
    choices = world.aggregator.got(Choice)
    assert [(one.candidate.id, one.attempt) for one in choices] == [("d4", 0), ("d2", 1), ("d1", 2)]
    world.trainer.fail("memory", "no room")
    world.settle()
    assert [one.reason for one in world.aggregator.got(Decline)] == ["memory"]
    assert world.core.rounds.state == "idle"


def test_the_second_unexplained_sigkill_counts_as_memory(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.trainer.die(exit=-9)
    world.settle()
    assert [one.candidate.id for one in world.trainer.trained] == ["d4", "d4"]
    world.trainer.die(exit=-9)
    world.settle()
    assert [one.candidate.id for one in world.trainer.trained] == ["d4", "d4", "d2"]


def test_other_deaths_are_tried_three_times(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    for _ in range(3):
        world.trainer.die(exit=-11)
        world.settle()
    assert [one.candidate.id for one in world.trainer.trained] == ["d4"] * 3
    assert [one.reason for one in world.aggregator.got(Decline)] == ["trainer"]


def test_a_training_that_diverged_is_declined(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    assert world.trainer.pending is not None
    good = answer(world.trainer.pending)
    assert isinstance(good, Trained)
    world.trainer.reply(replace(good, measured=replace(good.measured, loss_last=float("nan"))))
    world.settle()
    assert [one.reason for one in world.aggregator.got(Decline)] == ["trainer"]


@pytest.mark.parametrize(
    ("cause", "reason"),
    [("data", "data"), ("mechanism", "mechanism"), ("container", "version"), ("base", "trainer")],
)
def test_lasting_failures_decline_at_once(world: World, cause: str, reason: str) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.trainer.fail(cause)
    world.settle()
    assert [one.reason for one in world.aggregator.got(Decline)] == [reason]


def test_pause_interrupts_and_resume_trains_again(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.core.inbox.put(Pause())
    world.settle()
    assert world.trainer.interrupts == 1 and world.core.rounds.state == "training"
    assert world.aggregator.got(Status)[-1].permission == "paused"
    world.aggregator.offer(round=2)
    world.settle()
    assert [(one.round, one.reason) for one in world.aggregator.got(Decline)] == [(2, "paused")]
    world.core.inbox.put(Resume())
    world.settle()
    assert world.aggregator.got(Status)[-1].permission == "running"


def test_pause_and_resume_train_the_same_choice(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    for event in (Pause(), Resume()):
        world.core.inbox.put(event)
        world.settle()
    world.trainer.finish()
    world.settle()
    assert [one.candidate.id for one in world.trainer.trained] == ["d4", "d4"]
    assert "update.receipt" in world.names()


def test_a_gate_holds_like_a_pause(world: World) -> None:
    joined(world)
    world.core.inbox.put(GateChanged("too hot"))
    world.settle()
    world.aggregator.offer()
    world.settle()
    assert [one.reason for one in world.aggregator.got(Decline)] == ["gate"]
    assert world.aggregator.got(Status)[-1].reason == "too hot"
    for event in (Pause(), Resume()):
        world.core.inbox.put(event)
        world.settle()
    assert world.core.context.permission == "gated"
    world.core.inbox.put(GateChanged(None))
    world.settle()
    assert world.core.context.permission == "running"


def test_another_fingerprint_is_refused_here(world: World) -> None:
    world.base = FakeBase(replace(PRINT, base="f" * 64, max_length=64))
    joined(world)
    assert isinstance(world.core.error, FingerprintError)
    assert "base" in world.core.error.message and "max_length" in world.core.error.message
    assert not world.aggregator.got(Status) and world.core.done


class Cached(FakeBase):
    """The hub's cache as it is, of what has no fingerprint before it is whole."""

    find_base = staticmethod(find_base)
    check_whole = staticmethod(check_whole)

    def fingerprint_of(self, folder: Path, **facts: Any) -> Fingerprint:  # type: ignore[override]
        check_whole(folder)
        return super().fingerprint_of(folder, **facts)


def test_a_hub_id_of_which_files_are_missing_is_fetched_and_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(world.folder / "hub"))
    snapshot = world.folder / "hub" / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    world.config, world.base = replace(world.config, base=BaseSection(path="org/tiny")), Cached()
    asked: list[TrainerRequest] = []
    request, world.trainer.request = world.trainer.request, asked.append  # type: ignore[method-assign]
    joined(world)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
        world.settle(70.0)
        assert world.core.error is None and world.core.joining.fingerprint is None
    (describe,) = asked
    assert isinstance(describe, Describe) and describe.setup.base == "org/tiny"
    world.trainer.request = request  # type: ignore[method-assign]
    world.trainer.reply(replace(answer(describe), base=str(snapshot)))
    world.settle()
    assert world.core.joining.ready and world.core.error is None


@pytest.mark.parametrize("there", ["tokenizer.json", "model.safetensors"])
def test_a_fetch_that_an_earlier_agent_left_half_is_gone_on_with(
    world: World, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(world.folder / "hub"))
    snapshot = world.folder / "hub" / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", there):
        (snapshot / name).write_text("{}")
    world.config, world.base = replace(world.config, base=BaseSection(path="org/tiny")), Cached()
    asked: list[TrainerRequest] = []
    world.trainer.request = asked.append  # type: ignore[method-assign]
    joined(world)
    (describe,) = asked
    assert isinstance(describe, Describe) and describe.setup.base == "org/tiny"
    assert world.core.error is None


def test_a_task_that_is_not_known_is_refused_by_name(world: World) -> None:
    world.start()
    world.aggregator.hello(a_run(task="ranking"))
    world.settle()
    assert isinstance(world.core.error, MechanismError)
    assert "'ranking'" in world.core.error.message and "causal-lm" in world.core.error.message


def test_another_fingerprint_is_refused_there(world: World) -> None:
    joined(world)
    world.aggregator.say(
        Refusal(device="one", run="demo", reason="fingerprint", message="other base", parts=("base",))
    )
    world.settle()
    assert isinstance(world.core.error, FingerprintError) and "base" in world.core.error.message


@pytest.mark.parametrize(("cause", "kind"), [("base", BaseModelError), ("data", DataError)])
def test_a_trainer_that_cannot_start_is_fatal(world: World, cause: str, kind: type[Exception]) -> None:
    world.start()

    def refuse(request: Describe) -> None:
        world.trainer.pending = request
        world.trainer.fail(cause, "row 7")

    world.trainer.request = refuse  # type: ignore[method-assign, assignment]
    world.aggregator.hello()
    world.settle()
    assert isinstance(world.core.error, kind) and "row 7" in str(world.core.error)


@pytest.mark.parametrize("reason", ["round", "version", "run"])
def test_refused_for_its_place_becomes_owed(world: World, reason: str) -> None:
    world.aggregator.serving = False
    joined(world)
    world.aggregator.serving = True
    world.aggregator.receipts = False
    world.aggregator.offer()
    world.settle()
    (item,) = world.core.uploads.items
    world.aggregator.say(
        Refusal(device="one", run="demo", round=1, object=item.announce.object, reason=reason, message="late")
    )
    world.settle()
    assert [one.object for one in world.core.context.record.owed()] == [item.announce.object]
    world.aggregator.receipts = True
    world.aggregator.offer(round=2)
    world.settle()
    assert [Path(path).name for path in world.trainer.trained[-1].owed] == [item.announce.object]
    assert not world.core.context.record.owed()
    assert not world.core.context.store.has(item.announce.object)


def test_what_was_sent_twice_counts_however_the_update_ends(world: World) -> None:
    world.aggregator.receipts = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.aggregator.received.clear()
    world.aggregator.state(epoch="e2")
    world.settle()
    (item,) = world.core.uploads.items
    world.aggregator.say(
        Refusal(
            device="one", run="demo", round=1, object=item.announce.object, reason="round", message="late"
        )
    )
    world.settle()
    row = world.core.context.record.round("run-1", 1)
    assert row is not None and (row.outcome, row.resent) == ("owed", 9600)
    assert world.core.context.record.ledger("run-1")["bytes_resent"] == 9600


def test_a_choice_made_offline_is_said_before_its_update(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.broker.drop("agent-one")
    world.trainer.fail("memory")
    world.settle()
    world.trainer.finish()
    world.settle()
    assert [item.state for item in world.core.uploads.items] == ["queued"]
    world.broker.restore("agent-one")
    world.settle()
    said = [one for one in world.aggregator.records if isinstance(one, Choice | Announce)]
    assert isinstance(said[-1], Announce) and isinstance(said[-2], Choice)
    assert said[-2].candidate.id == said[-1].candidate.id == "d2"


def test_declined_rounds_are_forgotten_in_time(tmp_path: Path) -> None:
    world = joined(World(tmp_path, memory_mb=105.0))
    for number in range(1, 71):
        world.aggregator.offer(round=number)
        world.settle()
    assert len(world.core.context.record.rounds()) == 64


def test_a_silent_trainer_is_taken_for_dead(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer(deadline_s=10_000.0)
    world.settle(599)
    assert world.trainer.pending is not None
    world.trainer.reply(Progress(id=world.trainer.pending.id, stage="training", done=1, total=5, loss=None))
    world.settle(599)
    assert world.trainer.unloads == 0 and len(world.trainer.trained) == 1
    world.trainer.pending = None
    world.settle(2)
    assert world.trainer.unloads == 1 and len(world.trainer.trained) == 2
    assert "10 minutes" in world.event("training.failed").fields["message"]


def test_refused_for_its_content_is_dropped_with_its_residual(world: World) -> None:
    world.aggregator.receipts = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    (item,) = world.core.uploads.items
    world.trainer.auto = False
    world.aggregator.offer(round=2)
    world.settle()
    assert world.trainer.trained[-1].residual is not None
    world.aggregator.say(
        Refusal(
            device="one", run="demo", round=1, object=item.announce.object, reason="nonfinite", message="NaN"
        )
    )
    world.settle()
    assert not world.core.uploads.items and world.core.context.record.residual is None
    assert world.trainer.trained[-1].residual is None and len(world.trainer.trained) == 3


def test_storage_refusal_is_tried_again_later(world: World) -> None:
    world.aggregator.receipts = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    (item,) = world.core.uploads.items
    world.aggregator.say(
        Refusal(
            device="one", run="demo", round=1, object=item.announce.object, reason="storage", message="full"
        )
    )
    world.settle()
    before = len(world.aggregator.got(Announce))
    world.aggregator.receipts = True
    world.settle(30)
    assert len(world.aggregator.got(Announce)) == before
    world.settle(40)
    assert "update.receipt" in world.names()


def test_a_new_epoch_hears_everything_again(world: World) -> None:
    world.aggregator.receipts = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.aggregator.records.clear()
    world.aggregator.received.clear()
    world.aggregator.receipts = True
    world.aggregator.state(epoch="e2")
    world.settle()
    assert [type(one) for one in world.aggregator.records[:4]] == [Presence, Status, Choice, Announce]
    assert world.aggregator.got(Announce)[0].sent_bytes == 9600
    assert world.event("update.receipt").fields["bytes_resent"] == 9600
    assert world.core.context.record.ledger("run-1")["bytes_resent"] == 9600


def test_a_cut_link_resumes_and_resends_at_most_a_window(world: World) -> None:
    joined(world)
    world.aggregator.offer()
    for _ in range(200):
        world.core.pump()
        world.core.tick(world.clock.now)
        world.aggregator.pump()
        if sum(map(len, world.aggregator.received.values())) >= 3:
            break
    world.broker.drop("agent-one")
    world.settle()
    assert world.core.uploads.items[0].state == "queued" and "connection.down" in world.names()
    world.broker.restore("agent-one")
    world.settle()
    assert "update.receipt" in world.names()
    assert world.event("update.receipt").fields["bytes_resent"] <= 2 * 1024


def test_a_version_is_fetched_again_after_silence(world: World) -> None:
    world.aggregator.serving = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    assert world.core.rounds.state == "fetching"
    asked = len(world.aggregator.got(Have))
    world.settle(3)
    assert len(world.aggregator.got(Have)) > asked
    world.aggregator.serving = True
    world.settle(10)
    assert "update.receipt" in world.names()


def test_the_deadline_ends_a_round(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer(deadline_s=20.0)
    world.settle()
    world.settle(19)
    assert world.core.rounds.state == "training"
    world.settle(2)
    assert world.core.rounds.state == "idle" and world.trainer.interrupts == 1
    assert [one.reason for one in world.aggregator.got(Decline)] == ["deadline"]


def test_a_newer_offer_replaces_the_round(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.aggregator.offer(round=2)
    world.settle()
    assert [one.round for one in world.trainer.trained] == [1, 2]
    world.trainer.finish()
    world.settle()
    assert [one.round for one in world.aggregator.got(Announce)] == [2]
    world.aggregator.offer(round=1, nonce="other")
    world.settle()
    assert len(world.trainer.trained) == 2


def test_another_run_drops_what_the_old_one_left(world: World) -> None:
    world.aggregator.receipts = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    world.aggregator.receipts = True
    world.aggregator.hello(a_run("run-2"), epoch="e2")
    world.settle()
    assert world.event("run.joined").fields["dropped_updates"] == 1
    assert not world.core.uploads.items and world.core.context.record.residual is None
    assert len([one for one in world.trainer.requests if isinstance(one, Probe)]) == 1
    world.aggregator.offer(nonce="run-2")
    world.settle()
    assert "update.receipt" in world.names()


def test_the_end_fetches_the_final_version_and_says_so(world: World) -> None:
    joined(world)
    world.aggregator.offer()
    world.settle()
    ref, data = version_object(1)
    world.aggregator.objects[ref.object] = data
    world.aggregator.state(finished=True, version=ref, round=1)
    world.settle()
    assert world.event("run.finished").fields == {"run": "demo", "version": 1}
    assert world.aggregator.got(Status)[-1].holds == (0, 1)
    assert world.names().count("run.finished") == 1


def test_an_idle_trainer_is_unloaded(world: World) -> None:
    joined(world)
    world.settle(299)
    assert world.trainer.unloads == 0
    world.settle(2)
    assert world.trainer.unloads == 1


def test_uploads_keep_to_the_owners_limit(tmp_path: Path) -> None:
    world = joined(World(tmp_path, uplink_kbps=8.0))
    world.settle(30)
    world.aggregator.offer()
    start = world.clock.now
    while "update.receipt" not in world.names():
        world.settle(0.5)
        assert world.clock.now < start + 60
    assert world.clock.now - start > 3
    assert world.aggregator.got(Status)[0].link.source == "configured"


@pytest.mark.parametrize("busy", [True, False])
def test_chunks_go_again_only_once_the_transport_got_rid_of_them(
    world: World, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined(world)
    world.aggregator.offer()
    while not world.core.context.record.ledger("run-1").get("chunks_up"):
        world.core.pump()
        world.core.tick(world.clock.now)
        world.aggregator.pump()
    world.aggregator.serving = False
    world.settle()
    before = world.core.context.record.ledger("run-1")["chunks_up"]
    monkeypatch.setattr(MemoryTransport, "busy", busy)
    world.settle(200)
    assert (world.core.context.record.ledger("run-1")["chunks_up"] > before) is not busy


def test_the_adapter_is_exported_once(world: World) -> None:
    from concurrent.futures import Future

    joined(world)
    early: Future[Path] = Future()
    world.core.inbox.put(ExportRequest(early))
    world.settle()
    assert isinstance(early.exception(0), StateError)
    world.aggregator.offer()
    world.settle()
    results: list[Future[Path]] = [Future(), Future()]
    for result in results:
        world.core.inbox.put(ExportRequest(result))
    world.settle()
    assert results[0].result(0) == results[1].result(0) and results[0].result(0).is_dir()


def test_presence_is_retained_and_willed(world: World) -> None:
    joined(world)
    world.broker.drop("agent-one")
    world.settle()
    presence = world.aggregator.got(Presence)
    assert [one.online for one in presence] == [True, True, False] and presence[0].session == 1


def test_stray_records_are_problems_and_nothing_more(world: World) -> None:
    joined(world)
    world.aggregator.transport.publish(world.aggregator.topics.reply("one"), b"{not json")
    world.aggregator.say(Receipt(device="one", run="demo", round=9, object="0" * 64))
    world.aggregator.say(Presence(device="one", online=True, session=1))
    world.settle()
    assert world.names().count("problem") == 2 and world.core.error is None
