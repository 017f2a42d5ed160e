"""Federated runs, one after the other: a real trainer process under each device's limit, the server's merge.

One trainer plays all devices of a run, each under that device's ``memory_mb``, which the trainer enforces.
What lies between devices and server is left out: no transport, no deadline; memory alone decides.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from aggregator.evaluation import setup_of
from aggregator.merging.base import Contribution
from aggregator.merging.streaming import merge_adapter
from aggregator.methods.base import find_method
from benchmarks.activation_accuracy.training import held_out
from benchmarks.processes import emit, say
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.config.run import LoraSection, RunBaseSection, RunConfig, RunSection, TrainingSection
from edge_sdk.errors import TrainerError
from edge_sdk.planning.choice import Budgets, Infeasible, choose, step_down
from edge_sdk.planning.cost import peak_mb
from edge_sdk.protocol.spec import Candidate
from edge_sdk.protocol.trainer import DataSource, Describe, Described, Probe, Probed, Setup, Train, Trained
from edge_sdk.training.model import load_model
from edge_sdk.training.tasks.finding import task_of
from edge_sdk.training.tasks.tokens import load_tokenizer
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.versions import write_version
from examples.demo.asking import Asker

__all__ = ["run"]

FINGERPRINT = "0" * 64
METHOD = find_method("fedquad")


def run(wanted: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="edge-depth-") as folder:
        fleet = _Fleet(wanted, Path(folder))
        try:
            for one in wanted["runs"]:
                began = time.perf_counter()
                emit(**one, **fleet.play(**one), seconds=round(time.perf_counter() - began, 1))
        finally:
            fleet.close()


@dataclass
class _Device:
    name: str
    setup: Setup
    budgets: Budgets
    candidates: list[Candidate]
    chosen: Candidate
    residual: str | None = None
    peaks_mb: list[float] = field(default_factory=list)
    downs: int = 0


class _Fleet:
    """A trainer process for the devices, and a model in this process that tells how well a version does."""

    def __init__(self, wanted: dict[str, Any], folder: Path) -> None:
        self._given, self._folder, self._base = wanted["config"], folder, Path(wanted["base"])
        self._data, self._labels = wanted["data"], tuple(wanted["data"]["labels"])
        config = self._config(seed=0)
        self._setup = replace(setup_of(config, METHOD.spec(config), str(self._base)), device="cpu", threads=1)
        self._trainer = Asker(ProcessTrainer(folder / "trainer"))
        setups = [replace(self._setup, data=DataSource(path=path)) for path in self._data["devices"]]
        probe = Probe(id=0, setup=setups[0], levers=METHOD.levers)
        self._fit = self._trainer.ask(lambda id: replace(probe, id=id), Probed).fit
        # last, and of all: the one trainer holds the rows of every device
        for setup in setups:
            self._described = self._trainer.ask(
                lambda id, setup=setup: Describe(id=id, setup=setup), Described
            )
        self._model = load_model(self._base, self._labels, self._setup.lora, torch.device("cpu"))
        self._rows = task_of("classification").rows(
            DataSource(path=self._data["held_out"]), self._labels, tokenizer=load_tokenizer(self._base),
            template="{text}", max_length=self._given["max_length"], check=lambda: None,
        )  # fmt: skip

    def close(self) -> None:
        self._trainer.close()

    def play(self, arm: str, seed: int) -> dict[str, Any]:
        """All rounds of a run: what was chosen, what it took, and how every held-out row came out."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        devices = self._devices(arm)
        adapter, version = self._write(folder, 0, initial_adapter(self._shape, self._setup.lora, seed))
        for number in range(1, self._given["rounds"] + 1):
            updates = [self._train(folder, one, seed, number, version) for one in devices]
            merged = merge_adapter(METHOD.merge, adapter, updates)
            adapter, version = self._write(folder, number, merged)
            say(f"{arm}, seed {seed}: round {number} of {self._given['rounds']}")
        self._model.set_adapter(adapter)
        right, loss = held_out(self._model, task_of("classification"), self._rows, torch.device("cpu"))
        shutil.rmtree(folder)
        return {
            "accuracy": sum(right) / len(right), "loss": loss, "right": "".join(map(str, right)),
            "devices": {
                one.name: {
                    "depth": one.chosen.depth, "quantized": one.chosen.quantized_layers,
                    "limit_mb": one.setup.memory_mb, "budget_mb": one.budgets.memory_mb,
                    "predicted_mb": one.chosen.peak_mb, "peak_mb": max(one.peaks_mb), "step_downs": one.downs,
                }
                for one in devices
            },
        }  # fmt: skip

    @property
    def _shape(self) -> Any:
        return self._described.shape

    def _config(self, seed: int) -> RunConfig:
        given = self._given
        return RunConfig(
            run=RunSection(name="depth", method="fedquad", labels=self._labels, seed=seed),
            base=RunBaseSection(path=str(self._base)),
            lora=LoraSection(),
            training=TrainingSection(
                steps=given["steps"], batch=given["batch"], max_length=given["max_length"],
                learning_rate=given["learning_rate"], head_learning_rate=given["head_learning_rate"],
            ),
        )  # fmt: skip

    def _devices(self, arm: str) -> list[_Device]:
        """Limits and choices. ``one depth``: the deepest that every device can tune, nothing quantized."""
        grid = [
            self._candidate(depth, quantized)
            for depth in range(1, self._shape.layers + 1)
            for quantized in range(depth + 1)
        ]
        deepest = next(c for c in grid if c.depth == self._shape.layers and not c.quantized_layers)
        whole = peak_mb(self._fit, self._shape, self._setup.lora, deepest.setting(self._setup.spec))
        plain = [one for one in grid if not one.quantized_layers]
        found = []
        for (name, share), data in zip(
            self._given["devices"].items(), self._data["devices"], strict=True
        ):  # fmt: skip
            budgets = Budgets(memory_mb=share * whole)
            setup = replace(
                self._setup,
                data=DataSource(path=data),
                memory_mb=self._described.rest_mb + share * whole,
            )
            candidates = grid if arm == "chosen" else plain
            found.append(_Device(name, setup, budgets, candidates, self._choose(candidates, budgets)))
        if arm != "chosen":
            depth = min(one.chosen.depth for one in found)
            for one in found:
                one.candidates = [c for c in plain if c.depth <= depth]
                one.chosen = self._choose(one.candidates, one.budgets)
        return found

    def _candidate(self, depth: int, quantized: int) -> Candidate:
        levers, given = METHOD.levers, self._given
        return Candidate(
            id=f"d{depth}a{quantized}", depth=depth, quantized_layers=quantized, gain=depth,
            activation_bits=levers.activation_bits, recompute=levers.recompute, codec=METHOD.codec,
            micro_batch=given["batch"], steps=given["steps"], max_length=given["max_length"],
        )  # fmt: skip

    def _choose(self, candidates: list[Candidate], budgets: Budgets) -> Candidate:
        found = choose(
            candidates, fit=self._fit, budgets=budgets, shape=self._shape, lora=self._setup.lora,
            spec=self._setup.spec, down_bytes=0,
        )  # fmt: skip
        if isinstance(found, Infeasible):
            raise RuntimeError(f"nothing fits in {budgets.memory_mb:.0f} MB above rest: {found.message}")
        return found.candidate

    def _write(self, folder: Path, number: int, adapter: Any) -> tuple[Any, Path]:
        path = folder / f"version-{number}"
        decoded = write_version(
            path, run="depth", round=number, number=number, fingerprint=FINGERPRINT, adapter=adapter
        )
        return decoded, path

    def _train(self, folder: Path, device: _Device, seed: int, number: int, version: Path) -> Contribution:
        spec = METHOD.spec(self._config(seed))
        while True:
            out = folder / f"{device.name}-{number}-{device.downs}"
            out.mkdir()
            try:
                trained = self._trainer.ask(
                    lambda id, out=out: Train(
                        id=id, setup=device.setup, run="depth", round=number, device=device.name,
                        fingerprint=FINGERPRINT, candidate=device.chosen, spec=spec, versions=(str(version),),
                        residual=device.residual, folder=str(out),
                    ),
                    Trained,
                )  # fmt: skip
                break
            except TrainerError as error:
                say(f"{device.name}: {error}")
                smaller = step_down(
                    device.candidates, device.chosen, fit=self._fit, budgets=device.budgets,
                    shape=self._shape, lora=self._setup.lora, spec=spec, down_bytes=0,
                )  # fmt: skip
                if smaller is None:
                    raise
                device.chosen, device.downs = smaller.candidate, device.downs + 1
        device.residual = trained.residual
        device.peaks_mb.append(trained.measured.peak_mb)
        return Contribution(Path(trained.update), device.name, trained.samples)
