"""What a training holds, counted from the model's shape: no machine is known here, and nothing is measured.

Counted are bytes: of what a tuned layer keeps from its forward to its backward pass under each lever, of the
optimizer's state, and of what a pass needs besides while it works (its *room*). The highest of a step is
reached in one of a few phases, and ``cost`` takes the largest of them:

    frozen    a layer below the tuned ones computes; of the tuned ones only their state is there
    loss      everything is kept, and logits are made
    backward  everything is kept, and the top tuned layer goes back
    packed    the plain layers are done, and the top quantized layer goes back

Per token a layer keeps, with widths h (hidden), q and k (queries; keys, values) and i (feed-forward):

    none      norm inputs n h, inputs of attention and block 2 h, q + 2 k and the output q; i before and i
              after the function, with a gate 4 i
    outputs   norm outputs n h, q + 2 k; i, with a gate 2 i          inner    the same without i
    layer     h

Values that are packed take ``bits`` and a share of their group's scale and offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from edge_sdk.protocol.base_plan import QUANTIZED_WORDS
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Setting

__all__ = [
    "AGAIN_BYTES",
    "BITS",
    "CHUNK_VALUES",
    "GROUP",
    "KERNEL_BYTES",
    "LONGER",
    "RECOMPUTE",
    "SCORES",
    "UNPACKED_BYTES",
    "Counted",
    "Targets",
    "counted",
    "kept_values",
    "packed_bytes",
]

BITS = (8, 4, 2)
RECOMPUTE = ("none", "outputs", "inner", "layer")

GROUP = 32
"""Packed values that share a scale and an offset: of 4 bytes each at 8 bits, of 2 below."""

CHUNK_VALUES = 3 << 19
"""Inner values, of gate and up together, that the feed-forward block has at a time where it runs in chunks:
6 MB in fp32. Products of half as many rows are slower on some processors."""

LOSS_BYTES = 32 << 20
"""Logits of a causal LM that exist at a time, at most."""

DECODED_BYTES = 16 << 20
"""Of a weight of a packed base that is made whole at a time, at most."""

UNPACKED_BYTES = 1 << 25
"""Weights of a feed-forward block in a packed base are made whole once a pass where all of them together take
no more than this, and each no more than the above; else one at a time, in chunks ``LONGER`` times as long."""

LONGER = 4

AGAIN_BYTES = 1 << 24
"""Queries, keys and values of a layer up to which the attention inside the store unpacks them all, from the
output's making to its gradient."""

KERNEL_BYTES = 1 << 20
"""Queries that the fused kernel is run again for at a time otherwise, on a processor; it needs five times as
much. Where one row of the batch has more, its scores are made in blocks."""

SCORES = 1 << 18
"""Scores in such a block, three float32 each."""

_COMPOSED = {"gelu_new": 4, "gelu_fast": 4, "gelu_python": 3, "quick_gelu": 3, "relu2": 2}
"""Tensors of width i that an activation function saves which its model composes of several operations."""

_STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.04, "paged-adamw8bit": 2.04, "sgd": 0.0}
"""Moments of a trained value."""


@dataclass(frozen=True)
class Counted:
    """Bytes. ``plain`` and ``packed``: what a tuned layer keeps; the rest is named in the module's text."""

    plain: float
    packed: float
    state: float
    """Of a tuned layer's optimizer, and its gradients where they stay over batches."""
    head: float
    """State of the task's head, and the adapter that training began from."""
    edge: float
    """What is kept once: the input of the lowest tuned layer, or of a decoder's last norm."""
    plain_room: float
    packed_room: float
    frozen_room: float
    loss_room: float


@dataclass(frozen=True)
class Targets:
    """Which of a layer's linears have a trained A, and so keep their input."""

    attention: bool
    out: bool
    up: bool
    down: bool
    linears: int

    @classmethod
    def of(cls, shape: ModelShape, factors: str) -> Targets:
        kinds = [_kind(m.name, m.inputs, m.outputs, shape) for m in shape.modules]
        has_a = "A" in factors
        kept = {kind: has_a and kind in kinds for kind in ("attention", "out", "up", "down")}
        return cls(**kept, linears=len(kinds))


_OUT = ("o_proj", "out_lin", "c_proj", "dense")


def _kind(name: str, inputs: int, outputs: int, shape: ModelShape) -> str:
    if inputs == shape.intermediate and outputs == shape.hidden:
        return "down"
    last = name.rsplit(".", 1)[-1]
    if (
        inputs == shape.query_width
        and outputs == shape.hidden
        and last in _OUT
        and "intermediate" not in name
    ):
        return "out"
    return "up" if outputs in (shape.intermediate, shape.inner_width) else "attention"


def packed_bytes(bits: int) -> float:
    """Of one packed value."""
    return (bits + (64 if bits == 8 else 32) / GROUP) / 8


def value_bytes(base_precision: str) -> int:
    """Of one activation: the residual stream has the base's own dtype; that of a packed base is fp32."""
    return 2 if base_precision in ("bf16", "fp16") else 4


def kept_values(shape: ModelShape, targets: Targets, recompute: str, length: int, *, inside: bool) -> float:
    """Values as wide as the layer that it keeps of a token.

    ``inside``: attention is inside the activation store: keys and values are kept once for all the heads
    that read them, and its output only for who needs it.
    """
    h, q, k, i = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    if recompute == "layer":
        return h
    again = recompute in ("outputs", "inner")
    values = float(shape.norms * h)
    if not again:
        # beside the norms' inputs, what the linears behind them read
        values += (targets.attention + (targets.up and shape.norms > 1)) * h
    if shape.head_norms:
        values += q + k
    if not shape.fused_attention:
        values += q + 2 * k + q + 2 * shape.heads * length
    elif inside:
        values += q + 2 * k + (targets.out and not again) * q
    else:  # keys and values are repeated for every head that reads them; a single head is only viewed so
        values += 2 * q + 2 * (k if k * shape.heads == q else q)
    if recompute == "inner":
        return values
    if again:
        return values + shape.inner_width
    before = _COMPOSED.get(shape.activation, 1) * i
    return values + before + (2 * i if shape.gated else 0) + targets.down * i


@lru_cache(maxsize=4096)
def counted(shape: ModelShape, lora: LoraShape, setting: Setting) -> Counted:
    """Of a setting; its depth and its number of quantized layers do not matter here."""
    levers, recompute = setting.levers, setting.levers.recompute
    size, rows = value_bytes(setting.base_precision), setting.micro_batch * setting.max_length
    targets = Targets.of(shape, setting.factors)
    inside = shape.fused_attention
    per_value = packed_bytes(levers.activation_bits)

    def wide(of: str, packed: bool) -> float:
        return kept_values(shape, targets, of, setting.max_length, inside=inside and (packed or of != "none"))

    narrow = lora.rank * targets.linears * ("B" in setting.factors) * size + 8 * shape.norms
    if recompute == "layer":
        narrow = 0
    # torch's own fused attention keeps a sum for each row, and the mask as it computes with it
    sums = 4 * (shape.heads + setting.max_length) if inside and recompute == "none" else 0.0
    unit = float(rows * shape.hidden * size)
    values = sum(
        lora.rank * (m.inputs * ("A" in setting.factors) + m.outputs * ("B" in setting.factors))
        for m in shape.modules
    )
    per_trained = _STATE_BYTES.get(setting.optimizer, 8.0) + 4 * (setting.accumulation > 1)
    begun = 4.0 * (shape.layers * shape.lora_values(lora.rank) + shape.dense_values())
    plain_room, packed_room = _rooms(shape, targets, setting, rows, size)
    if recompute == "layer":  # the layer runs again, and keeps what lever outputs keeps
        again = kept_values(shape, targets, "outputs", setting.max_length, inside=False)
        inner = shape.inner_width
        besides = (2 - targets.down) * unit
        plain_room += rows * size * again + besides
        packed_room += rows * (size * (again - inner) + per_value * inner) + besides + targets.down * unit / 2
    decoded = _decoded(shape, setting)
    return Counted(
        plain=rows * (size * wide(recompute, False) + narrow + sums),
        packed=rows * (per_value * wide(recompute, True) + narrow),
        state=per_trained * values,
        head=(per_trained + 4) * shape.dense_values() + begun,
        edge=unit,
        plain_room=plain_room + decoded,
        packed_room=packed_room + decoded,
        frozen_room=unit * 2 + rows * size * _forward_inner(shape) + decoded,
        loss_room=_loss_room(shape, rows, unit) + decoded,
    )


def _forward_inner(shape: ModelShape) -> float:
    """Inner values of a plain block that exist at once in a forward pass, of a token."""
    return (3 if shape.gated else 2 + (shape.activation in _COMPOSED)) * shape.intermediate


def _rooms(
    shape: ModelShape, targets: Targets, setting: Setting, rows: int, size: int
) -> tuple[float, float]:
    """What the backward pass of a layer needs besides what is kept: of a plain layer, of a packed one.

    Reconstructed: gradients and remade values by the code, tensors as wide as the layer besides by what
    torch's profiler saw, to about half of one.
    """
    levers, kept_a = setting.levers, targets.down
    h, i = shape.hidden, shape.intermediate
    unit, inner = float(rows * h * size), float(rows * i * size)
    if levers.recompute == "none":
        if shape.gated:
            return 2 * inner + 3 * unit, 5 * inner + 3 * unit
        more = (_COMPOSED.get(shape.activation, 1) - 1) * inner
        # where the second linear's input is kept, it goes before the gradient of the inner values comes
        plain = 3 * unit + more / 2 + (0 if kept_a else inner)
        return plain, 2 * inner + 3 * unit + more + (0 if kept_a and levers.activation_bits == 8 else unit)
    plain, packed = _block_rooms(shape, targets, setting, rows, unit)
    # when attention goes back, what the block had kept is gone
    spent = rows * (h + (0 if levers.recompute == "inner" else shape.inner_width))
    held = 1.0 * rows * size * (shape.query_width + 2 * shape.key_width)
    gradients = 2 * unit + held
    if held <= AGAIN_BYTES:  # all is unpacked, and there is the output too
        unpacked = held
    elif 4 * setting.max_length * shape.query_width <= KERNEL_BYTES:
        unpacked = 5.0 * KERNEL_BYTES
    else:
        unpacked = 12.0 * min(SCORES, shape.heads * setting.max_length**2)
    plain = max(plain, gradients - size * spent)
    return plain, max(packed, gradients + unpacked - packed_bytes(levers.activation_bits) * spent)


def _block_rooms(
    shape: ModelShape, targets: Targets, setting: Setting, rows: int, unit: float
) -> tuple[float, float]:
    """Of the feed-forward block in chunks, which are of like size."""
    at_a_time = max(1, CHUNK_VALUES // shape.inner_width // 64) * 64
    weight = 4 * shape.hidden * shape.intermediate
    if setting.base_precision in QUANTIZED_WORDS and (
        weight > DECODED_BYTES or (2 + shape.gated) * weight > UNPACKED_BYTES
    ):
        at_a_time *= LONGER
    chunk = 4.0 * rows * shape.intermediate / -(-rows // at_a_time)
    if shape.gated:
        return 2 * unit + 3 * chunk, 2 * unit + 5 * chunk
    again, wide = setting.levers.recompute == "inner", 1.5 + targets.down
    return (wide - again) * unit + (1 + again) * chunk, (wide - again / 2) * unit + (2 + again) * chunk


def _loss_room(shape: ModelShape, rows: int, unit: float) -> float:
    if shape.dense:
        return 0.0
    # what the product of that size takes outside torch was seen in the process alone: a tenth
    return 1.1 * min(LOSS_BYTES, 4.0 * rows * shape.vocabulary) + 3 * unit


def _decoded(shape: ModelShape, setting: Setting) -> float:
    """Weights of a packed base that are made whole: those of a block in chunks once for all of them."""
    if setting.base_precision not in QUANTIZED_WORDS:
        return 0.0
    largest = max((m.inputs * m.outputs for m in shape.modules), default=shape.hidden**2)
    return float(min(4 * largest, DECODED_BYTES))
