"""A causal LM through the engine: what it learns, how well it is said to do, and what is exported."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from causal_base import make_llama, write_prompts

from edge_sdk.protocol.model import Fingerprint, LoraShape, ModelShape
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.protocol.trainer import (
    DataSource,
    Describe,
    Described,
    Evaluate,
    Evaluated,
    Export,
    Exported,
    Failed,
    Progress,
    Setup,
    Train,
    Trained,
    TrainerReply,
    TrainerRequest,
)
from edge_sdk.training.inline import InlineTrainer
from edge_sdk.training.resident import Resident
from edge_sdk.updates.container import read_container
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import Adapter, tuned_keys
from edge_sdk.updates.versions import read_adapter, write_version

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's
]
LORA = LoraShape(rank=4, alpha=8.0)
PRINT = "0" * 64
ROWS = 48


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


class Bench:
    def __init__(self, base: Path) -> None:
        self.base = base
        self.replies: list[TrainerReply] = []
        self.trainer = InlineTrainer(threaded=False)
        self.trainer.start(self.replies.append)
        self.shape: ModelShape | None = None

    def within(self, folder: Path) -> Bench:
        """With files of its own; the model stays."""
        self.folder = folder
        rows = write_prompts(folder / "rows.jsonl", ROWS)
        self.setup = Setup(
            base=str(self.base), task="causal-lm", labels=(), template="{prompt}\n{response}", max_length=16,
            micro_batch=8, lora=LORA, threads=1, data=DataSource(path=str(rows)),
            spec=TrainSpec(learning_rate=2e-2, error_feedback=False),
        )  # fmt: skip
        return self

    def ask(self, request: TrainerRequest) -> Any:
        self.replies.clear()
        self.trainer.request(request)
        *progress, last = self.replies
        assert all(isinstance(reply, Progress) for reply in progress)
        msgspec.json.encode(last)
        return last

    def describe(self, **changes: Any) -> Any:
        return self.ask(Describe(id=1, setup=msgspec.structs.replace(self.setup, **changes)))

    @property
    def resident(self) -> Resident:
        resident = self.trainer._engine._resident  # type: ignore[union-attr]
        assert resident is not None
        return resident

    def version(self, number: int = 0, adapter: Adapter | None = None) -> Path:
        if self.shape is None:
            self.shape = self.describe().shape
        path = self.folder / f"v{number}.safetensors"
        adapter = initial_adapter(self.shape, LORA, seed=2) if adapter is None else adapter
        write_version(path, run="r", round=0, number=number, fingerprint=PRINT, adapter=adapter, codec="fp32")
        return path

    def train(self, name: str = "out", spec: TrainSpec | None = None, **candidate: Any) -> Any:
        fields = {"id": "c", "depth": 3, "micro_batch": 8, "max_length": 16, "steps": 25, "codec": "fp32"}
        return self.ask(
            Train(
                id=2, setup=self.setup, run="r", round=1, device="d1", fingerprint=PRINT,
                candidate=Candidate(**{**fields, **candidate}), spec=spec or self.setup.spec,
                versions=(str(self.version()),), folder=str(self.folder / name),
            )
        )  # fmt: skip

    def trained(self, reply: Trained) -> Adapter:
        adapter = read_adapter([self.version()])
        with read_container(Path(reply.update)) as update:
            for key in update.parts:
                adapter[key] = adapter[key] + update.tensor(key)
        return adapter

    def evaluate(self, path: Path) -> Any:
        return self.ask(Evaluate(id=3, setup=self.setup, versions=(str(path),)))


@pytest.fixture(scope="module")
def loaded(base: Path) -> Iterator[Bench]:
    bench = Bench(base)
    yield bench
    bench.trainer.close()


@pytest.fixture
def bench(loaded: Bench, tmp_path: Path) -> Bench:
    return loaded.within(tmp_path)


def test_nothing_but_lora_is_trained(bench: Bench) -> None:
    reply = bench.describe()
    assert isinstance(reply, Described), reply
    assert reply.shape.dense == () and reply.shape.layers == 3 and reply.label_counts == ()
    assert (reply.samples, reply.dropped) == (ROWS, 0)
    trained = bench.train(depth=2, steps=2)
    assert isinstance(trained, Trained), trained
    with read_container(Path(trained.update), "update") as update:
        assert set(update.parts) == set(tuned_keys(reply.shape, 2))
        assert all(np.abs(update.tensor(key)).max() > 0 for key in update.parts)


def test_loss_and_gradients_are_those_of_transformers(bench: Bench) -> None:
    bench.version()
    resident, model = bench.resident, bench.resident.model
    model.set_adapter({key: value + 0.01 for key, value in read_adapter([bench.version()]).items()})
    batch = resident.task.batch(resident.rows(bench.setup), torch.arange(8), "cpu")
    ids, mask, following = batch
    labels = torch.cat([torch.full((8, 1), -100), following[:, :-1]], 1)
    found = []
    for compute in (
        lambda: resident.task.loss(model, batch),
        lambda: model.net(input_ids=ids, attention_mask=mask, labels=labels).loss,
    ):
        model.tune(3)
        loss = compute()
        loss.backward()
        found.append((loss.item(), torch.cat([t.grad.flatten() for t in model.trained().values()])))
    model.tune(0)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert (found[0][1] - found[1][1]).norm() / found[1][1].norm() < 1e-5


def test_it_learns_and_says_how_well(bench: Bench) -> None:
    before = bench.evaluate(bench.version())
    reply = bench.train(quantized_layers=2)
    assert reply.measured.loss_first == pytest.approx(before.loss, rel=0.3)
    after = bench.evaluate(bench.version(1, bench.trained(reply)))
    assert isinstance(before, Evaluated) and isinstance(after, Evaluated)
    for told in (before, after):
        assert told.perplexity == pytest.approx(math.exp(told.loss)) and told.f1 is None
        assert (told.examples, told.tokens) == (ROWS, ROWS * 7)  # "the cat and the red ." and its end
    assert before.perplexity > 15 and after.perplexity < 3
    assert before.accuracy < 0.3 and after.accuracy > 0.6


def test_a_step_of_several_batches_is_that_of_one(bench: Bench) -> None:
    """Also where rows have unequal numbers of tokens to learn: the mean is over all tokens."""
    path = Path(bench.setup.data.path)  # type: ignore[union-attr]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["response"] = " ".join(row["response"].split()[: 1 + i % 6])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = TrainSpec(learning_rate=0.1, optimizer="sgd", error_feedback=False)
    one, three = (
        bench.trained(bench.train(f"b{size}", spec, micro_batch=size, accumulation=12 // size, steps=2))
        for size in (12, 4)
    )
    start = read_adapter([bench.version()])
    for key in one:
        assert np.abs(one[key] - three[key]).max() <= 1e-4 * np.abs(one[key] - start[key]).max() + 1e-7


def test_there_is_no_head_to_train_alone(bench: Bench) -> None:
    reply = bench.train(depth=0)
    assert isinstance(reply, Failed) and reply.cause == "mechanism" and "depth 0" in reply.message


@pytest.mark.parametrize(
    ("changes", "cause", "told"),
    [
        ({"task": "ranking"}, "mechanism", "'ranking'"),
        ({"max_length": 4}, "data", "of 48 rows none has a token to learn within 4"),
    ],
)
def test_what_cannot_be_is_told(bench: Bench, changes: dict[str, Any], cause: str, told: str) -> None:
    reply = bench.describe(**changes)
    assert isinstance(reply, Failed) and (reply.cause, told in reply.message) == (cause, True), reply


def test_rows_of_any_kind_and_format(bench: Bench) -> None:
    chat = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red ."}]
    (bench.folder / "chats.jsonl").write_text(json.dumps({"messages": chat, "text": "no"}) + "\n")
    (bench.folder / "texts.csv").write_text("text\na red cat\nthe dog\n")
    for name, samples in (("chats.jsonl", 1), ("texts.csv", 2)):
        reply = bench.describe(data=DataSource(path=str(bench.folder / name)))
        assert isinstance(reply, Described) and reply.samples == samples
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"chat": [chat, chat, chat], "n": [1, 2, 3]})
    parquet.write_table(table, bench.folder / "rows.parquet")
    data = DataSource(path=str(bench.folder / "rows.parquet"), messages="chat")
    reply = bench.describe(data=data)
    assert isinstance(reply, Described) and reply.samples == 3


def test_peft_loads_the_export_as_a_causal_lm(bench: Bench, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = bench.version(1, bench.trained(bench.train(steps=8)))
    described = bench.describe()
    reply = bench.ask(
        Export(
            id=6, base=str(base), task="causal-lm", labels=(), lora=LORA, shape=described.shape,
            versions=(str(path),), folder=str(bench.folder / "adapter"), fingerprint=_fingerprint(),
        )
    )  # fmt: skip
    assert isinstance(reply, Exported), reply
    folder = Path(reply.folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["modules_to_save"] is None
    assert (
        not (folder / "labels.json").exists() and "AutoModelForCausalLM" in (folder / "README.md").read_text()
    )
    bench.evaluate(path)  # leaves the version in the model
    batch = bench.resident.task.batch(bench.resident.rows(bench.setup), torch.arange(8), "cpu")
    ids, mask, _ = batch
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        live = bench.resident.model.net(input_ids=ids, attention_mask=mask).logits
        theirs = loaded(input_ids=ids, attention_mask=mask).logits
        plain = loaded.get_base_model().eval()
        with loaded.disable_adapter():
            moved = plain(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(theirs, live, atol=1e-4) and not torch.allclose(moved, live, atol=1e-1)


def _fingerprint() -> Fingerprint:
    return Fingerprint(
        base=PRINT, tokenizer=PRINT, labels=PRINT, head="causal-lm:0", max_length=16, template=PRINT,
        targets=("all-linear",), rank=4, alpha=8.0,
    )  # fmt: skip
