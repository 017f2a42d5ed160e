"""Trains one arm after the other and tells how it does on the rows held out, example by example."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.processes import emit, say
from edge_sdk.protocol.model import LoraShape
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.protocol.trainer import DataSource
from edge_sdk.training.loop import StepDone, train
from edge_sdk.training.model import load_model
from edge_sdk.training.precision.holding import base_precision
from edge_sdk.training.randomness import batch_rows, torch_generator
from edge_sdk.training.tasks.finding import task_of
from edge_sdk.training.tasks.tokens import load_tokenizer
from edge_sdk.updates.initial import initial_adapter

__all__ = ["held_out", "run"]

_TOLD = 50
"""Steps between two signs of life."""


def run(wanted: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    for one in wanted["trainings"]:
        begun = time.perf_counter()
        row = _train(wanted, **one)
        emit(**one, **row, seconds=round(time.perf_counter() - begun, 1))


def _train(wanted: dict[str, Any], task: str, arm: dict[str, Any], seed: int) -> dict[str, Any]:
    config, data = wanted["config"], wanted["data"][task]
    base, labels, device = Path(wanted["base"]), tuple(data["labels"]), torch.device("cpu")
    lora = LoraShape(rank=config["rank"], alpha=config["alpha"])
    word = arm.get("base", "fp32")
    model = load_model(base, labels, lora, device, precision=base_precision(word, device))
    model.set_adapter(initial_adapter(model.shape, lora, seed))
    classification = task_of("classification")
    tokenizer = load_tokenizer(base)

    def rows(name: str) -> Any:
        return classification.rows(
            DataSource(path=Path(data[name])), labels, tokenizer=tokenizer, template="{text}",
            max_length=config["max_length"], check=lambda: None,
        )  # fmt: skip

    training = rows("train")

    def batches() -> Iterator[Any]:
        for order in batch_rows(len(training), config["batch"], seed=seed, round=0, device="benchmark"):
            yield classification.batch(training, torch.from_numpy(order), device)

    def told(step: StepDone) -> None:
        if step.number % _TOLD == 0:
            say(f"{task}, {arm['name']}, seed {seed}: step {step.number}, loss {step.loss:.3f}")

    layers = model.shape.layers
    candidate = Candidate(
        id="benchmark", depth=layers, quantized_layers=layers if "bits" in arm else 0,
        activation_bits=arm.get("bits", 8), recompute=arm.get("recompute", "none"), base_precision=word,
        micro_batch=config["batch"], steps=config["steps"], max_length=config["max_length"],
    )  # fmt: skip
    spec = TrainSpec(
        seed=seed, warmup_steps=config["warmup_steps"], schedule="linear", **config["tasks"][task]
    )
    trace = train(
        model, batches(), candidate, spec, task=classification, check=lambda: None, report=told,
        generator=torch_generator(seed, 0, "benchmark", "activations"),
    )  # fmt: skip
    right, loss = held_out(model, classification, rows("held_out"), device)
    last = trace.losses[-20:]
    return {
        "accuracy": sum(right) / len(right), "loss": loss, "train_loss": sum(last) / len(last),
        "right": "".join(map(str, right)),
    }  # fmt: skip


def held_out(model: Any, task: Any, rows: Any, device: Any) -> tuple[list[int], float]:
    """1 for each row that is classified rightly, else 0, in the rows' order; the mean loss."""
    right, loss = [], 0.0
    with torch.inference_mode():
        for chosen in torch.arange(len(rows)).split(64):
            ids, mask, labels = task.batch(rows, chosen, device)
            logits = model.logits(ids, mask).float()
            right += (logits.argmax(1) == labels).int().tolist()
            loss += float(cross_entropy(logits, labels, reduction="sum"))
    return right, loss / len(rows)
