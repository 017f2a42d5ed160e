"""Random models and budgets, and what becomes of a device with them."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.memory_limits.device import Device, describe, run_of
from benchmarks.models import write_base
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.config.run import LoraSection, RunBaseSection, RunConfig, RunSection, TrainingSection
from edge_sdk.protocol.wire import Choice, Decline, Status
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.versions import write_version

__all__ = ["draw", "play"]

LABELS = ("no", "yes")
_WORDS = 200
_ROWS = 48


def draw(number: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The case of that number: the same for the same config."""
    dice = random.Random(f"{config['seed']} {number}")
    below = dice.random() < config["below_rest"]
    low, high = config["least_share"], config["most_share"]
    return {
        "case": number,
        "family": dice.choice(config["families"]),
        "layers": dice.randint(*config["layers"]),
        "hidden": dice.choice(config["hidden"]),
        "batch": dice.choice(config["batches"]),
        "length": dice.choice(config["lengths"]),
        "share": -dice.uniform(0.02, 0.3) if below else low * (high / low) ** dice.random(),
    }


def play(
    case: Mapping[str, Any], config: Mapping[str, Any], trainer: ProcessTrainer, folder: Path
) -> dict[str, Any]:
    """One device, one round. The row's ``how``: ``trained``, ``declined``, ``cannot join``, ``lost``."""
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    run_config, data = prepare(case, config, folder)
    known = describe(run_config, trainer, data)
    limit = limit_mb(case, config, known.rest_mb)
    run = run_of(run_config, known.shape, folder)
    version = folder / "version"
    write_version(
        version, run=run.run, round=0, number=0, fingerprint=run.fingerprint.digest,
        adapter=initial_adapter(run.shape, run.lora, 0),
    )  # fmt: skip
    device = Device(folder / "state", run_config, run, trainer, data=data, version=version, memory_mb=limit)
    row = {**case, "rest_mb": known.rest_mb, "limit_mb": limit}
    try:
        row |= _round(device, trainer, limit, config["slack_mb"])
    finally:
        device.close()
    row["seconds"] = round(time.monotonic() - began, 1)
    shutil.rmtree(folder, ignore_errors=True)
    return row


def limit_mb(case: Mapping[str, Any], config: Mapping[str, Any], rest_mb: float) -> float:
    """Of rest, and of what tuning every layer plainly is roughly taken to need above it."""
    if case["share"] < 0:
        return rest_mb * (1.0 + case["share"])
    tokens = case["batch"] * case["length"]
    values = tokens * 18 * case["hidden"] * case["layers"]
    if case["family"] in ("llama", "qwen2"):
        values += 3 * tokens * config["vocabulary"]
    return rest_mb + case["share"] * 4 * values / 1e6


def _round(device: Device, trainer: ProcessTrainer, limit: float, slack_mb: float) -> dict[str, Any]:
    device.begin()
    joined = device.until("agent.reported", "join.postponed", "agent.failed")
    if joined is None or joined.name == "agent.failed":
        return {"how": "lost", "why": _last(device), "downs": 0, "told": []}
    statuses = device.heard(Status)
    if joined.name == "join.postponed" or statuses[-1].fit is None:
        return {"how": "cannot join", "why": str(joined.fields.get("message", "")), "downs": 0, "told": []}
    try:
        offer = device.offer(1, statuses[-1])
    except RuntimeError as error:
        return {"how": "lost", "why": str(error), "downs": 0, "told": []}
    end = device.until("update.queued", "round.decline", "agent.failed")
    ran_out = [event for event in device.events if event.name == "training.failed"]
    row: dict[str, Any] = {
        "candidates": len(offer.candidates),
        "downs": sum(bool(event.fields["memory"]) for event in ran_out),
        "told": [one.attempt for one in device.heard(Choice)],
        "budget_mb": statuses[-1].memory.budget_mb,
    }
    if end is not None and end.name == "round.decline":
        told = device.heard(Decline)[-1]
        return {**row, "how": "declined" if told.reason == "memory" else "lost", "why": told.message}
    if end is None or end.name == "agent.failed":
        return {**row, "how": "lost", "why": _last(device)}
    highest = _highest_mb(trainer)
    done = next(event for event in reversed(device.events) if event.name == "training.done")
    chosen = device.heard(Choice)[-1].candidate
    row |= {
        "depth": chosen.depth, "quantized": chosen.quantized_layers, "predicted_mb": chosen.peak_mb,
        "peak_mb": done.fields["peak_mb"], "highest_mb": highest,
    }  # fmt: skip
    if highest > limit + slack_mb:
        return {**row, "how": "lost", "why": f"held {highest:.0f} MB of {limit:.0f}, and nobody noticed"}
    if any(not event.fields["memory"] for event in ran_out):
        return {**row, "how": "lost", "why": f"not for memory: {ran_out[-1].fields['message']}"}
    return {**row, "how": "trained", "why": ""}


def _last(device: Device) -> str:
    name = device.events[-1].name if device.events else "nothing"
    fields = dict(device.events[-1].fields) if device.events else {}
    return f"the last that happened was {name}: {fields}"[:500]


def _highest_mb(trainer: ProcessTrainer) -> float:
    """The kernel's own mark of the process, cleared when the training began."""
    for line in Path(f"/proc/{trainer.pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("the trainer was gone after its update")


def prepare(case: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> tuple[RunConfig, Path]:
    """A base with random weights, its run, and rows of random words."""
    base, causal = folder / "base", case["family"] in ("llama", "qwen2")
    write_base(base, _model(case, config, causal=causal), seed=case["case"])
    _write_tokenizer(base, letters=case["family"] == "qwen2")
    dice = random.Random(case["case"])
    rows = []
    for index in range(_ROWS):
        words = [f"w{dice.randrange(_WORDS)}" for _ in range(case["length"])]
        rows.append(
            {"prompt": words[0], "response": " ".join(words[1:])}
            if causal
            else {"text": " ".join(words), "label": LABELS[index % 2]}
        )
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = RunConfig(
        run=RunSection(
            name="limits", task="causal-lm" if causal else "classification", labels=() if causal else LABELS
        ),
        base=RunBaseSection(path=str(base)),
        lora=LoraSection(),
        training=TrainingSection(steps=config["steps"], batch=case["batch"], max_length=case["length"]),
    )
    return run, data


def _model(case: Mapping[str, Any], config: Mapping[str, Any], *, causal: bool) -> dict[str, Any]:
    hidden = case["hidden"]
    fields: dict[str, Any] = {
        "model_type": case["family"], "vocab_size": config["vocabulary"], "hidden_size": hidden,
        "num_hidden_layers": case["layers"], "num_attention_heads": hidden // 32,
        "intermediate_size": hidden * 11 // 4 if causal else 4 * hidden,
        "max_position_embeddings": max(config["lengths"]) + 4,
        "pad_token_id": 1 if case["family"] == "roberta" else 0,
    }  # fmt: skip
    if causal:
        fields |= {"causal": True, "num_key_value_heads": hidden // 64, "tie_word_embeddings": True}
    return fields


def _write_tokenizer(folder: Path, *, letters: bool) -> None:
    """A token a word; ``letters``: a token a byte, as Qwen's own tokenizer class wants it."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE, WordLevel
    from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    known = sorted(ByteLevel.alphabet()) if letters else [f"w{n}" for n in range(_WORDS)]
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *known])}
    if letters:
        raw = Tokenizer(BPE(vocabulary, []))
        raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    else:
        raw = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
        raw.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    ).save_pretrained(folder)
