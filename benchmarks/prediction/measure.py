"""The measuring process of one model: what the trainer takes for many settings, and what its probe says.

Peak and time are the trainer's own figures (``training.memory.Meter``, the loop's step times), taken the way
a round takes them: one resident model, one setting after the other.
"""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.models import write_base
from benchmarks.processes import emit, say
from edge_sdk.protocol.model import LoraShape
from edge_sdk.protocol.spec import Candidate, Levers, TrainSpec
from edge_sdk.protocol.trainer import Setup
from edge_sdk.training.loop import train
from edge_sdk.training.memory import Meter
from edge_sdk.training.probing import probe
from edge_sdk.training.resident import Resident

__all__ = ["run", "write_tokenizer"]

_STEPS = 3


def run(what: Mapping[str, Any]) -> None:
    """Emits the shape, the probe's fit (unless ``probe`` is false), and a row for each visit of a setting."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="edge-prediction-") as folder:
        base = write_base(Path(folder) / "base", what["shape"])
        write_tokenizer(base)
        gc.collect()
        task = "causal-lm" if what["shape"].get("causal") else "classification"
        spec = TrainSpec()
        setup = Setup(
            base=str(base), task=task, labels=("a", "b") if task == "classification" else (),
            max_length=what["length"], micro_batch=what["batch"], lora=LoraShape(rank=what["rank"]),
            spec=spec, threads=what["threads"], memory_mb=None,
        )  # fmt: skip
        resident = Resident(setup, base, lambda: None, enforce=False)
        resident.settle(setup)
        emit(kind="shape", model=what["model"], shape=msgspec.to_builtins(resident.model.shape),
             rest_mb=resident.rest_mb, task=task)  # fmt: skip
        if what["probe"]:
            levers = Levers(activation_bits=8, recompute="outputs")
            fit = probe(resident, setup, levers, lambda: None, lambda *_: None)
            emit(kind="fit", model=what["model"], fit=msgspec.to_builtins(fit))
        for visit in range(what["repeats"]):
            for number, setting in enumerate(what["settings"]):
                emit(kind="visit", model=what["model"], visit=visit, setting=setting,
                     **_visit(resident, setup, setting))  # fmt: skip
                if number % 10 == 9:
                    say(
                        f"{what['model']}: visit {visit + 1}, setting {number + 1} of {len(what['settings'])}"
                    )


def write_tokenizer(folder: Path) -> None:
    """A trainer does not load without one; nothing is tokenized here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="a", pad_token="b", eos_token="c"
    ).save_pretrained(folder)


def _visit(resident: Resident, setup: Setup, setting: Mapping[str, Any]) -> dict[str, float]:
    candidate = Candidate(
        id="c", depth=setting["depth"], quantized_layers=setting["quantized"], steps=_STEPS,
        activation_bits=setting["bits"], activation_rounding=setting["rounding"],
        recompute=setting["recompute"], micro_batch=setting["batch"], max_length=setting["length"],
    )  # fmt: skip
    spec = TrainSpec(factors=setting["factors"], optimizer=setting["optimizer"])
    meter = Meter(resident.device)
    before = resident.model.adapter()  # as a round holds the version that it began from
    trace = train(
        resident.model, resident.random_batches(candidate, setup), candidate, spec,
        task=resident.task, check=lambda: None, report=lambda *_: None,
    )  # fmt: skip
    peak = meter.peak_mb()
    resident.model.set_adapter(before)
    return {"peak_mb": peak, "step_s": min(trace.step_s[1:])}
