"""``edge-agent plan``: what of a model would fit on a device class, before anything is downloaded."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import typer

from edge_sdk.device.capacity import Capacity, capacity
from edge_sdk.device.classes import DeviceClass, device_class
from edge_sdk.errors import BaseModelError, ConfigError
from edge_sdk.planning.cost import peak_mb
from edge_sdk.planning.fitting import estimate
from edge_sdk.planning.frontier import Point, Round, frontier
from edge_sdk.planning.shapes import held_base_bytes, positions_of, shape_of, task_of
from edge_sdk.planning.work import prices
from edge_sdk.protocol.measure import Fit
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Levers, Setting

__all__ = ["Asked", "show_plan", "show_prices"]

_WAYS = {
    "plain": (Levers(), False),
    "outputs, 8 bits": (Levers(recompute="outputs"), True),
    "outputs, 4 bits": (Levers(activation_bits=4, recompute="outputs"), True),
    "inner, 4 bits": (Levers(activation_bits=4, recompute="inner"), True),
    "layer, 8 bits": (Levers(recompute="layer"), True),
}
_SHOWN = "outputs, 8 bits"
"""What FedQuad trains with: its frontier is shown whole."""

_HEAP = (
    "as under limits.memory_mb, where the trainer's heap holds what its tensors take; without that limit the "
    "quicker allocator may hold half more"
)

_ACHIEVED = 0.25
"""Of an accelerator's stated peak, what training reaches. An assumption: a probe replaces it."""
_MOST_BYTES = 4 << 20
_MEASURED = "give --gflops: fp32_gflops of edge-agent profile"


@dataclass(frozen=True)
class Asked:
    """The command's options. Rates in Mbit/s."""

    model: Path
    device_class: str | None
    memory_mb: float | None
    gflops: float | None
    task: str | None
    labels: int
    batch: int
    length: int
    rank: int
    steps: int
    base_precision: str
    up_mbps: float | None
    down_mbps: float | None
    power_mode: str | None = None
    """Of the device class, by its vendor's name."""


@dataclass(frozen=True)
class _Room:
    """What the trainer may hold in all, and where the figure comes from."""

    memory_mb: float
    source: str
    on_gpu: bool = False
    """It is a GPU's own memory, less what CUDA takes."""


def show_plan(asked: Asked, *, as_json: bool) -> None:
    """Raises ConfigError and BaseModelError for what cannot be planned, with what to do."""
    board = None if asked.device_class is None else device_class(asked.device_class)
    if board is None and asked.power_mode is not None:
        raise ConfigError(
            f'no device class has the power mode "{asked.power_mode}"', "name one with --device-class"
        )
    has = None if board is None else capacity(board, asked.power_mode)
    config = _config(asked.model)
    task = asked.task or task_of(config)
    lora = LoraShape(rank=asked.rank, alpha=2.0 * asked.rank)
    shape = shape_of(config, task=task, labels=asked.labels, lora=lora)
    longest = positions_of(config)
    if longest is not None and asked.length > longest:
        raise BaseModelError(
            f"--length is {asked.length}, this model takes {longest} tokens at most", "ask for less"
        )
    room = _room(asked, board, has)
    gflops, paced = _pace(asked, board, has)
    base_mb = held_base_bytes(shape, asked.base_precision) / 1e6
    rest_mb = base_mb + (0.0 if room.on_gpu else prices().process_mb)
    reference = Setting(
        depth=1, levers=Levers(recompute="outputs"), micro_batch=asked.batch, max_length=asked.length,
        base_precision=asked.base_precision,
    )  # fmt: skip
    fit = estimate(shape, lora, reference, pace=1.0 if gflops is None else prices().gflops / gflops)
    work = Round(asked.steps, "int8", _bps(asked.up_mbps), _bps(asked.down_mbps))
    budget_mb = max(0.0, room.memory_mb - rest_mb)
    found = {
        name: frontier(
            fit, shape, lora, msgspec.structs.replace(reference, levers=levers), budget_mb=budget_mb,
            work=work, quantize=quantize,
        )
        for name, (levers, quantize) in _WAYS.items()
    }  # fmt: skip
    told = {
        "estimate": True,
        "model": shape.family,
        "layers": shape.layers,
        "parameters": shape.parameters,
        "task": task,
        "device_class": asked.device_class,
        "power_mode": asked.power_mode,
        "runs_agent": None if board is None else board.runs_agent,
        "memory_mb": room.memory_mb,
        "memory_source": room.source,
        "rest_mb": round(rest_mb, 1),
        "rest_source": _rest(room, board),
        "budget_mb": round(budget_mb, 1),
        "heap": _HEAP,
        "gflops": gflops,
        "time_source": paced,
        "least_mb": round(_least_mb(fit, shape, lora, reference), 1),
        "ways": {name: [_told(point, gflops) for point in points] for name, points in found.items()},
    }
    if as_json:
        typer.echo(json.dumps(told))
        return
    for line in _lines(told, board, asked):
        typer.echo(line)


def show_prices(*, as_json: bool) -> None:
    """What estimates reckon with, and where each price is from."""
    table = prices()
    if as_json:
        told = {place: {"value": value, **asdict(table.got[place])} for place, value in table.all().items()}
        typer.echo(json.dumps(told))
        return
    typer.echo("seconds for 10^9 of each; packing: of a value packed and unpacked, by kernel and bits")
    sources = list(dict.fromkeys(table.got.values()))
    for place, value in table.all().items():
        source = table.got[place]
        typer.echo(
            f"{place:<28}{value:>10.4g}  {source.how:<8}  {source.date}  ({sources.index(source) + 1})"
        )
    for number, source in enumerate(sources, 1):
        typer.echo(f"({number}) {source.by}{f'; on {source.on}' if source.on else ''}")


def _told(point: Point, gflops: float | None) -> dict[str, Any]:
    told = asdict(point)
    for name in ("step_s", "round_s"):
        told[name] = None if gflops is None else round(told[name], 4)
    told["peak_mb"] = round(point.peak_mb, 1)
    return told


def _config(path: Path) -> dict[str, Any]:
    hint = "--model names a model's config.json, or its folder"
    file = path
    try:
        file = path / "config.json" if path.is_dir() else path
        with file.open("rb") as opened:
            read = opened.read(_MOST_BYTES + 1)
        if len(read) > _MOST_BYTES:
            raise BaseModelError(f"{file} is above {_MOST_BYTES >> 20} MiB, so hardly a config.json", hint)
        found = msgspec.json.decode(read.removeprefix(BOM_UTF8))
    except OSError as error:
        raise BaseModelError(f"{str(file)[:200]} cannot be read: {error.strerror}", hint) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BaseModelError(
            f"{file} is not JSON: {error}", "name a model's config.json, or the folder that it lies in"
        ) from None
    if not isinstance(found, dict):
        raise BaseModelError(f"{file} holds no object", "--model names a model's config.json")
    return found


def _room(asked: Asked, board: DeviceClass | None, has: Capacity | None) -> _Room:
    if asked.memory_mb is not None:
        return _Room(asked.memory_mb, "given")
    if board is None or has is None:
        raise ConfigError(
            "nothing says how much memory there is",
            "name a device with --device-class, or what the trainer may hold with --memory-mb",
        )
    if has.memory_mb is None:
        raise ConfigError(
            f"the device class {board.name} states no memory: no figure holds for all of its kind",
            "say with --memory-mb what the trainer may hold",
        )
    return _Room(has.memory_mb, has.memory_how, on_gpu=board.accelerator_memory_mb is not None)


def _rest(room: _Room, board: DeviceClass | None) -> str:
    """What the trainer holds at rest, in words."""
    if room.on_gpu:
        return "the base"
    told = f"the base, and {prices().process_mb:.0f} MB of the process"
    if board is not None and board.shared_memory and board.accelerator is not None:
        told += "; what CUDA takes of shared memory is not known here"
    return told


def _pace(asked: Asked, board: DeviceClass | None, has: Capacity | None) -> tuple[float | None, str]:
    """Giga floating point operations a second, and where the figure comes from; None: no seconds are told."""
    if asked.gflops is not None:
        return asked.gflops, "given"
    if board is None or has is None:
        return None, f"seconds are not told: no device class is named; {_MEASURED}"
    half = (
        asked.base_precision in ("bf16", "fp16") and has.fp16_tflops is not None and asked.power_mode is None
    )
    peak, how = (has.fp16_tflops, "stated") if half else (has.fp32_tflops, has.fp32_how)
    if peak is None:
        why = next((text.partition(": ")[2] for text in has.absent if text.startswith("fp32_tflops")), "")
        return None, f"seconds are not told: of {board.name} there is {why}; {_MEASURED}"
    kind = "fp16" if half else "fp32"
    return 1000 * _ACHIEVED * peak, (
        f"{_ACHIEVED:.0%}, assumed, of the accelerator's peak in {kind}: {peak:g} TFLOPS, {how}"
    )


def _bps(mbps: float | None) -> float | None:
    return None if mbps is None else 1e6 * mbps


def _least_mb(fit: Fit, shape: ModelShape, lora: LoraShape, reference: Setting) -> float:
    """Above rest, of one layer in the way that takes least."""
    one = msgspec.structs.replace(reference, quantized_layers=1)
    ways = (levers for levers, quantize in _WAYS.values() if quantize)
    return min(peak_mb(fit, shape, lora, msgspec.structs.replace(one, levers=levers)) for levers in ways)


def _lines(told: dict[str, Any], board: DeviceClass | None, asked: Asked) -> list[str]:
    where = "this memory" if board is None else board.title
    where += "" if asked.power_mode is None else f" in mode {asked.power_mode}"
    lines = [
        f"ESTIMATE: {told['model']}, {told['layers']} layers, {told['parameters'] / 1e6:.0f} M weights "
        f"in {asked.base_precision}, {told['task']}, batch {asked.batch}, length {asked.length}, on {where}",
        f"memory    {told['memory_mb']:.0f} MB: {told['memory_source']}",
        f"at rest   {told['rest_mb']:.0f} MB: {told['rest_source']}",
        f"to train  {told['budget_mb']:.0f} MB, of which predictions fill nine tenths",
        f"heap      {told['heap']}",
        f"time      {told['time_source']}",
    ]
    if board is not None and board.runs_agent != "native":
        lines.append(f"agent     {board.runs_agent}: {board.why}")
    ways = told["ways"]
    if not any(ways.values()):
        return [*lines, f"nothing fits: the least takes {told['least_mb']:.0f} MB above rest"]
    lines += ["", f"{_SHOWN}: the fewest quantized layers with which each depth fits"]
    head = ("depth", "quantized", "peak MB", "step s", "up kB", "round s")
    lines.append("  ".join(f"{word:>9}" for word in head))
    for point in ways[_SHOWN]:
        cells = (
            point["depth"], point["quantized_layers"], f"{point['peak_mb']:.0f}", _seconds(point["step_s"]),
            f"{point['bytes_up'] / 1e3:.0f}", _seconds(point["round_s"]),
        )  # fmt: skip
        lines.append("  ".join(f"{cell:>9}" for cell in cells))
    lines += ["", "deepest with"]
    for name, points in ways.items():
        if not points:
            lines.append(f"  {name:<16} nothing fits")
            continue
        last = points[-1]
        lines.append(
            f"  {name:<16} depth {last['depth']} of {told['layers']}, {last['quantized_layers']} quantized: "
            f"{last['peak_mb']:.0f} MB, {_seconds(last['step_s'])} s a step"
        )
    return lines


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
