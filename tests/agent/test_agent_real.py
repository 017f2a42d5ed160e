"""The real command, broker and trainer: a tiny model, one process killed, and how little the agent holds."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("torch")

from agent_fakes import FakeAggregator, a_candidate

from aggregator.broker.embedded import EmbeddedBroker
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.config.broker import BrokerConfig
from edge_sdk.data.base_files import find_base, fingerprint_of
from edge_sdk.protocol.model import LoraShape
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import Describe, Described, Died, Failed, Setup
from edge_sdk.protocol.wire import Choice, Run, Status, VersionRef
from edge_sdk.transport.mqtt import MqttTransport

pytestmark = [pytest.mark.train, pytest.mark.alone]
LORA = LoraShape(rank=2, alpha=4.0)
LABELS = ("colour", "number")
LENGTH, BATCH = 16, 4
IDLE_MB = 45.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "red", "green", "one", "two"]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    rows = [("red", 0), ("green", 0), ("one", 1), ("two", 1)] * 8
    lines = [json.dumps({"text": text, "label": LABELS[label]}) for text, label in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def described(base: Path, folder: Path) -> Described:
    """The base's shape, told by a trainer of the test's own."""
    replies: queue.Queue[Any] = queue.Queue()
    trainer = ProcessTrainer(folder)
    trainer.start(replies.put)
    setup = Setup(
        base=str(base), labels=LABELS, max_length=LENGTH, micro_batch=BATCH, lora=LORA, spec=TrainSpec(),
        device="cpu", threads=1,
    )  # fmt: skip
    trainer.request(Describe(id=1, setup=setup))
    while True:
        reply = replies.get(timeout=120)
        assert not isinstance(reply, Failed | Died), reply
        if isinstance(reply, Described):
            trainer.close()
            return reply


def first_version(run: Run, folder: Path) -> tuple[VersionRef, bytes]:
    from edge_sdk.updates.initial import initial_adapter
    from edge_sdk.updates.versions import write_version

    path = folder / "version"
    write_version(
        path, run=run.run, round=0, number=0, fingerprint=run.fingerprint.digest,
        adapter=initial_adapter(run.shape, run.lora, 0),
    )  # fmt: skip
    data = path.read_bytes()
    return VersionRef(number=0, object=hashlib.sha256(data).hexdigest(), bytes=len(data)), data


class Command:
    """``edge-agent run --json`` as a process, and what it says."""

    def __init__(self, config: Path) -> None:
        code = "from edge_sdk.cli.main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "run", "--json", "-c", str(config)],
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        self.events: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def got(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    @property
    def resident_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    @property
    def trainers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@pytest.fixture
def command(base: Path, tmp_path: Path, embedded_broker: EmbeddedBroker) -> Iterator[Command]:
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[agent]\nid = "one"\nidle_unload_s = 1\n[broker]\nurl = "{embedded_broker.url}"\n'
        f'namespace = "agent-real"\n[base]\npath = "{base}"\n[data]\npath = "{base}/rows.jsonl"\n'
        '[trainer]\ndevice = "cpu"\nthreads = 1\n[limits]\nmemory_mb = 3000\n'
    )
    one = Command(config)
    yield one
    one.process.kill()
    one.process.wait()
    if one.process.stdout is not None:
        one.process.stdout.close()


def test_a_round_with_a_killed_trainer(
    base: Path, tmp_path: Path, embedded_broker: EmbeddedBroker, command: Command
) -> None:
    known = described(base, tmp_path / "own")
    spec = TrainSpec()
    run = Run(
        run="demo", nonce="run-1", base="tiny", labels=LABELS, max_length=LENGTH, micro_batch=BATCH,
        lora=LORA, spec=spec, shape=known.shape,
        fingerprint=fingerprint_of(
            find_base(str(base)), labels=LABELS, task="classification", max_length=LENGTH, template="{text}",
            lora=LORA,
        ),
    )  # fmt: skip
    ref, data = first_version(run, tmp_path)
    broker = BrokerConfig(url=embedded_broker.url)
    aggregator = FakeAggregator(MqttTransport(broker, "aggregator"), namespace="agent-real")
    aggregator.objects[ref.object] = data
    aggregator.start()

    def until(done: Callable[[], Any], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            aggregator.pump()
            assert command.process.poll() is None, command.events
            assert time.monotonic() < deadline, command.events
            time.sleep(0.01)

    until(lambda: aggregator.transport.connected and command.got("connection.up"))
    assert command.resident_mb < IDLE_MB
    aggregator.hello(run)
    until(lambda: aggregator.got(Status))
    status = aggregator.got(Status)[-1]
    assert status.samples == 32 and status.fit.rest_mb > 50 and status.memory.limit_mb == 3000

    candidates = tuple(
        a_candidate(depth, micro_batch=BATCH, max_length=LENGTH, steps=200) for depth in (2, 1)
    )
    aggregator.offer(versions=(ref,), candidates=candidates, deadline_s=600.0)
    until(lambda: command.got("training.progress"))
    (trainer,) = command.trainers
    trainer.kill()
    until(lambda: command.got("update.receipt"))
    choices = aggregator.got(Choice)
    assert {one.candidate.depth for one in choices} == {2} and {one.attempt for one in choices} == {0}
    assert len(command.got("training.failed")) == 1 and len(command.got("training.start")) == 2
    (done,) = command.got("training.done")
    assert done["loss_last"] < 0.5

    until(lambda: not command.trainers)
    print(f"resident {command.resident_mb}")
    assert command.resident_mb < IDLE_MB
    command.process.terminate()
    assert command.process.wait(30) == 0
    aggregator.transport.stop()
