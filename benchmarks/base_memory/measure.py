"""The measuring process of one arm: imports, then loading and training; the peak of it all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from benchmarks.models import randomize_adapter
from benchmarks.processes import emit, say
from edge_sdk.protocol.model import LoraShape
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.training.activations import blocks as _blocks
from edge_sdk.training.allocator import allocator_word
from edge_sdk.training.loop import train
from edge_sdk.training.memory import Meter
from edge_sdk.training.model import load_model
from edge_sdk.training.model.building import read_config
from edge_sdk.training.precision.holding import base_precision, told
from edge_sdk.training.randomness import torch_generator
from edge_sdk.training.tasks.finding import task_of

__all__ = ["run"]


class _WholeLogits:
    """The task's loss as transformers computes it: all logits at once, in fp32."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, model: Any, batch: Any, count: int | None = None) -> Any:
        ids, mask, targets = batch
        logits = model.net(input_ids=ids, attention_mask=mask).logits.float()
        total = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return total / (count or self._task.count(batch))


def run(wanted: dict[str, Any]) -> None:
    if wanted["threads"]:
        torch.set_num_threads(wanted["threads"])
    arm, device, folder = wanted["arm"], torch.device("cpu"), Path(wanted["folder"])
    _imports(folder, wanted)
    meter = Meter(device)
    begun = time.perf_counter()
    precision = base_precision(arm["base"], device)
    model = load_model(
        folder, (), LoraShape(rank=wanted["rank"], alpha=2.0 * wanted["rank"]), device,
        task="causal-lm", precision=precision,
    )  # fmt: skip
    randomize_adapter(model.parts)
    load_s, load_mb = time.perf_counter() - begun, meter.peak_mb()
    say(f"{arm['name']} at {wanted['length']}: loaded in {load_s:.0f} s, peak {load_mb:.0f} MB")
    candidate = Candidate(
        id=arm["name"].replace(" ", "-"), depth=model.shape.layers,
        quantized_layers=model.shape.layers if arm["bits"] else 0, activation_bits=arm["bits"] or 8,
        recompute=arm["recompute"], base_precision=arm["base"],
        micro_batch=wanted["batch"], steps=wanted["steps"], max_length=wanted["length"],
    )  # fmt: skip
    task = task_of("causal-lm")
    trace = train(
        model, _batches(model.shape.vocabulary, wanted), candidate,
        TrainSpec(optimizer=arm["optimizer"], learning_rate=1e-4),
        task=_WholeLogits(task) if arm["logits"] else task,
        check=lambda: None, report=lambda _: None,
        generator=torch_generator(wanted["seed"], 0, "benchmark", "activations"),
    )  # fmt: skip
    emit(
        what="peak", arm=arm["name"], length=wanted["length"], peak_mb=round(meter.peak_mb(), 1),
        load_peak_mb=round(load_mb, 1), base_mb=round(model.shape.base_bytes / 1e6, 1),
        load_s=round(load_s, 1), step_s=round(trace.step_s[-1], 2), losses=trace.losses,
        computed=False, base=told(arm["base"], device), threads=torch.get_num_threads(),
        allocator=allocator_word(),
    )  # fmt: skip
    say(f"{arm['name']} at {wanted['length']}: {meter.peak_mb():.0f} MB, step {trace.step_s[-1]:.1f} s")


def _imports(folder: Path, wanted: dict[str, Any]) -> None:
    """What is imported late comes before the measurement, as the rest: transformers imports by name."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder, (), "causal-lm")
    AutoModelForCausalLM._model_mapping[type(config)]
    base_precision(wanted["arm"]["base"], "cpu")  # tries its kernels out
    assert _blocks is not None


def _batches(vocabulary: int, wanted: dict[str, Any]) -> Iterator[Any]:
    """Random tokens; each is to be predicted from those before it. The first step has few of them: it is
    there for the optimizer's state."""
    draw = torch.Generator().manual_seed(wanted["seed"])
    for step in itertools.count():
        length = wanted["length"] if step else wanted["warm_length"]
        ids = torch.randint(10, vocabulary, (wanted["batch"], length), generator=draw)
        yield ids, torch.ones_like(ids), pad(ids[:, 1:], (0, 1), value=-100)
