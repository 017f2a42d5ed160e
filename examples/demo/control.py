"""The control: the same federated run with the head alone, so that what the adapters add can be told.

Same devices, data, rounds, steps, batches, updates and merge; depth 0, so that the trainer computes every
row's features once. In this process and without a transport: nothing here is about the network.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from aggregator.evaluation import setup_of
from aggregator.merging.base import Contribution
from aggregator.merging.streaming import merge_adapter
from aggregator.methods.base import find_method
from edge_sdk.config.run import RunConfig
from edge_sdk.data.base_files import find_base, fingerprint_of
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.protocol.trainer import (
    DataSource,
    Describe,
    Described,
    Evaluate,
    Evaluated,
    Setup,
    Train,
    Trained,
)
from edge_sdk.training.inline import InlineTrainer
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.versions import write_version
from examples.demo.asking import Asker

__all__ = ["RATES", "HeadOnly", "head_only"]

RATES = (5e-3, 1e-2, 2e-2)


@dataclass(frozen=True)
class HeadOnly:
    """Held-out accuracy of the head alone, by learning rate."""

    by_rate: Mapping[float, float]

    @property
    def best_rate(self) -> float:
        return max(self.by_rate, key=lambda rate: self.by_rate[rate])

    @property
    def accuracy(self) -> float:
        return self.by_rate[self.best_rate]


def head_only(
    config: RunConfig,
    data: Mapping[str, Path],
    folder: Path,
    *,
    rounds: int,
    rates: Sequence[float] = RATES,
    threads: int = 0,
    report: Callable[[float, float], None] | None = None,
) -> HeadOnly:
    """Runs the control for every rate.

    Args:
        config: of the run that it is the control of; its evaluation data tells the accuracy.
        data: rows of every device, by the device's id.
        folder: for versions and updates; removed at the end.
        report: called with each rate and its accuracy.
    """
    run = _Control(config, data, folder, threads)
    try:
        by_rate = {}
        gc.freeze()  # every request collects garbage before it measures memory; none of this is any
        for rate in rates:
            by_rate[rate] = run.accuracy(rate, rounds)
            if report is not None:
                report(rate, by_rate[rate])
        return HeadOnly(by_rate)
    finally:
        gc.unfreeze()
        run.close()


class _Control:
    """One trainer plays all devices; it keeps the features of their rows across rounds and rates."""

    def __init__(self, config: RunConfig, data: Mapping[str, Path], folder: Path, threads: int) -> None:
        self._config, self._folder = config, folder
        self._method = find_method(config.run.method)
        self._spec = self._method.spec(config)
        base = find_base(config.base.path)
        setup = setup_of(config, self._spec, str(base))
        self._evaluation = msgspec.structs.replace(setup, threads=threads)
        self._setups = {
            device: msgspec.structs.replace(self._evaluation, data=DataSource(path=str(path)))
            for device, path in sorted(data.items())
        }
        self._fingerprint = fingerprint_of(
            base,
            labels=config.run.labels,
            task=config.run.task,
            max_length=config.training.max_length,
            template=config.run.row_template,
            lora=setup.lora,
            cache=None,
        ).digest
        self._trainer = Asker(InlineTrainer(threaded=False))
        described = self._trainer.ask(lambda id: Describe(id=id, setup=self._evaluation), Described)
        self._initial = initial_adapter(described.shape, setup.lora, config.run.seed)

    def close(self) -> None:
        self._trainer.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def accuracy(self, rate: float, rounds: int) -> float:
        folder = self._folder / f"rate-{rate:g}"
        folder.mkdir(parents=True)
        spec = msgspec.structs.replace(self._spec, head_learning_rate=rate)
        adapter, version = self._write(folder, 0, self._initial)
        residuals: dict[str, str | None] = {}
        for number in range(1, rounds + 1):
            contributions = []
            for device, setup in self._setups.items():
                trained = self._train(folder, device, setup, spec, number, version, residuals.get(device))
                residuals[device] = trained.residual
                contributions.append(Contribution(Path(trained.update), device, trained.samples))
            adapter, version = self._write(
                folder, number, merge_adapter(self._method.merge, adapter, contributions)
            )
        versions = (str(version),)
        evaluated = self._trainer.ask(
            lambda id: Evaluate(id=id, setup=self._evaluation, versions=versions), Evaluated
        )
        return evaluated.accuracy

    def _write(self, folder: Path, number: int, adapter: dict) -> tuple[dict, Path]:  # type: ignore[type-arg]
        path = folder / f"version-{number}"
        decoded = write_version(
            path,
            run=self._config.run.name,
            round=number,
            number=number,
            fingerprint=self._fingerprint,
            adapter=adapter,
        )
        return decoded, path

    def _train(
        self,
        folder: Path,
        device: str,
        setup: Setup,
        spec: TrainSpec,
        number: int,
        version: Path,
        residual: str | None,
    ) -> Trained:
        training, out = self._config.training, folder / f"{device}-{number}"
        out.mkdir()
        candidate = Candidate(
            id="head-only",
            depth=0,
            codec=self._method.codec,
            micro_batch=training.batch,
            steps=training.steps,
            max_length=training.max_length,
        )
        return self._trainer.ask(
            lambda id: Train(
                id=id,
                setup=setup,
                run=self._config.run.name,
                round=number,
                device=device,
                fingerprint=self._fingerprint,
                candidate=candidate,
                spec=spec,
                versions=(str(version),),
                residual=residual,
                folder=str(out),
            ),
            Trained,
        )
