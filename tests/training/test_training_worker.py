"""The trainer process: its memory is limited and predicted, and it never outlives its host."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")
pytestmark = [pytest.mark.train, pytest.mark.alone]

from edge_sdk.device.allocators import Allocator, find_allocator  # noqa: E402
from edge_sdk.planning.cost import peak_mb  # noqa: E402
from edge_sdk.protocol.measure import Fit  # noqa: E402
from edge_sdk.protocol.model import Fingerprint, LoraShape, ModelShape  # noqa: E402
from edge_sdk.protocol.pipe import Unframer, frame  # noqa: E402
from edge_sdk.protocol.spec import Candidate, TrainSpec  # noqa: E402
from edge_sdk.protocol.trainer import (  # noqa: E402
    DataSource,
    Describe,
    Described,
    Export,
    Exported,
    Failed,
    Interrupt,
    Probe,
    Probed,
    Progress,
    Setup,
    Train,
    Trained,
    TrainerRequest,
    decode_reply,
)
from edge_sdk.updates.initial import initial_adapter  # noqa: E402
from edge_sdk.updates.versions import write_version  # noqa: E402

LABELS = ("colour", "number", "animal", "plant")
PRINT = "0" * 64
LONG = 20_000
"""Steps of a training that nobody waits for the end of; the trainer draws all their rows at its start."""


class Worker:
    """One end of the socket pair, and the process at the other."""

    def __init__(self, allocator: Allocator = Allocator("glibc")) -> None:  # noqa: B008
        self.ends_with = 0
        self.pair, other = socket.socketpair()
        self.pair.settimeout(120)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_sdk.training.worker", "--fd", str(other.fileno())],
                pass_fds=[other.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", **allocator.environment()},
            )
        self._unframer = Unframer()
        self._replies: list[Any] = []

    def send(self, request: TrainerRequest) -> None:
        self.pair.sendall(frame(msgspec.json.encode(request)))

    def reply(self) -> Any:
        while not self._replies:
            data = self.pair.recv(1 << 16)
            assert data, f"the trainer ended with {self.process.wait()}"
            self._replies += [decode_reply(message) for message in self._unframer.feed(data)]
        return self._replies.pop(0)

    def ask(self, request: TrainerRequest) -> Any:
        self.send(request)
        while isinstance(reply := self.reply(), Progress):
            pass
        return reply

    def close(self) -> None:
        self.pair.close()
        assert self.process.wait(20) == self.ends_with


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(find_allocator())
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def setup(minilm: Path, rows_file: Path) -> Setup:
    return Setup(
        base=str(minilm), labels=LABELS, max_length=32, micro_batch=16, lora=LoraShape(), spec=TrainSpec(),
        threads=1, data=DataSource(path=str(rows_file)),
    )  # fmt: skip


def _train(
    setup: Setup, shape: ModelShape, folder: Path, depth: int, quantized: int, steps: int = 3
) -> Train:
    version = folder / "v0.safetensors"
    if not version.exists():
        adapter = initial_adapter(shape, setup.lora, seed=1)
        write_version(version, run="r", round=0, number=0, fingerprint=PRINT, adapter=adapter)
    return Train(
        id=7, setup=setup, run="r", round=1, device="d", fingerprint=PRINT, spec=setup.spec,
        candidate=Candidate(
            id="c", depth=depth, quantized_layers=quantized, steps=steps, max_length=32, micro_batch=16
        ),
        versions=(str(version),), folder=str(folder / f"{depth}-{quantized}"),
    )  # fmt: skip


def test_the_fit_predicts_what_training_takes_and_the_store_really_saves(
    worker: Worker, setup: Setup, tmp_path: Path
) -> None:
    described = worker.ask(Describe(id=1, setup=setup))
    assert isinstance(described, Described), described
    probed = worker.ask(Probe(id=2, setup=setup))
    assert isinstance(probed, Probed), probed
    fit: Fit = probed.fit
    settings = [(2, 1), (3, 0), (5, 2), (6, 6), (6, 0)]
    random.Random(0).shuffle(settings)
    peaks = {}
    for depth, quantized in settings:
        asked = _train(setup, described.shape, tmp_path, depth, quantized)
        trained = worker.ask(asked)
        assert isinstance(trained, Trained), trained
        peaks[depth, quantized] = measured = trained.measured.peak_mb
        predicted = peak_mb(fit, described.shape, setup.lora, asked.candidate.setting(setup.spec))
        # what earlier rounds left of the heap tells on a peak
        assert abs(predicted - measured) <= max(8.0, 0.25 * measured), (depth, quantized, predicted, measured)
        assert abs(trained.measured.rest_mb - fit.rest_mb) < 8.0
    assert peaks[6, 6] < 0.75 * peaks[6, 0]


def test_a_limit_is_enforced_and_survived(worker: Worker, setup: Setup, tmp_path: Path) -> None:
    described = worker.ask(Describe(id=1, setup=setup))
    assert isinstance(described, Described), described
    limited = msgspec.structs.replace(setup, memory_mb=described.rest_mb + 45)
    deep = worker.ask(_train(limited, described.shape, tmp_path, 6, 0))
    assert isinstance(deep, Failed) and deep.cause == "memory", deep
    # it lives; below rest nothing is possible, and the message says what rest is
    none = worker.ask(Describe(id=4, setup=msgspec.structs.replace(setup, memory_mb=100.0)))
    assert isinstance(none, Failed) and none.cause == "memory"
    assert "at rest" in none.message and "may hold 100 in all" in none.message
    # without the limit everything runs again
    assert isinstance(worker.ask(_train(setup, described.shape, tmp_path, 6, 0)), Trained)


def test_what_fits_the_limit_is_trained(worker: Worker, setup: Setup, tmp_path: Path) -> None:
    described = worker.ask(Describe(id=1, setup=setup))
    assert isinstance(described, Described), described
    limited = msgspec.structs.replace(setup, memory_mb=described.rest_mb + 45)
    small = worker.ask(_train(limited, described.shape, tmp_path, 2, 2))
    assert isinstance(small, Trained), small
    assert small.measured.rest_mb + small.measured.peak_mb <= described.rest_mb + 45
    # a probe under the limit measures what fits, and nothing that does not
    probed = worker.ask(Probe(id=3, setup=limited))
    assert isinstance(probed, Probed), probed
    assert probed.fit.probes and all(p.peak_mb <= 45 for p in probed.fit.probes)
    assert len(probed.fit.probes) <= 5
    assert max(p.depth for p in probed.fit.probes) >= 2
    assert described.allocator in probed.fit.machine


def test_it_ends_with_its_host_in_the_middle_of_training(
    setup: Setup, tiny: dict[str, Path], tmp_path: Path
) -> None:
    worker = Worker()
    small = msgspec.structs.replace(setup, base=str(tiny["bert"]))
    described = worker.ask(Describe(id=1, setup=small))
    assert isinstance(described, Described), described
    worker.send(_train(small, described.shape, tmp_path, 3, 1, steps=LONG))
    while not (isinstance(reply := worker.reply(), Progress) and reply.stage == "training"):
        pass
    worker.process.send_signal(signal.SIGINT)  # Ctrl-C in the terminal: the host decides
    worker.send(Interrupt())
    while isinstance(reply := worker.reply(), Progress):
        pass
    assert isinstance(reply, Failed) and reply.cause == "interrupted"
    worker.send(_train(small, described.shape, tmp_path, 3, 1, steps=LONG))
    while not isinstance(worker.reply(), Progress):
        pass
    started = time.monotonic()
    worker.close()
    assert time.monotonic() - started < 10


def test_export_needs_no_torch(worker: Worker, tmp_path: Path) -> None:
    shape = ModelShape(
        family="bert", layers=1, hidden=4, intermediate=8, heads=1, vocabulary=9,
        layer_path="bert.encoder.layer", modules=(), dense=(), parameters=0, base_bytes=0,
    )  # fmt: skip
    from edge_sdk.protocol.model import DensePart, LoraModule

    shape = msgspec.structs.replace(
        shape,
        modules=(LoraModule(name="output.dense", inputs=8, outputs=4),),
        dense=(DensePart(name="classifier.weight", shape=(2, 4)),),
    )
    version = tmp_path / "v.safetensors"
    lora = LoraShape(rank=2)
    write_version(
        version, run="r", round=0, number=0, fingerprint=PRINT, adapter=initial_adapter(shape, lora, seed=0)
    )
    request = Export(
        id=1, base="b", labels=("x", "y"), lora=lora, shape=shape, versions=(str(version),),
        folder=str(tmp_path / "adapter"),
        fingerprint=Fingerprint(
            base=PRINT, tokenizer=PRINT, labels=PRINT, head="h", max_length=4, template=PRINT, targets=("t",),
            rank=2, alpha=4.0,
        ),
    )  # fmt: skip
    reply = worker.ask(request)
    assert isinstance(reply, Exported), reply
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
    assert "libtorch" not in maps


def test_an_unreadable_message_ends_it(worker: Worker) -> None:
    worker.ends_with = 1
    worker.pair.sendall(frame(b"{}"))
    assert worker.process.wait(20) == 1
