"""The cost model: memory, time and bytes of any setting, on a device that its ``Fit`` tells of.

What is counted of the model's shape (``memory``, ``work``) is scaled by what the device measured at the fit's
reference. Memory is the highest of a few phases; of each, what tuned layers keep grows with the depth:

    backward  fixed + room + d · layer              packed  fixed + room of a packed layer + a · packed layer
    loss      fixed + room for logits + all layers  frozen  fixed + room of a layer's forward pass + state

Bytes follow from the shape and the container's form. MB are 10^6 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import msgspec
from msgspec.structs import replace

from edge_sdk.errors import MechanismError
from edge_sdk.planning.memory import Counted, counted
from edge_sdk.planning.work import Worked, worked
from edge_sdk.protocol.container import CODEC_FORMS, METADATA_KEY, CodecForm, ContainerHeader, Part
from edge_sdk.protocol.measure import Correction, Fit
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Levers, Setting

__all__ = [
    "PREFIX_GROUP",
    "Phase",
    "RoundTime",
    "Scales",
    "correction",
    "link_s",
    "peak_mb",
    "phases",
    "prefix_row_bytes",
    "prefix_share",
    "reference",
    "round_time",
    "step_s",
    "tried",
    "update_bytes",
    "version_bytes",
]

PREFIX_GROUP = 64
"""Values of a kept hidden state that share a scale and an offset at 8 bits."""


@dataclass(frozen=True)
class Phase:
    """Bytes that are counted at a step's possible peak, apart by what a device scales them with."""

    name: str
    plain: float
    packed: float
    room: float
    of_packed: bool
    """The room is that of a packed layer."""


@dataclass(frozen=True)
class Scales:
    """Measured over counted: of what plain and packed layers keep, of the room besides."""

    plain: float
    packed: float
    room: float
    packed_room: float
    fixed_mb: float

    @classmethod
    def of(cls, fit: Fit, at: Counted) -> Scales:
        room = fit.head_mb - fit.fixed_mb
        return cls(
            plain=1e6 * fit.layer_mb / (at.plain + at.state),
            packed=1e6 * (fit.layer_mb - fit.saved_mb) / (at.packed + at.state),
            room=1e6 * room / _room(at, at.plain_room),
            packed_room=1e6 * (room + fit.work_mb) / _room(at, at.packed_room),
            fixed_mb=fit.fixed_mb,
        )

    def peak_mb(self, phase: Phase) -> float:
        room = self.packed_room if phase.of_packed else self.room
        return (
            self.fixed_mb + (self.plain * phase.plain + self.packed * phase.packed + room * phase.room) / 1e6
        )


def _room(at: Counted, room: float) -> float:
    return at.head + at.edge + room


def reference(fit: Fit, base_precision: str) -> Setting:
    """What the fit's figures are of, on a device that holds its base so."""
    return Setting(
        depth=1,
        levers=fit.levers,
        micro_batch=fit.micro_batch,
        max_length=fit.max_length,
        factors=fit.factors,
        optimizer=fit.optimizer,
        base_precision=base_precision,
    )


def _flat(setting: Setting) -> Setting:
    """Settings that differ in depth alone are counted once."""
    return replace(setting, depth=1, quantized_layers=0)


@lru_cache(maxsize=16384)
def phases(shape: ModelShape, lora: LoraShape, setting: Setting) -> tuple[Phase, ...]:
    """Where the peak of a step may be."""
    at = counted(shape, lora, _flat(setting))
    depth, packed = setting.depth, setting.quantized_layers
    if not depth:  # the head alone: half a batch at a time passes the layers
        return (Phase("frozen", 0.0, 0.0, at.head + at.frozen_room / 2, False),)
    plain = depth - packed
    kept = (plain * (at.plain + at.state), packed * (at.packed + at.state))
    whole = plain == 0
    found = [
        Phase("backward", *kept, _room(at, at.packed_room if whole else at.plain_room), whole),
        Phase("loss", *kept, _room(at, at.loss_room) + (at.edge / 2 if packed else 0.0), whole),
    ]
    if packed and plain:
        found.append(Phase("packed", plain * at.state, kept[1], _room(at, at.packed_room), True))
    if depth < shape.layers:
        state = at.state
        found.append(Phase("frozen", plain * state, packed * state, at.head + at.frozen_room, whole))
    return tuple(found)


def peak_mb(fit: Fit, shape: ModelShape, lora: LoraShape, setting: Setting) -> float:
    """Highest memory of a round above the resting trainer, MB."""
    scales = _scales(fit, shape, lora, setting.base_precision)
    own = correction(fit, setting)
    factor = fit.peak_factor if own is None else own.peak
    peak = max(scales.peak_mb(phase) for phase in phases(shape, lora, setting))
    return factor * max(0.0, peak)  # a small training may lie in holes of the heap as a whole


def correction(fit: Fit, setting: Setting) -> Correction | None:
    """What rounds with the setting's levers taught; None: there was none."""
    if not fit.corrections:
        return None
    quantized, levers = tried(setting)
    return next((c for c in fit.corrections if (c.quantized, c.levers) == (quantized, levers)), None)


def tried(setting: Setting) -> tuple[bool, Levers]:
    """What corrections are kept by: whether any layers are quantized, and the levers that tell then."""
    if setting.quantized_layers:
        return True, setting.levers
    return False, Levers(recompute=setting.levers.recompute)


@lru_cache(maxsize=1024)
def _scales(fit: Fit, shape: ModelShape, lora: LoraShape, base_precision: str) -> Scales:
    return Scales.of(fit, counted(shape, lora, reference(fit, base_precision)))


@lru_cache(maxsize=1024)
def _worked_then(fit: Fit, shape: ModelShape, lora: LoraShape, base_precision: str) -> Worked:
    return worked(shape, lora, reference(fit, base_precision), fit.kernel)


def step_s(
    fit: Fit,
    shape: ModelShape,
    lora: LoraShape,
    setting: Setting,
    *,
    prefix_read: float = 0.0,
) -> float:
    """Seconds of one batch of ``setting.micro_batch`` rows.

    ``prefix_read``: share of row visits whose frozen layers, those below the tuned ones, are read rather
    than computed, on the average of a round (``prefix_share``). That part of the forward pass goes.
    """
    now = worked(shape, lora, _flat(setting), fit.kernel)
    then = _worked_then(fit, shape, lora, setting.base_precision)
    spared = prefix_read * (shape.layers - setting.depth) / shape.layers
    own = correction(fit, setting)
    factor = fit.step_factor if own is None else own.step
    forward = fit.forward_s / then.forward_s
    layer = max(0.0, fit.layer_s - forward * then.again_s) / then.layer_s
    calls = (1.0 - spared) * now.call_s + setting.depth * now.tuned_s
    return factor * (
        (1.0 - spared) * forward * now.forward_s
        + setting.depth * (layer * now.layer_s + forward * now.again_s)
        + setting.quantized_layers * fit.quantize_s * now.quantize_s / then.quantize_s
        + fit.call_s * calls / (then.call_s + then.tuned_s)
    )


def prefix_share(rows: int, visits: int, kept: int) -> float:
    """Share of a round's row visits at which what enters the lowest tuned layer is there already.

    Rows come equally often, v = visits / rows times; the first visit of each computes. Of those that come
    once more than others (visits mod rows) rows are kept first.
    """
    whole, more = divmod(visits, rows) if rows else (0, 0)
    often = min(kept, more)
    read = often * whole + min(kept - often, rows - more) * max(0, whole - 1)
    return read / visits if visits else 0.0


def prefix_row_bytes(shape: ModelShape, max_length: int, form: str = "exact", value_bytes: int = 4) -> int:
    """What one kept row takes: length · hidden values of ``value_bytes`` each, or fewer in another form.

    Raises MechanismError for a form without a cost.
    """
    values = max_length * shape.hidden
    if form == "exact":
        return values * value_bytes
    if form == "fp16":
        return 2 * values + 4
    if form == "int8":
        group = next(g for g in range(min(PREFIX_GROUP, shape.hidden), 0, -1) if shape.hidden % g == 0)
        return values + values // group * 8
    raise MechanismError(f"no cost is known for kept hidden states in {form!r}", "exact, fp16 or int8")


@dataclass(frozen=True)
class RoundTime:
    """A device's seconds in a round: t = t_down + steps · t_step + t_up."""

    train_s: float
    up_s: float
    down_s: float

    @property
    def total_s(self) -> float:
        return self.train_s + self.up_s + self.down_s

    @property
    def link_s(self) -> float:
        return self.up_s + self.down_s


def link_s(size: int, bps: float | None) -> float:
    """Seconds for ``size`` bytes; 0 at an unknown rate, since a guess would pass for a measurement."""
    return 8.0 * size / bps if bps else 0.0


def round_time(
    fit: Fit,
    shape: ModelShape,
    lora: LoraShape,
    setting: Setting,
    *,
    steps: int,
    bytes_up: int,
    bytes_down: int,
    up_bps: float | None,
    down_bps: float | None,
    prefix_read: float = 0.0,
) -> RoundTime:
    """Time of a round of ``steps`` steps (accumulated ones counted one by one); see ``step_s``."""
    return RoundTime(
        train_s=steps * step_s(fit, shape, lora, setting, prefix_read=prefix_read),
        up_s=link_s(bytes_up, up_bps),
        down_s=link_s(bytes_down, down_bps),
    )


@lru_cache(maxsize=1024)
def update_bytes(shape: ModelShape, lora: LoraShape, depth: int, codec: str, factors: str = "AB") -> int:
    """Size of an update's container: ``factors`` of the top ``depth`` layers, and the dense parts.

    Raises MechanismError for a codec without a cost.
    """
    return _container_bytes(_parts(shape, lora, depth, _codec(codec).bits, factors), codec, kind_update=True)


@lru_cache(maxsize=64)
def version_bytes(shape: ModelShape, lora: LoraShape, codec: str = "fp16") -> int:
    """Size of a full version's container: LoRA of all layers, and the dense parts."""
    return _container_bytes(_parts(shape, lora, shape.layers, _codec(codec).bits), codec, kind_update=False)


def _codec(codec: str) -> CodecForm:
    try:
        return CODEC_FORMS[codec]
    except KeyError:
        raise MechanismError(
            f"no cost is known for the codec {codec!r}", f"codecs: {', '.join(CODEC_FORMS)}"
        ) from None


def _parts(
    shape: ModelShape, lora: LoraShape, depth: int, bits: int, factors: str = "AB"
) -> tuple[Part, ...]:
    parts = []
    for layer in range(shape.layers - depth, shape.layers):
        for module in shape.modules:
            parts += [
                Part(
                    layer=layer,
                    module=module.name,
                    factor=factor,  # type: ignore[arg-type]
                    rows=lora.rank,
                    width=module.inputs if factor == "A" else module.outputs,
                    bits=bits,  # type: ignore[arg-type]
                )
                for factor in factors
            ]
    for dense in shape.dense:
        rows = dense.shape[0] if len(dense.shape) > 1 else 1
        width = 1
        for size in dense.shape[1:] or dense.shape:
            width *= size
        parts.append(
            Part(
                layer=None,
                module=dense.name,
                factor="dense",
                role="dense",
                rows=rows,
                width=width,
                bits=bits,  # type: ignore[arg-type]
            )
        )
    return tuple(parts)


_DIGEST = "0" * 64
# Names and numbers of a run that the header spells out, and that differ from run to run.
_RUN = "x" * 16
_ROUND = 100


def _container_bytes(parts: tuple[Part, ...], codec: str, *, kind_update: bool) -> int:
    """Payload, scales, and the very header that the container would have, but for the run's name."""
    cost = CODEC_FORMS[codec]
    header = ContainerHeader(
        kind="update" if kind_update else "version",
        run=_RUN,
        round=_ROUND,
        version=None if kind_update else _ROUND,
        builds_on=_ROUND if kind_update else None,
        fingerprint=_DIGEST,
        codec=codec,
        parts=parts,
    )
    payload = 0
    entries: dict[str, object] = {"__metadata__": {METADATA_KEY: msgspec.json.encode(header).decode()}}
    for part in parts:
        size = part.rows * part.width * cost.bits // 8
        entries[part.key] = _entry(cost.dtype, [part.rows, part.width], payload, size)
        payload += size
        if cost.row_scales:
            entries[f"{part.key}.scale"] = _entry("F32", [part.rows], payload, 4 * part.rows)
            payload += 4 * part.rows
    text = len(msgspec.json.encode(entries))
    # safetensors: 8 bytes of length, then the JSON padded to a multiple of 8
    return 8 + (text + 7) // 8 * 8 + payload


def _entry(dtype: str, shape: list[int], start: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
