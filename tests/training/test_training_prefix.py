"""Frozen-prefix reuse: the same training in less work, on every family; and when it is left alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from families import FAMILIES  # noqa: E402

from edge_sdk.planning.cost import prefix_share  # noqa: E402
from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.protocol.spec import Candidate, TrainSpec  # noqa: E402
from edge_sdk.training.loop import train  # noqa: E402
from edge_sdk.training.model import load_model  # noqa: E402
from edge_sdk.training.model.heads import base_of  # noqa: E402
from edge_sdk.training.precision.holding import base_precision  # noqa: E402
from edge_sdk.training.prefix import Prefix  # noqa: E402
from edge_sdk.training.prefix_store import MemoryShelf, RowForm, on_disk  # noqa: E402
from edge_sdk.training.randomness import draw_rows  # noqa: E402
from edge_sdk.training.tasks.finding import task_of  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402

ROWS, BATCH, LENGTH, WIDTH = 10, 4, 12, 32
READ = 13
"""Of 24 visits: all but the first of each row, and one row that is in the third batch twice."""
ROW_BYTES = LENGTH * WIDTH * 4
LORA = LoraShape(rank=4, alpha=8.0)


class Bench:
    """A tiny model, rows for it, and two and a half epochs of them."""

    def __init__(
        self, base: Path, task: str = "classification", batches: int = 6, precision: str = "fp32"
    ) -> None:
        self.task = task_of(task)
        self.model = load_model(
            base, ("a", "b", "c"), LORA, "cpu", task=task, precision=base_precision(precision, "cpu")
        )
        start = initial_adapter(self.model.shape, LORA, seed=1)
        draw = np.random.default_rng(0)
        self.start = {
            key: value + draw.normal(0, 0.05, value.shape).astype(np.float32) for key, value in start.items()
        }
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 30, (ROWS, LENGTH), generator=g)
        lengths = torch.randint(5, LENGTH + 1, (ROWS,), generator=g)
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        if task == "classification":
            self.targets = torch.randint(0, 3, (ROWS,), generator=g)
        else:
            following = torch.roll(self.ids, -1, 1)
            self.targets = following.masked_fill(torch.roll(self.mask, -1, 1) == 0, -100)
            self.targets[:, -1] = -100
        self.batches = batches
        self.drawn = draw_rows(ROWS, BATCH, batches, seed=0, round=1, device="d")

    def prefix(self, depth: int = 1, budget_bytes: float = 1e6, **more: Any) -> Prefix:
        layers = self.model.layers
        return Prefix(
            base_of(self.model.net), layers, len(layers) - depth,
            drawn=self.drawn, rows=ROWS, budget_bytes=budget_bytes, **more,
        )  # fmt: skip

    def train(self, prefix: Prefix | None = None, depth: int = 1, **candidate: Any) -> Any:
        """Losses, and what the training changed."""
        self.model.set_adapter(self.start)
        fields = {"id": "c", "depth": depth, "steps": self.batches, "micro_batch": BATCH, **candidate}
        chosen = torch.from_numpy(self.drawn).split(BATCH)
        trace = train(
            self.model,
            ((self.ids[rows], self.mask[rows], self.targets[rows]) for rows in chosen),
            Candidate(**fields),
            TrainSpec(learning_rate=0.01),
            task=self.task,
            check=lambda: None,
            report=lambda _: None,
            prefix=prefix,
        )
        after = self.model.adapter()
        return trace, {key: after[key] - self.start[key] for key in after}


@pytest.fixture(scope="module")
def bench(bases: dict[tuple[str, str], Path]) -> Bench:
    return Bench(bases["roberta", "classification"])


def far(one: Any, other: Any) -> float:
    """The farthest part's distance, as a share of how far it moved."""
    return max(
        float(np.linalg.norm(one[key] - other[key]) / np.linalg.norm(other[key]))
        for key in other
        if np.linalg.norm(other[key]) > 0
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_same_training_in_every_family(family: str, bases: dict[tuple[str, str], Path]) -> None:
    task = "causal-lm" if (family, "causal-lm") in bases else "classification"
    bench = Bench(bases[family, task], task)
    plain, moved = bench.train()
    prefix = bench.prefix()
    trace, again = bench.train(prefix)
    assert prefix.off is None and prefix.read == READ and prefix.computed == 24 - READ
    assert trace.losses == pytest.approx(plain.losses, rel=1e-5)
    assert trace.losses[:2] == plain.losses[:2]
    assert far(again, moved) < 1e-3  # Adam's first steps are signs; float32 elsewhere
    assert trace.prefix_read == pytest.approx(READ / 24)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_half_and_quantized_bases_train_and_reuse(
    precision: str, bench: Bench, bases: dict[tuple[str, str], Path]
) -> None:
    """fp16 with its loss scaled; the adapter stays in float32."""
    half = Bench(bases["roberta", "classification"], precision=precision)
    whole, _ = bench.train()
    plain, also = half.train()
    assert plain.losses == pytest.approx(whole.losses, rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.model.parts.values())
    trace, again = half.train(half.prefix())
    assert trace.losses == pytest.approx(plain.losses, rel=1e-3) and far(again, also) < 0.05


@pytest.mark.parametrize("depth", [1, 2])
def test_whole_batches_again_are_equal_to_the_bit(bench: Bench, depth: int) -> None:
    """Rows of 8 in batches of 4: no batch is part known, part new."""
    drawn, bench.drawn = bench.drawn, draw_rows(8, BATCH, 6, seed=0, round=1, device="d")
    try:
        plain, moved = bench.train(depth=depth)
        trace, again = bench.train(bench.prefix(depth), depth=depth)
    finally:
        bench.drawn = drawn
    assert trace.losses == plain.losses
    assert all(np.array_equal(again[key], moved[key]) for key in moved)


@pytest.mark.parametrize(("form", "bound"), [("exact", 1e-4), ("fp16", 0.02), ("int8", 0.15)])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_forms_and_places(bench: Bench, form: str, bound: float, place: str, tmp_path: Path) -> None:
    shelf = MemoryShelf if place == "memory" else on_disk(tmp_path / "own")
    _, moved = bench.train()
    prefix = bench.prefix(form=form, shelf=shelf)
    _, again = bench.train(prefix)
    assert prefix.read == READ and far(again, moved) < bound
    sizes = {"exact": ROW_BYTES, "fp16": ROW_BYTES // 2 + 4, "int8": ROW_BYTES // 4 + LENGTH * 8}
    assert prefix.kept_bytes == ROWS * sizes[form]
    assert place == "memory" or not list((tmp_path / "own").iterdir())


def test_it_goes_with_the_activation_store_and_accumulation(bench: Bench) -> None:
    changes = {"quantized_layers": 1, "recompute": "outputs", "accumulation": 2, "steps": 3}
    plain, moved = bench.train(depth=2, **changes)
    trace, again = bench.train(bench.prefix(2), depth=2, **changes)
    assert trace.losses == pytest.approx(plain.losses, rel=1e-5) and far(again, moved) < 1e-3


@pytest.mark.parametrize("fit", [1, 4, 9])
def test_a_budget_keeps_what_comes_most_often(bench: Bench, fit: int) -> None:
    plain, moved = bench.train()
    prefix = bench.prefix(budget_bytes=ROW_BYTES * fit + 1)
    trace, again = bench.train(prefix)
    assert prefix.kept_bytes == ROW_BYTES * fit
    assert trace.prefix_read == pytest.approx(prefix_share(ROWS, BATCH * 6, fit), abs=1 / 24)
    assert trace.losses == pytest.approx(plain.losses, rel=1e-5) and far(again, moved) < 1e-3


def test_nothing_is_left_behind(bench: Bench) -> None:
    bench.train(bench.prefix())
    net = base_of(bench.model.net)
    assert not net._forward_pre_hooks and not net._forward_hooks
    for layer in bench.model.layers:
        assert "forward" not in vars(layer) and not layer._forward_pre_hooks


def test_when_it_is_left_alone(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, moved = bench.train()
    assert "every layer" in str(bench.prefix(3).off)
    short = Prefix(
        base_of(bench.model.net), bench.model.layers, 2, drawn=np.arange(8), rows=ROWS, budget_bytes=1e6
    )
    assert "twice" in str(short.off)

    def full(rows: int, width: int) -> MemoryShelf:
        raise OSError(28, "No space left on device")

    def short_of_memory(rows: int, width: int) -> MemoryShelf:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 120 bytes.")

    for prefix, why in (
        (bench.prefix(budget_bytes=ROW_BYTES - 1), "may be kept"),
        (bench.prefix(shelf=full), "No space left"),
        (bench.prefix(shelf=short_of_memory), "no memory"),
    ):
        trace, again = bench.train(prefix)
        assert why in str(prefix.off) and why in caplog.text
        assert trace.losses == plain.losses and prefix.read == 0
        assert all(np.array_equal(again[key], moved[key]) for key in moved)


@pytest.mark.parametrize(("call", "after"), [("pwrite", 7), ("preadv", 3)])
def test_a_disk_that_fails_half_way_ends_the_reuse_alone(
    call: str, after: int, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, moved = bench.train()
    real, calls = getattr(os, call), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    prefix = bench.prefix(shelf=on_disk(tmp_path))
    trace, again = bench.train(prefix)
    assert len(calls) == after + 1 and "No space left" in str(prefix.off)
    assert prefix.kept_bytes == 0 and prefix.read + prefix.computed < BATCH * 6
    assert trace.losses == pytest.approx(plain.losses, rel=1e-5) and far(again, moved) < 1e-3


def test_a_model_of_another_structure_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that leaves something for a later one, beside its output."""
    layers, left = bench.model.layers, []
    first, last = layers[0].forward, layers[2].forward

    def leave(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        left.append(first(hidden, *args, **kwargs))
        return left[-1]

    def take(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        left.append(left.pop() if left else torch.zeros_like(hidden))
        seen, left[:] = left[-1], []
        return last(hidden + seen, *args, **kwargs)

    monkeypatch.setattr(layers[0], "forward", leave, raising=False)
    monkeypatch.setattr(layers[2], "forward", take, raising=False)
    prefix = bench.prefix()
    with prefix.over():
        prefix.expect(BATCH)
        bench.model.hidden(bench.ids[:BATCH], bench.mask[:BATCH])
    assert "from layer to layer" in str(prefix.off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forms_give_back_what_they_took(dtype: Any) -> None:
    hidden = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden[1, 2, 3] = 3e4 if dtype == torch.float16 else 1e6  # beyond fp16
    for name, bound in (("exact", 0.0), ("fp16", 2e-3), ("int8", 0.01)):
        form = RowForm(name, hidden)
        coded = form.encode(hidden)
        assert coded.shape == (3, form.nbytes) and coded.dtype == torch.uint8
        back = form.decode(coded, "cpu")
        assert back.dtype == dtype and back.shape == hidden.shape
        calm = hidden[[0, 2]].float()
        assert (back[[0, 2]].float() - calm).abs().max() <= bound * calm.abs().max()
        assert back[1, 2, 3].float() == pytest.approx(hidden[1, 2, 3].float().item(), rel=0.01)
