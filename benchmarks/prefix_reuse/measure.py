"""The measuring process: whole rounds with and without reuse, interleaved, from the same start."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.models import randomize_adapter, write_base
from benchmarks.processes import emit, say
from edge_sdk.protocol.model import LoraShape
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.training.loop import Trace, train
from edge_sdk.training.memory import Meter
from edge_sdk.training.model import load_model
from edge_sdk.training.prefix import Prefix
from edge_sdk.training.prefix_store import MemoryShelf, on_disk
from edge_sdk.training.randomness import draw_rows
from edge_sdk.training.tasks.classification import Classification

COMPARED = ("none", "exact, memory")
OTHERS = ("fp16, memory", "int8, memory", "exact, disk", "int8, disk")


class Round:
    """One round's work, and what its training changes."""

    def __init__(self, folder: Path, wanted: dict[str, Any]) -> None:
        self._folder, self._wanted = folder, wanted
        lora = LoraShape(rank=wanted["rank"], alpha=2.0 * wanted["rank"])
        self._model = load_model(folder, ("a", "b", "c", "d"), lora, "cpu")
        randomize_adapter(self._model.parts)
        self._start = self._model.adapter()
        rows, length, batch = wanted["rows"], wanted["length"], wanted["batch"]
        draw = torch.Generator().manual_seed(wanted["seed"])
        self._ids = torch.randint(5, wanted["model"]["vocab_size"], (rows, length), generator=draw)
        lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=draw)
        self._mask = (torch.arange(length) < lengths).long()
        self._labels = torch.randint(0, 4, (rows,), generator=draw)
        self._steps = rows * wanted["epochs"] // batch
        self._drawn = draw_rows(rows, batch, self._steps, seed=wanted["seed"], round=1, device="d")

    def run(self, arm: str) -> tuple[Trace, float, float, dict[str, Any]]:
        """Its trace, peak above rest and kept MB, and what it changed."""
        self._model.set_adapter(self._start)
        prefix = None if arm == "none" else self._prefix(*arm.split(", "))
        wanted = self._wanted
        candidate = Candidate(
            id="c", depth=wanted["depth"], steps=self._steps, micro_batch=wanted["batch"],
            max_length=wanted["length"],
        )  # fmt: skip
        meter = Meter(torch.device("cpu"))
        trace = train(
            self._model, self._batches(), candidate, TrainSpec(), task=Classification(),
            check=lambda: None, report=lambda _: None, prefix=prefix,
        )  # fmt: skip
        if prefix is not None and prefix.off:
            raise RuntimeError(f"nothing was reused: {prefix.off}")
        after = self._model.adapter()
        moved = {key: after[key] - value for key, value in self._start.items()}
        return trace, meter.peak_mb(), prefix.kept_bytes / 1e6 if prefix else 0.0, moved

    def _prefix(self, form: str, place: str) -> Prefix:
        layers = self._model.layers
        return Prefix(
            self._model.net.roberta, layers, len(layers) - self._wanted["depth"], drawn=self._drawn,
            rows=self._wanted["rows"], budget_bytes=1e9, form=form,
            shelf=MemoryShelf if place == "memory" else on_disk(self._folder),
        )  # fmt: skip

    def _batches(self) -> Iterator[tuple[Any, Any, Any]]:
        for rows in torch.from_numpy(self._drawn).split(self._wanted["batch"]):
            yield self._ids[rows], self._mask[rows], self._labels[rows]


def run(wanted: dict[str, Any]) -> None:
    torch.set_num_threads(wanted["threads"])
    with tempfile.TemporaryDirectory() as name:
        folder = write_base(Path(name), wanted["model"], seed=wanted["seed"])
        work = Round(folder, wanted)
        plain, _, _, moved = work.run("none")  # what is loaded at the first use is nobody's time
        for repeat in range(wanted["repeats"]):
            for arm in (*COMPARED, *(OTHERS if repeat < wanted["others"] else ())):
                trace, peak_mb, kept_mb, also = work.run(arm)
                emit(
                    arm=arm, repeat=repeat, seed=wanted["seed"], seconds=round(trace.train_s, 4),
                    step_s=[round(s, 4) for s in trace.step_s], read=round(trace.prefix_read, 4),
                    peak_mb=round(peak_mb, 1), kept_mb=round(kept_mb, 3),
                    same_losses=trace.losses == plain.losses, update_error=_error(also, moved),
                )  # fmt: skip
                say(f"{repeat} {arm}: {trace.train_s:.2f} s")


def _error(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of all that the round changed, as a share of its norm."""
    far = np.sqrt(sum(float(((one[key] - other[key]) ** 2).sum()) for key in other))
    return float(far / np.sqrt(sum(float((value**2).sum()) for value in other.values())))
