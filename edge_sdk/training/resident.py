"""What stays in memory between requests: model, tokenizer, tokenized rows, the head's cached inputs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from edge_sdk.device.machine import read_profile
from edge_sdk.errors import DataError, MechanismError
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.protocol.trainer import Setup
from edge_sdk.training.activations.packing import warm
from edge_sdk.training.allocator import allocator_word, trim
from edge_sdk.training.base import compute_device
from edge_sdk.training.failures import MemoryLimitError
from edge_sdk.training.loop import StepDone, train
from edge_sdk.training.memory import Meter, limit_growth
from edge_sdk.training.model import load_model
from edge_sdk.training.precision.holding import base_precision, told
from edge_sdk.training.prefix import Prefix
from edge_sdk.training.prefix_store import MemoryShelf, on_disk
from edge_sdk.training.randomness import generator
from edge_sdk.training.tasks.base import Batch
from edge_sdk.training.tasks.finding import task_of
from edge_sdk.training.tasks.tokens import Rows, check_ids, load_tokenizer

__all__ = ["Resident", "resident_key"]

_log = logging.getLogger(__name__)

_KEPT_BYTES = 64e6
"""What an evaluation may keep of a file for the next one, which needs it where the head alone was trained."""


def resident_key(setup: Setup, folder: Path) -> tuple[object, ...]:
    """What another value of means loading the model again: other files in the base's ``folder`` too."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return (
        tuple((path.name, _stamp(path)) for path in files), setup.base, setup.task, setup.labels, setup.lora,
        setup.layers, setup.device, setup.base_precision, setup.base_plan,
    )  # fmt: skip


class Resident:
    """The loaded trainer of one setup.

    Args:
        folder: the local base.
        check: called between pieces of work; raises to end the request.
        enforce: whether the process is the trainer's own, so that a memory limit may be set on it.
    """

    def __init__(self, setup: Setup, folder: Path, check: Callable[[], None], *, enforce: bool) -> None:
        self.key = resident_key(setup, folder)
        self.folder = folder
        self.device = compute_device(setup.device)
        self.rest_mb = 0.0
        self._check = check
        self._enforce = enforce
        self._limit_mb: float | None = None
        self._settled = False
        self._rows: dict[tuple[object, ...], Rows] = {}
        self.threads(setup)
        self.task = task_of(setup.task)
        precision = base_precision(setup.base_precision, self.device, setup.base_plan)
        self.model = load_model(
            folder,
            setup.labels,
            setup.lora,
            self.device,
            task=setup.task,
            precision=precision,
            layers=setup.layers,
            check=check,
        )
        if setup.base_plan is not None and len(setup.base_plan.blocks) != len(self.model.layers):
            raise MechanismError(
                f"the base has {len(self.model.layers)} blocks, its plan {len(setup.base_plan.blocks)}",
                "the plan was made for another base: make it anew with edge-agent quantize-base",
            )
        self.base_held = told(setup.base_precision, self.device)
        self.model.check_length(setup.max_length)
        self._tokenizer = load_tokenizer(folder)
        self._warm_up(setup)

    def threads(self, setup: Setup) -> int:
        """Sets the thread count that the setup asks for; returns what torch uses."""
        if setup.threads and torch.get_num_threads() != setup.threads:
            torch.set_num_threads(setup.threads)
        return int(torch.get_num_threads())

    def machine(self, setup: Setup) -> str:
        """Names all that a cost fit depends on."""
        computes = (
            read_profile().processor if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        )
        return (
            f"{computes}; torch {torch.__version__}; {self.device}; {self.threads(setup)} threads; "
            f"{allocator_word()}"
        )

    def rows(self, setup: Setup, max_length: int | None = None) -> Rows:
        """The setup's rows, tokenized once per file and length. Raises DataError or BaseModelError."""
        if setup.data is None:
            raise DataError("this request needs data, and its setup names none", "set data.path")
        length = max_length or setup.max_length
        self.model.check_length(length)
        key = (setup.data, setup.template, length, _stamp(Path(setup.data.path)))
        if key not in self._rows:
            # of a file that changed, and of another length, nothing is kept
            self._rows = {k: v for k, v in self._rows.items() if k[0] != setup.data}
            rows = self.task.rows(
                setup.data, setup.labels, tokenizer=self._tokenizer, template=setup.template,
                max_length=length, check=self._check,
            )  # fmt: skip
            check_ids(rows.ids, self._tokenizer, self.model.shape.vocabulary)
            self._rows[key] = rows
            self._settled = False
        return self._rows[key]

    def settle(self, setup: Setup) -> None:
        """Measures the memory at rest, where that is not known, and puts the setup's limit in force.

        Raises MemoryLimitError where the limit is below what the trainer holds at rest.
        """
        if self._settled and setup.memory_mb == self._limit_mb:
            trim()
            self._limit(self.growth_mb())  # counted on from what the heap has mapped by now
            return
        self._limit(None)
        self.rest_mb = Meter(self.device).rest_mb
        self._limit_mb = setup.memory_mb
        self._settled = True
        if self._limit_mb is None:
            return
        if not self._enforce:
            _log.warning("limits.memory_mb is enforced on a trainer process only, not inside an app")
            return
        if self.rest_mb >= self._limit_mb:
            self._settled = False
            raise MemoryLimitError(
                f"the trainer holds {self.rest_mb:.0f} MB at rest, with the model loaded, and may hold "
                f"{self._limit_mb:.0f} in all: nothing is left to train with",
                f"let it have well above {self.rest_mb:.0f} MB (free memory, limits.memory_mb), or take a "
                "smaller base model",
            )
        self._limit(self._limit_mb - self.rest_mb)

    def growth_mb(self) -> float | None:
        """What the limit leaves above rest; None: no limit."""
        return None if self._limit_mb is None or not self._enforce else self._limit_mb - self.rest_mb

    def check_limit(self, meter: Meter) -> None:
        """Raises MemoryLimitError where the process held more than its limit since ``meter`` was made."""
        if self._limit_mb is not None and self._enforce and meter.highest_mb() > self._limit_mb:
            raise MemoryLimitError(
                f"the trainer held {meter.highest_mb():.0f} MB, its limit is {self._limit_mb:.0f}",
                "a smaller candidate may fit",
            )

    def recover(self) -> None:
        """After running out of memory: everything of the failed request goes; the limit stays."""
        self._limit(None)
        self.model.tune(0)
        for rows in self._rows.values():
            rows.head_inputs.clear()
        self._settled = False
        trim()

    def release(self) -> None:
        """Lifts the process's limit, before another model is loaded."""
        self._limit(None)

    def batches(self, rows: Rows, candidate: Candidate, drawn: Any) -> Iterator[Batch]:
        """The batches of a round; features where the depth is 0. ``drawn``: from ``draw_rows``."""
        orders = torch.from_numpy(drawn).split(candidate.micro_batch)
        if candidate.depth:
            for chosen in orders:
                yield self.task.batch(rows, chosen, self.device)
            return
        # half a batch at a time: a forward pass alone, yet never near what a step takes
        kept = self._kept(rows, trim=False)
        self._fill(rows, kept, torch.from_numpy(drawn), max(1, candidate.micro_batch // 2), trim=False)
        for chosen in orders:
            yield self._read(rows, kept, chosen)

    def prefix(
        self, setup: Setup, rows: Rows, candidate: Candidate, spec: TrainSpec, drawn: Any, folder: Path
    ) -> Prefix | None:
        """Reuse of the frozen layers over these batches; None where the setup leaves no room for it."""
        if not setup.prefix_mb or not candidate.depth or spec.dropout:
            return None
        return Prefix(
            getattr(self.model.net, self.model.net.base_model_prefix),
            self.model.layers,
            self.model.shape.layers - candidate.depth,
            drawn=drawn,
            rows=len(rows),
            budget_bytes=setup.prefix_mb * 1e6,
            form=spec.prefix,
            shelf=MemoryShelf if setup.prefix_place == "memory" else on_disk(folder),
        )

    def every(self, rows: Rows, batch: int) -> Iterator[Batch]:
        """Every row once; rows of a length together, padded as little as they need. Where there is a head,
        as it reads them."""
        small = 4 * len(rows) * self.model.shape.hidden <= _KEPT_BYTES
        kept = self._kept(rows, trim=True) if self.task.has_head and small else None
        for chosen in torch.argsort(rows.lengths, stable=True).split(batch):
            if kept is not None:
                self._fill(rows, kept, chosen, batch, trim=True)
                yield self._read(rows, kept, chosen)
                continue
            ids, mask, targets = self.task.batch(rows, chosen, self.device, trim=True)
            if self.task.has_head:
                with torch.inference_mode():
                    ids, mask = self.model.encode(ids, mask).float(), None
            yield ids, mask, targets

    def _read(self, rows: Rows, kept: tuple[Any, Any], chosen: Any) -> Batch:
        return kept[0][chosen].unsqueeze(1).to(self.device), None, rows.labels[chosen].to(self.device)

    def _kept(self, rows: Rows, *, trim: bool) -> tuple[Any, Any]:
        """The head's inputs (rows, hidden), and which of them are there.

        They hold as long as rows, LoRA values and what is folded are the same, which head-only training
        leaves alone.
        """
        lora = self._lora_digest()
        if trim not in rows.head_inputs or rows.head_inputs[trim][0] != lora:
            empty = torch.empty(len(rows), self.model.shape.hidden)
            rows.head_inputs[trim] = (lora, empty, torch.zeros(len(rows), dtype=torch.bool))
        return rows.head_inputs[trim][1:]

    def _fill(self, rows: Rows, kept: tuple[Any, Any], wanted: Any, batch: int, *, trim: bool) -> None:
        """Computes what the head reads of the ``wanted`` rows that are not there yet."""
        features, there = kept
        missing = torch.unique(wanted[~there[wanted]])
        with torch.inference_mode():
            for chosen in missing.split(batch) if len(missing) else ():
                self._check()
                ids, mask = rows.inputs(chosen, self.device, trim=trim)
                features[chosen] = self.model.encode(ids, mask)[:, 0].cpu().float()
                there[chosen] = True

    def _lora_digest(self) -> str:
        digest = hashlib.sha256(self.model.folding.digest.encode())
        for key, parameter in self.model.parts.items():
            if not key.startswith("dense."):
                digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _warm_up(self, setup: Setup) -> None:
        """Steps to be discarded: libraries load, threads start, scratch is taken, plain and quantized."""
        warm(self.device)  # every width and rounding: a later round may ask for another
        before = self.model.adapter()
        for quantized in (0, 1):
            candidate = Candidate(
                id="warm-up", depth=1, quantized_layers=quantized, steps=2,
                micro_batch=setup.micro_batch, max_length=setup.max_length,
            )  # fmt: skip
            train(
                self.model,
                self.random_batches(candidate, setup),
                candidate,
                setup.spec,
                task=self.task,
                check=self._check,
                report=_ignore,
            )
        self.model.set_adapter(before)

    def random_batches(self, candidate: Candidate, setup: Setup) -> Iterator[Batch]:
        """Batches of random tokens, full length: costs do not depend on what the rows say."""
        draw = generator(0, 0, "", "probe")
        shape = (candidate.micro_batch, candidate.max_length)
        while True:
            ids = torch.from_numpy(draw.integers(0, self.model.shape.vocabulary, shape)).to(self.device)
            mask = torch.ones_like(ids)
            mask[0, candidate.max_length // 2 + 1 :] = 0  # a padded row: the mask takes part
            yield ids, mask, self.task.random_targets(ids, len(setup.labels), draw)

    def _limit(self, growth_mb: float | None) -> None:
        if self._enforce:
            limit_growth(self.device, growth_mb)


def _ignore(done: StepDone) -> None:
    """No progress is told."""


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - one call for both figures
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
