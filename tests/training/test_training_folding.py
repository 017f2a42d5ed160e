"""Stacking on the real trainer: what devices learned moves into the base, and every round has fresh slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from test_training_engine import LABELS, LORA, Bench, bench  # noqa: E402, F401

from aggregator.adapters import Adapters  # noqa: E402
from aggregator.merging.stacking import Stacking  # noqa: E402
from aggregator.state.base import ParticipationRow, VersionRow  # noqa: E402
from edge_sdk.protocol.model import Fingerprint  # noqa: E402
from edge_sdk.protocol.trainer import Evaluate, Evaluated, Failed, Trained  # noqa: E402
from edge_sdk.protocol.wire import Run  # noqa: E402
from edge_sdk.training.model import TunableModel, load_model  # noqa: E402
from edge_sdk.transport.objects import ObjectStore  # noqa: E402
from edge_sdk.updates.container import read_container  # noqa: E402
from edge_sdk.updates.versions import read_adapter  # noqa: E402

DEPTH = 2
SAMPLES = {"one": 30, "two": 10}


class Stacked:
    """A server that stacks, and devices that share one real trainer."""

    def __init__(self, trainer: Bench, folder: Path) -> None:
        self.bench = trainer
        self.spec = replace(trainer.setup.spec, reinit="each-round", fold="low-rank", error_feedback=False)
        digest = "0" * 64
        self.run = Run(
            run="r", nonce="n", base="base", labels=LABELS, max_length=12, micro_batch=8, lora=LORA,
            spec=self.spec, shape=trainer.describe().shape,
            fingerprint=Fingerprint(
                base=digest, tokenizer=digest, labels=digest, head="h", max_length=12, template=digest,
                targets=("all-linear",), rank=LORA.rank, alpha=LORA.alpha,
            ),
        )  # fmt: skip
        (folder / "work").mkdir()
        self.objects = ObjectStore(folder / "objects")
        self.adapters = Adapters(self.run, Stacking(), self.objects, folder / "work", 0)
        self.versions = [self.row(0, self.adapters.initial())]
        self.learned: dict[str, Any] = {}
        """By linear, what all rounds so far have added to its weight, dense."""

    def row(self, number: int, made: Any) -> VersionRow:
        assert made.parent is None, "a version that folds is a full one"
        return VersionRow("r", number, number, made.object, made.bytes, None, "global", 0.0)

    def path(self, number: int = -1) -> str:
        return str(self.objects.path(self.versions[number].object))

    def train(self, device: str) -> Trained:
        reply = self.bench.train(
            name=f"{device}{len(self.versions)}", device=device, round=len(self.versions), spec=self.spec,
            fingerprint=self.run.fingerprint.digest, versions=(self.path(),),
            candidate={"depth": DEPTH, "codec": "fp32"},
        )  # fmt: skip
        assert isinstance(reply, Trained) and reply.residual is None, reply
        return reply

    def round(self) -> None:
        """Both devices train from the newest version, and the next one is made of it."""
        start, number, rows = read_adapter([Path(self.path())]), len(self.versions), []
        for device, samples in SAMPLES.items():
            path = Path(self.train(device).update)
            with read_container(path) as update:
                keys = {key.rpartition(".")[0] for key in update.parts if not key.startswith("dense.")}
                for key in keys:
                    a, b = (start[f"{key}.{f}"] + update.tensor(f"{key}.{f}") for f in "AB")
                    change = samples / sum(SAMPLES.values()) * LORA.scaling * b.T @ a
                    self.learned[key] = self.learned.get(key, 0.0) + change
            digest, _ = self.objects.adopt(path)
            rows.append(
                ParticipationRow("r", number, device, "received", "", 0.0, object=digest, samples=samples)
            )
        self.versions.append(self.row(number, self.adapters.merged(number, number, self.versions[-1:], rows)))

    @property
    def model(self) -> TunableModel:
        engine = self.bench.trainer._engine
        assert engine is not None and engine._resident is not None
        return engine._resident.model

    def weights(self) -> dict[str, Any]:
        return {key: linear.frozen.weight.detach().clone() for key, linear in self.model.linears.items()}


@pytest.fixture
def stacked(bench: Bench, tmp_path: Path) -> Stacked:  # noqa: F811
    return Stacked(bench, tmp_path)


def check(stacked: Stacked, base: dict[str, Any]) -> None:
    """W + s sum of w_i B_i A_i, as far as a version's 16 bits go."""
    bottom = stacked.run.shape.layers - DEPTH
    for key, weight in stacked.weights().items():
        if int(key.split(".")[0]) < bottom:
            assert torch.equal(weight, base[key]), "nobody trained it"
            continue
        learned = stacked.learned[key]
        largest = float(np.abs(learned).max())
        assert largest > 1e-3
        np.testing.assert_allclose((weight - base[key]).numpy(), learned, atol=2e-3 * largest)


def test_what_was_learned_is_in_the_weights_and_the_slots_begin_anew(
    stacked: Stacked, tiny: dict[str, Path]
) -> None:
    plain = load_model(tiny["bert"], LABELS, LORA, "cpu")
    base = {key: linear.frozen.weight.detach().clone() for key, linear in plain.linears.items()}
    stacked.round()
    first = read_adapter([Path(stacked.path(1))])
    before = read_adapter([Path(stacked.path(0))])
    for key in stacked.learned:
        assert not first[f"{key}.B"].any() and not np.array_equal(first[f"{key}.A"], before[f"{key}.A"])
    stacked.train("three")
    check(stacked, base)

    stacked.round()
    stacked.train("three")
    check(stacked, base)
    went_on = stacked.weights()

    stacked.bench.trainer.unload()
    stacked.train("three")
    anew = stacked.weights()
    assert all(torch.equal(went_on[key], anew[key]) for key in base), "it follows from the version alone"
    stacked.versions = stacked.versions[:1]
    stacked.train("three")
    assert all(torch.equal(weight, base[key]) for key, weight in stacked.weights().items())


def test_a_version_with_folds_is_evaluated_as_what_the_devices_learned(stacked: Stacked) -> None:
    def evaluated(number: int) -> Evaluated:
        setup = replace(stacked.bench.setup, spec=stacked.spec)
        reply = stacked.bench.ask(Evaluate(id=9, setup=setup, versions=(stacked.path(number),)))
        assert isinstance(reply, Evaluated), reply
        return reply

    for _ in range(3):
        stacked.round()
    losses = [evaluated(number).loss for number in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert evaluated(0).loss == losses[0] and evaluated(3).loss == losses[3], "and back"


def test_nothing_is_folded_into_a_quantized_base(stacked: Stacked) -> None:
    stacked.round()
    setup = replace(stacked.bench.setup, base_precision="int8")
    reply = stacked.bench.train(
        setup=setup, spec=stacked.spec, fingerprint=stacked.run.fingerprint.digest,
        versions=(stacked.path(),), candidate={"base_precision": "int8"},
    )  # fmt: skip
    assert isinstance(reply, Failed) and reply.cause == "mechanism"
    assert "held in int8: quantizing the sum anew would round" in reply.message
    reply = stacked.bench.ask(Evaluate(id=9, setup=setup, versions=(stacked.path(),)))
    assert isinstance(reply, Failed) and "folded into a base held in int8" in reply.message
