"""A model's shape from its ``config.json``, without transformers: what can be planned before any download.

What a live model is asked for by its structure stands here by family, in one table; a test holds the two
together. A family that is not in the table is refused: a wrong guess would pass for a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_sdk.config.problems import shown
from edge_sdk.errors import BaseModelError
from edge_sdk.planning.precision import held_bytes
from edge_sdk.protocol.base_plan import QUANTIZED_WORDS
from edge_sdk.protocol.model import DensePart, LoraModule, LoraShape, ModelShape

__all__ = ["FAMILIES", "held_base_bytes", "positions_of", "shape_of", "task_of"]

Kind = Literal["q", "kv", "qkv", "o", "up", "both", "down"]
_SPLIT: tuple[tuple[str, Kind], ...] = (
    ("self_attn.q_proj", "q"), ("self_attn.k_proj", "kv"), ("self_attn.v_proj", "kv"),
    ("self_attn.o_proj", "o"), ("mlp.gate_proj", "up"), ("mlp.up_proj", "up"), ("mlp.down_proj", "down"),
)  # fmt: skip


def _bert(query: str, key: str, value: str) -> tuple[tuple[str, Kind], ...]:
    return (
        (f"attention.self.{query}", "q"), (f"attention.self.{key}", "kv"), (f"attention.self.{value}", "kv"),
        ("attention.output.dense", "o"), ("intermediate.dense", "up"), ("output.dense", "down"),
    )  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """What a family's code fixes. ``biases``: of the linears; ``head``: shapes of its parts, in order, of a
    width h and n labels; ``beside``: values beside vocabulary and layers, as multiples of the width."""

    base: str
    layers: str
    linears: tuple[tuple[str, Kind], ...]
    head: tuple[tuple[str, str], ...] = (("score.weight", "nh"),)
    biases: Literal["all", "qkv", "none", "config"] = "none"
    norm_values: int = 1
    """Vectors that a norm holds: a weight, or weight and bias."""
    norms: int = 2
    gated: bool = True
    head_norms: bool = False
    fused: bool = True
    transposed: bool = False
    positions: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()


_CLASSIFIER = (("classifier.weight", "nh"), ("classifier.bias", "n"))


def _encoder(
    base: str,
    layers: str,
    linears: tuple[tuple[str, Kind], ...],
    *before: tuple[str, str],
    head: tuple[tuple[str, str], ...] = _CLASSIFIER,
    **more: Any,
) -> _Family:
    return _Family(
        base,
        layers,
        linears,
        (*before, *head),
        biases="all",
        norm_values=2,
        gated=False,
        positions=True,
        **more,
    )


FAMILIES: Mapping[str, _Family] = {
    "bert": _encoder("bert", "encoder.layer", _bert("query", "key", "value")),
    "roberta": _encoder(
        "roberta", "encoder.layer", _bert("query", "key", "value"),
        ("classifier.dense.weight", "hh"), ("classifier.dense.bias", "h"),
        head=(("classifier.out_proj.weight", "nh"), ("classifier.out_proj.bias", "n")),
    ),
    "distilbert": _encoder(
        "distilbert", "transformer.layer",
        (("attention.q_lin", "q"), ("attention.k_lin", "kv"), ("attention.v_lin", "kv"),
         ("attention.out_lin", "o"), ("ffn.lin1", "up"), ("ffn.lin2", "down")),
        ("pre_classifier.weight", "hh"), ("pre_classifier.bias", "h"), defaults=(("activation", "gelu"),),
    ),
    "deberta-v2": _encoder(
        "deberta", "encoder.layer", _bert("query_proj", "key_proj", "value_proj"),
        ("pooler.dense.weight", "hh"), ("pooler.dense.bias", "h"), fused=False,
    ),
    "gpt2": _Family(
        "transformer", "h",
        (("attn.c_attn", "qkv"), ("attn.c_proj", "o"), ("mlp.c_fc", "up"), ("mlp.c_proj", "down")),
        biases="all", norm_values=2, gated=False, transposed=True, positions=True,
        defaults=(("activation_function", "gelu_new"), ("tie_word_embeddings", True)),
    ),
    "llama": _Family("model", "layers", _SPLIT, biases="config"),
    "mistral": _Family("model", "layers", _SPLIT),
    "qwen2": _Family("model", "layers", _SPLIT, biases="qkv"),
    "qwen3": _Family(
        "model", "layers", _SPLIT, biases="config", head_norms=True, defaults=(("head_dim", 128),)
    ),
    "gemma": _Family(
        "model", "layers", _SPLIT, biases="config",
        defaults=(("head_dim", 256), ("tie_word_embeddings", True), ("hidden_act", "gelu_pytorch_tanh")),
    ),
    "phi": _Family(
        "model", "layers",
        (("self_attn.q_proj", "q"), ("self_attn.k_proj", "kv"), ("self_attn.v_proj", "kv"),
         ("self_attn.dense", "o"), ("mlp.fc1", "up"), ("mlp.fc2", "down")),
        biases="all", norm_values=2, norms=1, gated=False, defaults=(("hidden_act", "gelu_new"),),
    ),
    "phi3": _Family(
        "model", "layers",
        (("self_attn.o_proj", "o"), ("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", "both"),
         ("mlp.down_proj", "down")),
    ),
}  # fmt: skip

_NAMES = {
    "layers": ("num_hidden_layers", "n_layers", "n_layer"),
    "hidden": ("hidden_size", "dim", "n_embd"),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "vocabulary": ("vocab_size",),
}
_LARGEST = 100_000_000
"""Of any figure in a config: a hundred times what the widest models have. What is above is a slip."""
_MOST_LAYERS = 1000
_TYPED = frozenset({"bert", "roberta"})
"""Families with an embedding of token types."""


def shape_of(
    config: Mapping[str, Any], *, task: str = "classification", labels: int = 2, lora: LoraShape | None = None
) -> ModelShape:
    """The shape of the model of a ``config.json``; weights as they rest in fp32.

    Raises:
        BaseModelError: a family that is not known here, or a config that lacks what its family has, or says
            what no model can be.
    """
    word = config.get("model_type")
    family = FAMILIES.get(word) if isinstance(word, str) else None
    if family is None:
        raise BaseModelError(
            "config.json names no model_type"
            if word is None
            else f"models of type {word!r:.60} cannot be planned from their config.json",
            f"those that can: {', '.join(sorted(FAMILIES))}",
        )
    config = {**dict(family.defaults), **config}
    found = {name: _number(config, names) for name, names in _NAMES.items()}
    hidden, heads, layers = found["hidden"], found["heads"], found["layers"]
    kv_heads, head_size = _given(config, "num_key_value_heads") or heads, _given(config, "head_dim")
    _check(layers, hidden, heads, kv_heads, head_size)
    shape = ModelShape(
        family=str(word),
        intermediate=_given(config, "intermediate_size", "hidden_dim", "n_inner") or 4 * hidden,
        kv_heads=kv_heads,
        head_size=head_size or hidden // heads,
        gated=family.gated,
        activation=_word(config, "hidden_act", "activation_function", "activation") or "silu",
        norms=family.norms,
        head_norms=family.head_norms,
        fused_attention=family.fused,
        layer_path=f"{family.base}.{family.layers}",
        modules=(),
        dense=(),
        parameters=0,
        base_bytes=0,
        **found,
    )
    every = _modules(shape, family)
    dense = _dense(family, hidden, labels) if task == "classification" else ()
    layer = sum(m.inputs * m.outputs for m in every) + _biases(shape, family, config)
    layer += family.norm_values * family.norms * hidden + 2 * family.head_norms * shape.head_size
    parameters = layers * layer + _outside(shape, family, config, task) + sum(map(_size, dense))
    return ModelShape(
        **{
            **{name: getattr(shape, name) for name in shape.__struct_fields__},
            "modules": _targets(every, (lora or LoraShape()).targets),
            "dense": dense,
            "parameters": parameters,
            "base_bytes": 4 * parameters,
        }
    )


def task_of(config: Mapping[str, Any]) -> str:
    """What the model of a ``config.json`` was made for, by its class; classification where it names none.

    Raises:
        BaseModelError: ``architectures`` is no list of names.
    """
    kinds = config.get("architectures") or [""]
    if not isinstance(kinds, list) or not isinstance(kinds[0], str):
        raise BaseModelError(
            f"config.json: architectures is {shown(kinds)}, no list of names", "say with --task what to train"
        )
    return "causal-lm" if kinds[0].endswith(("ForCausalLM", "LMHeadModel")) else "classification"


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The most tokens that the model of a ``config.json`` can take; None: nothing in its weights says so."""
    word = config.get("model_type")
    family = FAMILIES.get(word) if isinstance(word, str) else None
    if family is None or not family.positions or not config.get("position_biased_input", True):
        return None
    known = _given(config, "max_position_embeddings", "n_positions") or 512
    # RoBERTa counts positions from behind the padding token's own, which is its second
    return known - 2 if word == "roberta" else known


def held_base_bytes(shape: ModelShape, word: str) -> int:
    """Bytes of the base held in another precision; embeddings and output layer of a packed one in 8 bits."""
    if word not in QUANTIZED_WORDS:
        return shape.base_bytes if word == "fp32" else shape.base_bytes // 2
    kind = "nf4" if word == "plan" else word
    weights = shape.linear_weights
    packed = held_bytes(kind, weights // shape.hidden, shape.hidden)
    outside = max(0, shape.parameters - shape.layers * weights - shape.dense_values())
    rows = held_bytes("int8", outside // shape.hidden, shape.hidden)
    return shape.layers * packed + rows + 4 * shape.dense_values()


def _modules(shape: ModelShape, family: _Family) -> tuple[LoraModule, ...]:
    h, q, k, inner = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    sizes: dict[Kind, tuple[int, int]] = {
        "q": (h, q), "kv": (h, k), "qkv": (h, q + 2 * k), "o": (q, h), "up": (h, inner),
        "both": (h, 2 * inner), "down": (inner, h),
    }  # fmt: skip
    return tuple(
        LoraModule(
            name=name, inputs=sizes[kind][0], outputs=sizes[kind][1], transposed=family.transposed
        )
        for name, kind in family.linears
    )  # fmt: skip


def _targets(every: Sequence[LoraModule], targets: Sequence[str]) -> tuple[LoraModule, ...]:
    if tuple(targets) == ("all-linear",):
        return tuple(every)
    found = tuple(m for m in every if {m.name, m.name.rsplit(".", 1)[-1]} & set(targets))
    if not found:
        raise BaseModelError(
            f"no linear of a layer is called {', '.join(targets)}",
            f"lora.targets may name {', '.join(m.name for m in every)}, or be all-linear",
        )
    return found


def _biases(shape: ModelShape, family: _Family, config: Mapping[str, Any]) -> int:
    outputs = {m.name: m.outputs for m in _modules(shape, family)}
    attention = {name for name, kind in family.linears if kind in ("q", "kv", "qkv", "o")}
    reads = {name for name, kind in family.linears if kind in ("q", "kv", "qkv")}
    if family.biases == "all":
        return sum(outputs.values())
    if family.biases == "qkv":
        return sum(outputs[name] for name in reads)
    if family.biases == "config":
        some = attention if config.get("attention_bias") else set()
        more = set(outputs) - attention if config.get("mlp_bias") else set()
        return sum(outputs[name] for name in some | more)
    return 0


def _outside(shape: ModelShape, family: _Family, config: Mapping[str, Any], task: str) -> int:
    """Values outside of the layers, without a classifier's head."""
    vectors = shape.vocabulary + family.norm_values
    if family.positions and config.get("position_biased_input", True):
        vectors += _given(config, "max_position_embeddings", "n_positions") or 512
    if shape.family in _TYPED:
        types = _whole(config, "type_vocab_size")
        vectors += 2 if types is None else max(0, types)
    if shape.family == "deberta-v2":  # relative positions, and the norm over them
        buckets = _given(config, "position_buckets") or _given(config, "max_position_embeddings") or 512
        vectors += 2 * buckets + family.norm_values if config.get("relative_attention") else 0
    pooler = shape.hidden * (shape.hidden + 1) if shape.family == "bert" else 0
    output = 0
    if task == "causal-lm" and not config.get("tie_word_embeddings", False):
        output = shape.vocabulary * shape.hidden
    return vectors * shape.hidden + pooler + output


def _dense(family: _Family, hidden: int, labels: int) -> tuple[DensePart, ...]:
    sizes = {"h": hidden, "n": labels}
    return tuple(DensePart(name=name, shape=tuple(sizes[c] for c in form)) for name, form in family.head)


def _size(part: DensePart) -> int:
    return part.shape[0] * (part.shape[1] if len(part.shape) > 1 else 1)


def _check(layers: int, hidden: int, heads: int, kv_heads: int, head_size: int | None) -> None:
    wrong = ""
    if layers > _MOST_LAYERS:
        wrong = f"{layers} layers, and {_MOST_LAYERS} are the most that are planned"
    elif head_size is None and heads > hidden:
        wrong = f"{heads} attention heads in a width of {hidden}, which leaves each less than one value"
    elif head_size is None and hidden % heads:
        wrong = f"{heads} attention heads, which a width of {hidden} cannot be shared among evenly"
    elif heads % kv_heads:
        wrong = f"{kv_heads} heads of keys and values, which {heads} attention heads cannot share evenly"
    if wrong:
        raise BaseModelError(f"config.json says {wrong}", "it is no config of a model that could be loaded")


def _given(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these that is above 0: null, 0 and below say that the model has none."""
    values = (_whole(config, name) for name in names)
    return next((value for value in values if value is not None and value > 0), None)


def _whole(config: Mapping[str, Any], name: str) -> int | None:
    """None where it is missing or null; 768.0 is 768. Raises BaseModelError where it is no whole number."""
    value = config.get(name)
    if value is None:
        return None
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or value != value // 1 or value > _LARGEST:
        raise BaseModelError(
            f"config.json: {name} is {shown(value)}; allowed: a whole number up to {_LARGEST}",
            "a model's config.json holds plain numbers there",
        )
    return int(value)


def _word(config: Mapping[str, Any], *names: str) -> str | None:
    return next((v for v in (config.get(name) for name in names) if isinstance(v, str)), None)


def _number(config: Mapping[str, Any], names: Sequence[str]) -> int:
    value = _given(config, *names)
    if value is None:
        raise BaseModelError(
            f"config.json has no {names[0]}, which models of type {config.get('model_type')!r} have",
            "it is no config of a whole model, or another version of transformers wrote it",
        )
    return value
