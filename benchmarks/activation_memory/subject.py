"""One model under measurement: the same batch, any arm, what it costs and what gradients it gives."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.activation_memory.arms import Arm
from benchmarks.models import randomize_adapter
from edge_sdk.protocol.model import LoraShape
from edge_sdk.training.activations.store import ActivationStore
from edge_sdk.training.memory import Meter
from edge_sdk.training.model import load_model
from edge_sdk.training.tasks.finding import task_of

__all__ = ["Cost", "Subject"]

LABELS = ("a", "b", "c", "d")


@dataclass
class Cost:
    """Of one visit of an arm. MB are 10^6 bytes above the resting model."""

    peak_mb: float
    step_s: float
    first_s: float
    loss: float


class Subject:
    """A model with LoRA in all linears of its layers, all of them tuned, and one batch of random tokens."""

    def __init__(self, folder: Path, *, task: str, batch: int, length: int, device: Any, seed: int) -> None:
        self.device = device
        self.task = task_of(task)
        labels = LABELS if task == "classification" else ()
        self.model = load_model(folder, labels, LoraShape(rank=8, alpha=16.0), device, task=task)
        randomize_adapter(self.model.parts, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, self.model.shape.vocabulary, (batch, length), generator=draw)
        self.batch = (
            ids.to(device),
            torch.ones_like(ids).to(device),
            torch.randint(0, len(LABELS), (batch,), generator=draw).to(device)
            if task == "classification"
            else torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).to(device),
        )

    @property
    def layers(self) -> list[Any]:
        return list(self.model.layers)

    def rows(self, count: int) -> None:
        """From now on no more than so many rows of the batch."""
        self.batch = tuple(part[:count] for part in self.batch)

    @contextmanager
    def under(self, arm: Arm, seed: int = 0) -> Iterator[dict[str, Any]]:
        """The model as ``arm`` trains it; what is trained, by key."""
        self.model.tune(self.model.shape.layers, factors=arm.factors)
        attention = self.model.net.config._attn_implementation
        try:
            if not arm.ours:  # torch's own, as everybody has it
                self.model.net.config._attn_implementation = "sdpa"
            with self._keeping(arm, seed):
                yield self.model.trained()
        finally:
            self.model.net.config._attn_implementation = attention
            self.clear()

    def _keeping(self, arm: Arm, seed: int) -> AbstractContextManager[Any]:
        if arm.every:
            return _checkpointed(self.layers, arm.every)
        if not arm.ours:
            return nullcontext()
        generator = torch.Generator(self.device).manual_seed(seed) if arm.stochastic else None
        store = ActivationStore(self.model.net.parameters(), generator=generator)
        return store.over(dict(zip(self.layers, arm.layer_plans(len(self.layers)), strict=True)))

    def loss(self, arm: Arm) -> Any:
        if self.task.name == "classification" or arm.chunked_loss:
            return self.task.loss(self.model, self.batch)
        ids, mask, targets = self.batch
        logits = self.model.net(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def visit(self, arm: Arm) -> Cost:
        """Two steps: peak of both; the second's time, when the allocator has found its balance."""
        with self.under(arm):
            meter = Meter(self.device)
            seconds = []
            for _ in range(2):
                self._wait()
                begun = time.perf_counter()
                loss = self.loss(arm)
                loss.backward()
                self._wait()
                seconds.append(time.perf_counter() - begun)
                value = loss.item()
                del loss
                self.clear()
            return Cost(meter.peak_mb(), seconds[1], seconds[0], value)

    def gradients(self, arm: Arm, seed: int = 0) -> dict[str, Any]:
        """Of all trained LoRA factors."""
        with self.under(arm, seed) as trained:
            self.loss(arm).backward()
            return {
                key: tensor.grad.detach().double().cpu()
                for key, tensor in trained.items()
                if not key.startswith("dense.")
            }

    def saved_mb(self, arm: Arm) -> float:
        """What is kept from forward to backward: the bytes of all storages that a forward pass leaves."""
        with self.under(arm), saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
            before = _storages()
            loss = self.loss(arm)
            after = _storages()
            del loss
        return sum(size for key, size in after.items() if key not in before) / 1e6

    def clear(self) -> None:
        for parameter in self.model.net.parameters():
            parameter.grad = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _storages() -> dict[int, int]:
    """Bytes of every storage that a Python tensor holds, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@contextmanager
def _checkpointed(layers: Sequence[Any], every: int) -> Iterator[None]:
    """torch's gradient checkpointing over groups of ``every`` layers: the first runs them all."""
    for start in range(0, len(layers), every):
        group = layers[start : start + every]
        group[0].forward = _group_forward([layer.forward for layer in group])
        for layer in group[1:]:
            layer.forward = lambda hidden, *_args, **_kwargs: hidden
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _group_forward(forwards: list[Any]) -> Any:
    def run(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        for forward in forwards:
            hidden = forward(hidden, *args, **kwargs)
        return hidden

    def forward(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        # no dropout: nothing random has to be played again
        return checkpoint(run, hidden, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward
