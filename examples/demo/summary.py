"""``summary.json``, and the same for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from edge_sdk.config.agent import LimitsSection
from edge_sdk.planning.cost import update_bytes
from edge_sdk.protocol.model import LoraShape, ModelShape
from examples.demo.control import HeadOnly
from examples.demo.story import DeviceStory, Story

__all__ = ["lines", "summarise"]


def summarise(
    story: Story,
    *,
    status: Mapping[str, Mapping[str, Any]],
    shape: ModelShape,
    lora: LoraShape,
    base_model: str,
    method: str,
    wall_s: float,
    control: HeadOnly | None,
) -> dict[str, Any]:
    """The run in figures.

    Args:
        status: what ``edge-agent status --json`` said of every device at the end, by id.
        control: None: it was not run.
    """
    overheads = [told["overhead_s"] for told in story.rounds.values() if told["overhead_s"] is not None]
    return {
        "accuracy_start": story.accuracy[0]["accuracy"],
        "accuracy_end": story.accuracy[-1]["accuracy"],
        "accuracy_head_only": None if control is None else control.accuracy,
        "head_only_by_rate": {} if control is None else {f"{r:g}": a for r, a in control.by_rate.items()},
        "rounds": len(story.rounds),
        "wall_s": round(wall_s, 1),
        "overhead_s": round(statistics.median(overheads), 3) if overheads else None,
        "base_model": base_model,
        "broker": story.broker,
        "method": method,
        "accuracy": story.accuracy,
        "round_times": [told for _, told in sorted(story.rounds.items())],
        "devices": [
            _device(one, status[one.device.id], shape, lora) for one in story.devices.values() if one.trained
        ],
        "problems": story.problems,
    }


_UNLIMITED = msgspec.to_builtins(LimitsSection())


def _device(
    told: DeviceStory, status: Mapping[str, Any], shape: ModelShape, lora: LoraShape
) -> dict[str, Any]:
    last, ledger, device = told.trained[-1], status["ledger"], told.device
    return {
        "id": device.id,
        "device_class": device.device_class,
        "emulated": True,
        "limits": {key: value for key, value in status["limits"].items() if value != _UNLIMITED[key]},
        "layers": shape.layers,
        "depth": last["depth"],
        "quantized_layers": last["quantized_layers"],
        "binding_budget": last["binding_budget"],
        "rest_mb": round(last["rest_mb"], 1),
        "predicted_peak_mb": round(last["predicted_peak_mb"], 1),
        "measured_peak_mb": round(last["measured_peak_mb"], 1),
        "activation_store_saves_mb_per_layer": round(told.probe.get("saved_mb", 0.0), 2),
        "bytes_up": ledger.get("bytes_up", 0),
        "bytes_down": ledger.get("bytes_down", 0),
        "update_bytes_up": ledger.get("chunk_bytes_up", 0),
        "chunks_up": ledger.get("chunks_up", 0),
        "bytes_resent": ledger.get("bytes_resent", 0),
        "fp32_bytes_up": len(told.trained) * update_bytes(shape, lora, shape.layers, "fp32"),
        "rounds": told.trained,
    }


def lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people."""
    head = summary["accuracy_head_only"]
    against = "" if head is None else f"; with the head alone {head:.3f}"
    yield (
        f"held-out accuracy {summary['accuracy_start']:.3f} -> {summary['accuracy_end']:.3f}{against}  "
        f"({summary['rounds']} rounds, {summary['wall_s']:.0f} s)"
    )
    yield (
        f"{summary['method']} on {summary['base_model']}, broker {summary['broker']}; "
        f"a round costs {summary['overhead_s']:.2f} s beyond training, shaped upload and evaluation (median)"
    )
    yield ""
    yield (
        f"{'device (emulated)':<22} {'limits':<22} {'depth':>5} {'quant.':>6} {'bound by':<9} "
        f"{'peak MB, predicted/measured':>27} {'sent':>9} {'as fp32':>9}"
    )
    for device in summary["devices"]:
        limits = ", ".join(f"{key} {value:g}" for key, value in device["limits"].items()) or "none"
        peaks = f"{device['predicted_peak_mb']:.0f} / {device['measured_peak_mb']:.0f}"
        yield (
            f"{device['device_class']:<22} {limits:<22} {device['depth']:>5} {device['quantized_layers']:>6} "
            f"{device['binding_budget']:<9} {peaks:>27} {device['bytes_up'] / 1e6:>6.2f} MB "
            f"{device['fp32_bytes_up'] / 1e6:>6.1f} MB"
        )
