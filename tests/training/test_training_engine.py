"""Requests and replies of the engine, through the trainer that runs inside this process."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from edge_sdk.planning.cost import update_bytes  # noqa: E402
from edge_sdk.protocol.model import LoraShape, ModelShape  # noqa: E402
from edge_sdk.protocol.spec import Candidate, TrainSpec  # noqa: E402
from edge_sdk.protocol.trainer import (  # noqa: E402
    DataSource,
    Describe,
    Described,
    Evaluate,
    Evaluated,
    Failed,
    PlanBase,
    Probe,
    Probed,
    Progress,
    Setup,
    Train,
    Trained,
    TrainerReply,
    TrainerRequest,
)
from edge_sdk.training import checking, engine, loop  # noqa: E402
from edge_sdk.training import resident as resident_module  # noqa: E402
from edge_sdk.training.base import gpu_uuid  # noqa: E402
from edge_sdk.training.inline import InlineTrainer  # noqa: E402
from edge_sdk.training.model.checkpoint import Entry  # noqa: E402
from edge_sdk.training.optimizer import LossScale  # noqa: E402
from edge_sdk.training.words import MECHANISMS  # noqa: E402
from edge_sdk.updates.container import read_container  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402
from edge_sdk.updates.keys import check_shape, tuned_keys  # noqa: E402
from edge_sdk.updates.versions import read_adapter, write_version  # noqa: E402

LABELS = ("colour", "number", "animal", "plant")
LORA = LoraShape(rank=4, alpha=8.0)
PRINT = "0" * 64


class Bench:
    """An inline trainer, a setup and a version 0 to train from."""

    def __init__(self, base: Path, rows: Path, folder: Path) -> None:
        self.folder = folder
        self.replies: list[TrainerReply] = []
        self.trainer = InlineTrainer(threaded=False)
        self.trainer.start(self.replies.append)
        self.setup = Setup(
            base=str(base), labels=LABELS, max_length=12, micro_batch=8, lora=LORA, threads=1,
            spec=TrainSpec(learning_rate=5e-3, head_learning_rate=2e-2), data=DataSource(path=str(rows)),
        )  # fmt: skip
        self.shape: ModelShape | None = None

    def ask(self, request: TrainerRequest) -> Any:
        self.replies.clear()
        self.trainer.request(request)
        *progress, last = self.replies
        assert all(isinstance(reply, Progress) for reply in progress)
        for reply in self.replies:
            msgspec.json.encode(reply)
        return last

    def describe(self) -> Described:
        reply = self.ask(Describe(id=1, setup=self.setup))
        assert isinstance(reply, Described), reply
        self.shape = reply.shape
        return reply

    def version(self, number: int = 0, name: str = "v0") -> Path:
        shape = self.shape or self.describe().shape
        path = self.folder / f"{name}.safetensors"
        write_version(
            path, run="r", round=0, number=number, fingerprint=PRINT,
            adapter=initial_adapter(shape, LORA, seed=2), codec="fp32",
        )  # fmt: skip
        return path

    def train(self, name: str = "out", **changes: Any) -> Any:
        candidate = {"id": "c", "depth": 2, "micro_batch": 8, "max_length": 12, "steps": 6}
        candidate.update(changes.pop("candidate", {}))
        fields: dict[str, Any] = {
            "id": 2, "setup": self.setup, "run": "r", "round": 1, "device": "d1", "fingerprint": PRINT,
            "candidate": Candidate(**candidate), "spec": self.setup.spec, "versions": (str(self.version()),),
            "folder": str(self.folder / name),
        }  # fmt: skip
        return self.ask(Train(**{**fields, **changes}))


@pytest.fixture
def bench(tiny: dict[str, Path], rows_file: Path, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tiny["bert"], rows_file, tmp_path)
    yield bench
    bench.trainer.close()


def test_describe(bench: Bench) -> None:
    reply = bench.describe()
    assert reply.shape.layers == 3 and reply.device == "cpu" and reply.samples == 96
    assert sum(reply.label_counts) == 96 and len(reply.label_counts) == 4
    assert reply.mechanisms == MECHANISMS and reply.rest_mb > 50
    assert Path(reply.base).is_absolute()
    assert bench.trainer.loaded


def test_another_base_in_the_same_folder_is_loaded(tiny: dict[str, Path], bench: Bench) -> None:
    folder = bench.folder / "base"
    shutil.copytree(tiny["bert"], folder)
    bench.setup = msgspec.structs.replace(bench.setup, base=str(folder))
    before = bench.describe().shape
    shutil.rmtree(folder)
    shutil.copytree(tiny["roberta"], folder)
    after = bench.describe().shape
    assert after != before and after == bench.describe().shape


def test_what_is_offered_by_default_is_had_here() -> None:
    assert TrainSpec().needs() | Candidate(id="c", depth=1, quantized_layers=1).needs() <= set(MECHANISMS)


def test_train_writes_the_update_of_the_tuned_layers(bench: Bench) -> None:
    reply = bench.train()
    assert isinstance(reply, Trained), reply
    assert reply.samples == 96 and reply.measured.steps == 6 and reply.measured.step_s > 0
    assert reply.residual is not None
    assert bench.shape is not None
    with read_container(Path(reply.update), "update") as update:
        assert update.header.builds_on == 0 and update.header.codec == "int8"
        assert set(update.parts) == set(tuned_keys(bench.shape, 2))
        assert all(np.abs(update.tensor(key)).max() > 0 for key in update.parts)


@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_is_trained_and_sent_alone(factors: str, bench: Bench) -> None:
    reply = bench.train(spec=msgspec.structs.replace(bench.setup.spec, factors=factors))
    assert isinstance(reply, Trained), reply
    assert bench.shape is not None
    with read_container(Path(reply.update), "update") as update:
        check_shape(update.header, bench.shape, LORA, 2, factors)
        assert set(update.parts) == set(tuned_keys(bench.shape, 2, factors))
        # B begins at 0, so A alone has no gradient
        assert factors == "A" or all(np.abs(update.tensor(key)).max() > 0 for key in update.parts)
    expected = update_bytes(bench.shape, LORA, 2, "int8", factors)
    assert Path(reply.update).stat().st_size == pytest.approx(expected, abs=64)


def test_the_same_key_gives_the_same_bytes(bench: Bench) -> None:
    data = [
        Path(bench.train(name, **changes).update).read_bytes()
        for name, changes in (("a", {}), ("b", {"device": "d2"}), ("c", {}), ("d", {"round": 2}))
    ]
    assert data[0] == data[2]
    assert data[0] != data[1]
    header = {
        "candidate": {"codec": "fp32"},
        "spec": msgspec.structs.replace(bench.setup.spec, error_feedback=False),
    }
    rounds = []
    for number in (1, 2):
        with read_container(Path(bench.train(f"r{number}", round=number, **header).update)) as update:
            rounds.append(update.tensor("dense.classifier.weight"))
    assert (rounds[0] != rounds[1]).any()


def test_it_learns_and_the_quantized_store_does_no_harm(bench: Bench) -> None:
    losses = {}
    for quantized in (0, 3):
        candidate = {"depth": 3, "quantized_layers": quantized, "steps": 40}
        measured = bench.train(f"q{quantized}", candidate=candidate).measured
        losses[quantized] = (measured.loss_first, measured.loss_last)
    assert losses[0][0] == losses[3][0]
    assert losses[0][1] < 0.6 and losses[3][1] < 0.6


def test_the_trained_version_evaluates_better(bench: Bench) -> None:
    first = bench.version()
    before = bench.ask(Evaluate(id=3, setup=bench.setup, versions=(str(first),)))
    spec = msgspec.structs.replace(bench.setup.spec, error_feedback=False)
    reply = bench.train(candidate={"depth": 3, "steps": 40, "codec": "fp32"}, spec=spec)
    assert reply.residual is None
    adapter = read_adapter([first])
    with read_container(Path(reply.update)) as update:
        for key in update.parts:
            adapter[key] = adapter[key] + update.tensor(key)
    path = bench.folder / "v1.safetensors"
    write_version(path, run="r", round=1, number=1, fingerprint=PRINT, adapter=adapter)
    after = bench.ask(Evaluate(id=4, setup=bench.setup, versions=(str(path),)))
    assert isinstance(before, Evaluated) and isinstance(after, Evaluated)
    assert after.examples == 96 and before.accuracy < 0.6 and after.accuracy > 0.95
    assert after.loss < before.loss


def test_the_head_alone_learns_from_cached_features(bench: Bench) -> None:
    reply = bench.train(candidate={"depth": 0, "steps": 60})
    assert isinstance(reply, Trained), reply
    assert reply.measured.loss_last < reply.measured.loss_first
    with read_container(Path(reply.update)) as update:
        assert set(update.parts) == {"dense.classifier.weight", "dense.classifier.bias"}
    resident = bench.trainer._engine._resident  # type: ignore[union-attr]
    assert resident is not None
    encode, calls = resident.model.encode, []
    resident.model.encode = lambda *a: calls.append(1) or encode(*a)  # type: ignore[func-returns-value]
    again = bench.train("again", candidate={"depth": 0, "steps": 60})
    assert not calls
    assert Path(again.update).read_bytes() == Path(reply.update).read_bytes()


def test_the_head_alone_is_the_whole_model_with_nothing_else_tuned(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.version()
    resident = bench.trainer._engine._resident  # type: ignore[union-attr]
    assert resident is not None
    rows = resident.rows(bench.setup)
    every = torch.arange(len(rows))
    ids, mask = rows.inputs(every, "cpu")
    with torch.inference_mode():
        whole = resident.model.net(input_ids=ids, attention_mask=mask).logits
        assert torch.allclose(whole, resident.model.logits(ids, mask), atol=1e-6)
        # an evaluation trims the padding and keeps what it computed, where that is not much
        for most in (64e6, 1.0):
            monkeypatch.setattr(resident_module, "_KEPT_BYTES", most)
            rows.head_inputs.clear()
            right = 0
            for features, _, labels in resident.every(rows, 8):
                right += int((resident.model.head(features).argmax(1) == labels).sum())
            assert right == int((whole.argmax(1) == rows.labels).sum())
            assert len(rows.head_inputs) == (most > 1.0)


def test_an_evaluation_changes_no_bit_of_a_later_training(bench: Bench) -> None:
    versions = (str(bench.version()),)
    alone = Path(bench.train("alone", candidate={"depth": 0}).update).read_bytes()
    bench.trainer.unload()
    assert isinstance(bench.ask(Evaluate(id=3, setup=bench.setup, versions=versions)), Evaluated)
    assert Path(bench.train("after", candidate={"depth": 0}).update).read_bytes() == alone


def test_a_cache_of_the_frozen_layers_changes_nothing(bench: Bench) -> None:
    candidate = {"depth": 1, "steps": 30, "quantized_layers": 1}
    plain = bench.train("plain", candidate=candidate)
    for place in ("memory", "disk"):
        setup = msgspec.structs.replace(bench.setup, prefix_mb=1.0, prefix_place=place)
        reply = bench.train(place, candidate=candidate, setup=setup)
        assert isinstance(reply, Trained), reply
        assert reply.measured.loss_last == plain.measured.loss_last
        assert Path(reply.update).read_bytes() == Path(plain.update).read_bytes()
        names = {path.name for path in Path(reply.update).parent.iterdir()}
        assert names == {"update.safetensors", "residual.safetensors"}


def test_progress_tells_the_pace(bench: Bench) -> None:
    bench.train(candidate={"depth": 1})
    told = [r for r in bench.replies if isinstance(r, Progress) and r.stage == "training"]
    assert told[-1].left_s == 0 and told[-1].tokens_per_s and told[-1].loss


def test_a_paged_optimizer_is_refused_on_the_cpu_with_the_reason(bench: Bench) -> None:
    spec = msgspec.structs.replace(bench.setup.spec, optimizer="paged-adamw8bit")
    reply = bench.train(spec=spec)
    assert isinstance(reply, Failed) and reply.cause == "mechanism"
    assert "on the CPU" in reply.message and "adamw8bit" in reply.hint
    assert "optimizer:paged-adamw8bit" not in bench.describe().mechanisms


def test_residual_and_owed_updates_are_carried_on(bench: Bench) -> None:
    first = bench.train("first")
    again = bench.train("again", residual=first.residual, owed=(first.update,))
    plain = bench.train("plain")
    key = "dense.classifier.weight"
    sent = []
    for reply in (plain, again):
        with read_container(Path(reply.update)) as update, read_container(Path(reply.residual)) as left:
            sent.append(update.tensor(key) + left.tensor(key))
    with read_container(Path(first.update)) as update, read_container(Path(first.residual)) as left:
        owed = update.tensor(key) + left.tensor(key)
    assert np.allclose(sent[1], sent[0] + owed, atol=1e-6)


def test_accumulated_batches_count_as_one(bench: Bench) -> None:
    spec = msgspec.structs.replace(bench.setup.spec, error_feedback=False)
    tensors = []
    for name, batch, accumulation in (("one", 8, 1), ("two", 4, 2)):
        candidate = {"micro_batch": batch, "accumulation": accumulation, "codec": "fp32", "steps": 3}
        with read_container(Path(bench.train(name, candidate=candidate, spec=spec).update)) as update:
            tensors.append(update.tensor("dense.classifier.weight"))
    assert np.allclose(*tensors, atol=1e-3)


def test_probe_gives_a_fit(bench: Bench) -> None:
    reply = bench.ask(Probe(id=5, setup=bench.setup))
    assert isinstance(reply, Probed), reply
    assert [(p.depth, p.quantized_layers, p.micro_batch) for p in reply.fit.probes] == [
        (1, 1, 0),
        (1, 0, 0),
        (3, 3, 2),  # a quarter of the batch
        (3, 3, 0),
        (3, 0, 0),
    ]
    assert reply.fit.micro_batch == 8 and reply.fit.max_length == 12 and "torch" in reply.fit.machine


@pytest.mark.parametrize(
    ("change", "cause", "says"),
    [
        ({"base": "/nowhere/model"}, "base", "no such folder"),
        ({"device": "cuda:7"}, "base", "CUDA"),
        ({"labels": ("colour", "number")}, "data", "row 2"),
        ({"data": DataSource(path="/nowhere/rows.csv")}, "data", "rows.csv"),
        ({"max_length": 512}, "base", "512"),
        ({"spec": TrainSpec(attention="eager")}, "mechanism", "attention:eager"),
        ({"spec": TrainSpec(dropout=0.1)}, "mechanism", "dropout"),
        ({"lora": LoraShape(targets=("nope",))}, "base", "nope"),
    ],
)
def test_what_cannot_be_done_says_why(bench: Bench, change: dict[str, Any], cause: str, says: str) -> None:
    reply = bench.ask(Describe(id=9, setup=msgspec.structs.replace(bench.setup, **change)))
    assert isinstance(reply, Failed), reply
    assert (reply.id, reply.cause) == (9, cause)
    assert says in reply.message and reply.hint and "\n" not in reply.message


def test_tokens_beyond_the_vocabulary_are_named(bench: Bench, tiny: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "grown"
    shutil.copytree(tiny["bert"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    tokenizer.save_pretrained(folder)
    rows = tmp_path / "new.jsonl"
    rows.write_text(json.dumps({"text": "red new39", "label": "colour"}) + "\n")
    setup = msgspec.structs.replace(bench.setup, base=str(folder))
    assert isinstance(bench.ask(Describe(id=9, setup=setup)), Described)  # none of these rows has one
    setup = msgspec.structs.replace(setup, data=DataSource(path=str(rows)))
    for request in (Describe(id=9, setup=setup), PlanBase(id=9, setup=setup, budget_bytes=1 << 30)):
        reply = bench.ask(request)
        assert isinstance(reply, Failed) and reply.cause == "base", reply
        assert "'new39'" in reply.message and "32 embeddings" in reply.message
        assert "resize_token_embeddings" in reply.hint


def test_a_training_that_diverges_in_its_last_step_does_not_blame_the_version(bench: Bench) -> None:
    spec = msgspec.structs.replace(bench.setup.spec, learning_rate=1e9)
    reply = bench.train(spec=spec, candidate={"steps": 1, "codec": "fp16"})
    assert isinstance(reply, Failed) and reply.cause == "internal", reply
    assert "65504" in reply.message and "lower the learning rates" in reply.hint
    assert isinstance(bench.train(), Trained)


def test_what_packs_is_made_ready_before_the_first_round(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[Any] = []
    monkeypatch.setattr("edge_sdk.training.resident.warm", warmed.append)
    bench.describe()
    assert warmed == [torch.device("cpu")]
    bench.train()
    assert len(warmed) == 1


def test_a_hub_id_that_cannot_be_had_names_the_command(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reply = bench.ask(Describe(id=9, setup=msgspec.structs.replace(bench.setup, base="some/model")))
    assert isinstance(reply, Failed) and reply.cause == "base"
    assert "some/model" in reply.message and "hf download some/model" in reply.hint


def test_a_mechanism_that_is_not_had_is_named(bench: Bench) -> None:
    reply = bench.train(candidate={"quantized_layers": 1, "activation_bits": 3, "codec": "int3"})
    assert isinstance(reply, Failed) and reply.cause == "mechanism"
    assert "activation:int3, codec:int3" in reply.message


def test_altered_and_foreign_containers(bench: Bench) -> None:
    path = bench.version()
    reply = bench.train(fingerprint="1" * 64)
    assert isinstance(reply, Failed) and reply.cause == "container"
    bad = bench.folder / "bad.safetensors"
    bad.write_bytes(path.read_bytes()[:-100])
    reply = bench.train(versions=(str(bad),))
    assert isinstance(reply, Failed) and reply.cause == "container"
    assert isinstance(bench.train(), Trained)


def test_the_unexpected_names_its_type(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.version()

    def explode(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr("edge_sdk.training.loop.RoundOptimizer", explode)
    reply = bench.train()
    assert isinstance(reply, Failed) and reply.cause == "internal"
    assert reply.message == "ZeroDivisionError: odd"


def test_a_missing_package_names_the_extra(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "edge_sdk.training.resident", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in (
        "edge_sdk.training.resident",
        "edge_sdk.training.model",
        "edge_sdk.training.model.loading",
    ):
        monkeypatch.delitem(sys.modules, module, raising=False)
    reply = bench.ask(Describe(id=9, setup=bench.setup))
    assert isinstance(reply, Failed) and reply.cause == "extra"
    assert "transformers" in reply.message and "edge-sdk[train]" in reply.hint


def test_interrupt_ends_the_training_and_the_trainer_goes_on(
    tiny: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    bench = Bench(tiny["bert"], rows_file, tmp_path)
    version = bench.version()
    bench.trainer.close()
    done: list[TrainerReply] = []
    seen = threading.Event()
    ended = threading.Semaphore(0)

    def deliver(reply: TrainerReply) -> None:
        if isinstance(reply, Progress):
            if reply.stage == "training":
                seen.set()
        else:
            done.append(reply)
            ended.release()
            if isinstance(reply, Failed):
                raise RuntimeError("the app's own fault")

    trainer = InlineTrainer()
    trainer.start(deliver)
    request = Train(
        id=5, setup=bench.setup, run="r", round=1, device="d", fingerprint=PRINT, spec=bench.setup.spec,
        candidate=Candidate(id="c", depth=3, micro_batch=8, max_length=12, steps=100_000),
        versions=(str(version),), folder=str(tmp_path / "long"),
    )  # fmt: skip
    trainer.request(request)
    assert seen.wait(60)
    short = msgspec.structs.replace(
        request, id=6, candidate=msgspec.structs.replace(request.candidate, steps=2),
        folder=str(tmp_path / "short"),
    )  # fmt: skip
    trainer.interrupt()
    trainer.request(short)  # at once: the interrupt is of what came before it
    assert ended.acquire(timeout=60) and ended.acquire(timeout=60)
    assert isinstance(done[0], Failed) and done[0].cause == "interrupted" and done[0].id == 5
    assert not (tmp_path / "long" / "update.safetensors").exists()
    assert isinstance(done[1], Trained) and done[1].id == 6
    trainer.close()


def test_loading_is_interrupted_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read, entries = Entry.read, []

    def interrupted(entry: Entry) -> Any:
        entries.append(entry)
        bench.trainer.interrupt()
        return read(entry)

    monkeypatch.setattr(Entry, "read", interrupted)
    reply = bench.ask(Describe(id=1, setup=bench.setup))
    assert isinstance(reply, Failed) and reply.cause == "interrupted" and len(entries) == 1
    assert not bench.trainer.loaded
    monkeypatch.undo()
    assert bench.describe().samples == 96


def test_a_step_beyond_fp16_is_done_again_at_half_the_scale(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.setup = msgspec.structs.replace(bench.setup, base_precision="fp16")
    made: list[LossScale] = []

    def update(name: str, scale: float, prefix_mb: float = 0.0, **candidate: Any) -> bytes:
        monkeypatch.setattr(loop, "LossScale", lambda: made.append(LossScale(scale)) or made[-1])
        setup = msgspec.structs.replace(bench.setup, prefix_mb=prefix_mb)
        reply = bench.train(name, candidate={"base_precision": "fp16", **candidate}, setup=setup)
        assert isinstance(reply, Trained), reply
        return Path(reply.update).read_bytes()

    halved = update("halved", 2.0**30, steps=1)
    assert 1.0 < made[-1].value < 2.0**29
    assert halved == update("at once", made[-1].value, steps=1), "a round of one step has learned"
    cached = {"depth": 1, "steps": 8, "accumulation": 2}
    assert update("cached", 2.0**22, 1.0, **cached) == update("plain", 2.0**22, **cached)
    assert made[-1].value < 2.0**22


def test_gradients_beyond_fp16_at_any_scale_are_told_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.setup = msgspec.structs.replace(bench.setup, base_precision="fp16")
    bench.describe()
    task = type(bench.trainer._engine._resident.task)  # type: ignore[union-attr]
    loss_of, tried = task.loss, []

    def overflowing(*args: Any) -> Any:
        loss = loss_of(*args)
        loss.register_hook(lambda gradient: tried.append(gradient.item()) or gradient * torch.inf)
        return loss

    monkeypatch.setattr(task, "loss", overflowing)
    reply = bench.train(candidate={"base_precision": "fp16", "depth": 1, "steps": 9})
    assert isinstance(reply, Failed) and reply.cause == "mechanism" and "range of fp16" in reply.message
    assert tried == [2.0**power for power in range(14, -1, -1)]


def test_more_layers_than_there_are_cannot_be_offered(bench: Bench) -> None:
    reply = bench.train(candidate={"depth": 4})
    assert isinstance(reply, Failed) and reply.cause == "mechanism" and "3 layers" in reply.message


def test_a_long_step_is_no_silence(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.describe()

    def told() -> list[Progress]:
        assert isinstance(bench.train(candidate={"steps": 2}), Trained)
        return [reply for reply in bench.replies if isinstance(reply, Progress)]

    seldom = told()
    monkeypatch.setattr(engine, "_ALIVE_S", 0.0)
    monkeypatch.setattr(checking, "_EVERY_S", 0.0)
    often = told()
    assert len(often) > len(seldom) + 2 * 2 * 3  # every layer, forward and backward
    assert often[0].stage == "loading"  # until the first step is done nothing else was said
    assert {reply.done for reply in often if reply.stage == "training"} == {1, 2}
    assert {reply.id for reply in often} == {2}


def test_rows_are_read_again_when_the_file_changed(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"text": "red", "label": "colour"}) + "\n")
    bench.setup = msgspec.structs.replace(bench.setup, data=DataSource(path=str(path)))
    assert bench.describe().samples == 1
    with path.open("a") as file:
        file.write(json.dumps({"text": "two", "label": "number"}) + "\n")
    assert bench.describe().label_counts == (1, 1, 0, 0)


def test_a_gpus_memory_is_given_back_before_the_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver calls free is what the agent chooses by: torch's cache must not lack in it."""
    given: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(len(bench.replies)))
    bench.train(candidate={"steps": 1})
    assert given[-1] == len(bench.replies) - 1 and isinstance(bench.replies[-1], Trained)
    given.clear()
    monkeypatch.setattr(engine, "_ALIVE_S", 0.0)  # and what an interrupt ended is given back as well

    def deliver(reply: TrainerReply) -> None:
        bench.replies.append(reply)
        bench.trainer.interrupt()

    monkeypatch.setattr(bench.trainer._engine, "_deliver", deliver)
    assert isinstance(bench.train(), Failed) and given[-1] == len(bench.replies) - 1


def test_a_gpu_is_named_as_its_driver_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_uuid(torch.device("cpu")) == ""
    for uuid, told in (("1b-2c", "GPU-1b-2c"), ("GPU-1b", "GPU-1b"), (None, "")):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid)
        )
        assert gpu_uuid(torch.device("cuda", 1)) == told
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert gpu_uuid(torch.device("cuda", 0)) == "", "an older torch does not tell"
