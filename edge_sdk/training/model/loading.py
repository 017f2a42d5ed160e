"""Loads a base layer by layer: built empty, filled tensor by tensor, each held at once as it is to stay.

At no time is more in memory than what stays, and one tensor.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from edge_sdk.errors import BaseModelError
from edge_sdk.protocol.model import DensePart, LoraModule, LoraShape, ModelShape
from edge_sdk.training.allocator import trim
from edge_sdk.training.model.building import build_empty, read_config
from edge_sdk.training.model.checkpoint import Checkpoint, Entry, assign_names
from edge_sdk.training.model.folding import BaseWeight
from edge_sdk.training.model.frozen import FP32, BasePrecision, EmbeddingWeight, FrozenEmbedding, FrozenLinear
from edge_sdk.training.model.heads import (
    check_causal,
    check_classifier,
    head_modules,
    is_head,
    single_precision,
)
from edge_sdk.training.model.linear import LoraLinear
from edge_sdk.training.model.structure import (
    find_layers,
    form_of,
    is_transposed,
    linears_of,
    lora_modules,
    turned,
)
from edge_sdk.training.model.tunable import TunableModel
from edge_sdk.training.precision.weights import Dense, FrozenWeight

__all__ = ["load_model"]

_log = logging.getLogger(__name__)


def load_model(
    folder: Path,
    labels: tuple[str, ...],
    lora: LoraShape,
    device: Any,
    *,
    task: str = "classification",
    precision: BasePrecision = FP32,
    layers: str = "",
    check: Callable[[], None] = lambda: None,
) -> TunableModel:
    """Loads the base in ``folder`` and puts LoRA into the linears of its layers.

    Args:
        labels: of a classifier, in the order of the head's outputs.
        task: ``classification`` or ``causal-lm``.
        precision: what the base is held in.
        layers: path of the list of transformer layers; "": it is found.
        check: called between tensors; raises to end the loading.

    Raises:
        BaseModelError: no safetensors, weights that do not fit the config, not of the task's kind, or of a
            structure that is not known.
    """
    checkpoint = Checkpoint.open(folder)  # refuses pickles
    config = read_config(folder, labels, task)
    net, attention = build_empty(config, folder, task)
    path, stack = find_layers(net, config.num_hidden_layers, layers)
    modules, every = lora_modules(stack, lora), linears_of(stack[0])
    parameters = sum(p.numel() for p in net.parameters())
    intermediate = _intermediate(config, stack[0])

    filling = _Filling(net, path, precision, torch.device(device))
    fresh = filling.fill(checkpoint, check)
    dense = _dense_names(net, fresh) if task == "classification" else []
    base_bytes = filling.hold(modules, lora)
    if dense and precision.dtype != torch.float32:
        single_precision(net)

    shape = ModelShape(
        family=config.model_type,
        layers=len(stack),
        hidden=config.hidden_size,
        intermediate=intermediate,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        activation=_activation(config),
        fused_attention=attention == "edge",
        vocabulary=config.vocab_size,
        layer_path=path,
        modules=modules,
        dense=tuple(DensePart(name=name, shape=tuple(net.get_parameter(name).shape)) for name in dense),
        parameters=parameters,
        base_bytes=base_bytes,
    )
    shape = replace(shape, **form_of(stack[0], every, shape))
    linears = {f"{i}.{m.name}": layer.get_submodule(m.name) for i, layer in enumerate(stack) for m in modules}
    parts = {f"{key}.{factor}": getattr(linear, factor) for key, linear in linears.items() for factor in "AB"}
    parts.update({f"dense.{name}": net.get_parameter(name) for name in dense})
    model = TunableModel(
        net, shape, lora, stack, linears, parts, torch.device(device),
        task=task, precision=precision.word, attention=attention,
        sources={key: filling.sources[key] for key in linears},
    )  # fmt: skip
    if task == "causal-lm":
        output = net.get_output_embeddings()
        model.output_weight = output.frozen if isinstance(output, FrozenLinear) else Dense(output.weight)
        model.output_bias = output.bias
    model.tune(0)
    _check(model)
    _install_blocks(model)
    trim()
    return model


def _check(model: TunableModel) -> None:
    if model.task == "classification":
        check_classifier(model.net, model.logits, model.device)
    else:
        check_causal(model.net, model.device)


def _install_blocks(model: TunableModel) -> None:
    try:
        from edge_sdk.training.activations.blocks import install_blocks
    except ImportError:
        return
    model.blocks = install_blocks(model.layers)


def _intermediate(config: Any, layer: Any) -> int:
    """Width of the feed-forward block; where the config has no known word for it, the widest linear's."""
    for name in ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return max(m.outputs for m in linears_of(layer))


def _activation(config: Any) -> str:
    words = (getattr(config, name, None) for name in ("hidden_act", "activation_function", "activation"))
    return next((word for word in words if isinstance(word, str)), "")


def _dense_names(net: Any, fresh: set[str]) -> list[str]:
    """The head's weights, which are trained whole, and a pooler's that the checkpoint lacks."""
    heads = head_modules(net)
    if not heads:
        raise BaseModelError(f"a {type(net).__name__} has no classifier that is known here")
    return [name for name, _ in net.named_parameters() if name.split(".", 1)[0] in heads or name in fresh]


class _Filling:
    """Gives an empty model its weights."""

    def __init__(self, net: Any, layer_path: str, precision: BasePrecision, device: Any) -> None:
        self.net, self.precision, self.device = net, precision, device
        self._words = net.get_input_embeddings()
        self._output = net.get_output_embeddings()
        self._layers = net.get_submodule(layer_path)
        self._linears = {
            id(layer.get_submodule(linear.name)): (number, linear.name)
            for number, layer in enumerate(self._layers)
            for linear in linears_of(layer)
        }
        self._held: dict[str, FrozenWeight] = {}
        self.sources: dict[str, BaseWeight] = {}
        """Where the linears' weights lie in the checkpoint, by layer and name."""
        self._tied: dict[str, list[str]] = defaultdict(list)
        """By each name all names of the same tensor."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name, parameter in net.named_parameters(remove_duplicate=False):
            groups[id(parameter)].append(name)
            self._tied[name] = groups[id(parameter)]

    def fill(self, checkpoint: Checkpoint, check: Callable[[], None]) -> set[str]:
        """Fills all there is; returns the head's names that the checkpoint lacks. Raises BaseModelError."""
        places = set(self.net.state_dict())
        found = assign_names(checkpoint, self.net, places)
        self._untie(found)
        for place, entry in sorted(found.items(), key=lambda kv: (kv[1].path, kv[1].tensor.begin)):
            check()
            wanted = tuple(_tensor(self.net, place).shape)
            if entry.tensor.shape == wanted:
                self._note(place, entry)
                self._put(place, entry.read().to(self.device))
            elif not is_head(self.net, place):
                raise BaseModelError(
                    f"tensor {entry.tensor.name!r} in {checkpoint.folder} is {entry.tensor.shape}, "
                    f"the model of its config.json has {wanted}",
                    "config.json belongs to another model",
                )
        return self._begin_head(checkpoint)

    def _note(self, place: str, entry: Entry) -> None:
        owner, last = _owner(self.net, place)
        if last == "weight" and id(owner) in self._linears:
            key = _key(*self._linears[id(owner)])
            self.sources[key] = BaseWeight(entry, is_transposed(owner))

    def _untie(self, found: dict[str, Entry]) -> None:
        """Tensors that the config ties and the checkpoint has twice stay tied where they are the same."""
        for names in {id(group): group for group in self._tied.values() if len(group) > 1}.values():
            twice = [name for name in names if name in found]
            first = twice[0] if twice else ""
            for name in twice[1:]:
                same = found[name].tensor.dtype == found[first].tensor.dtype
                if same and found[name].digest() == found[first].digest():
                    del found[name]
                    continue
                _log.warning("%s stays apart from %s, which the config ties it to", name, first)
                owner, last = _owner(self.net, name)
                setattr(owner, last, nn.Parameter(getattr(owner, last).clone(), requires_grad=False))
                names.remove(name)
                self._tied[name] = [name]

    def _put(self, place: str, values: Any) -> None:
        """Holds a tensor as it is to stay, at every place that it is tied to."""
        owner, last = _owner(self.net, place)
        if last in owner._buffers:
            owner._buffers[last] = values.to(owner._buffers[last].dtype)
        elif id(owner) in self._linears and last == "weight" and self._is_packed:
            key = _key(*self._linears[id(owner)])
            self._held[key] = self.precision.weight(key, turned(owner, values))
            setattr(owner, last, None)
        elif not (self._is_vocabulary(place) and self._put_packed(place, values)):
            # a classifier's head is trained, in fp32; an output layer is as frozen as the base
            trained = (
                is_head(self.net, place) and owner is not self._output and not self._is_vocabulary(place)
            )
            dtype = torch.float32 if trained else self.precision.dtype
            parameter = nn.Parameter(values.to(dtype), requires_grad=False)
            for name in self._tied[place]:
                module, last = _owner(self.net, name)
                setattr(module, last, parameter)

    @property
    def _is_packed(self) -> bool:
        return self.precision.make_weight is not None

    def _is_vocabulary(self, place: str) -> bool:
        owners = [_owner(self.net, name) for name in self._tied[place]]
        return any(o in (self._words, self._output) and last == "weight" for o, last in owners)

    def _put_packed(self, place: str, values: Any) -> bool:
        """An embedding or output layer as the precision makes it; False: it is left to be held whole."""
        make = self.precision.make_embedding
        frozen = make(place, values) if make else None
        if frozen is None:
            return False
        made: dict[str, nn.Module] = {}
        for name in self._tied[place]:
            owner, _ = _owner(self.net, name)
            made[name] = (
                self._embedding(owner, frozen, values)
                if isinstance(owner, nn.Embedding)
                else FrozenLinear(frozen, owner.bias)
            )
        for name, module in made.items():
            parent, last = _owner(self.net, name.rpartition(".")[0])
            setattr(parent, last, module)
            self._tied.pop(name)
        return True

    def _embedding(self, owner: Any, frozen: EmbeddingWeight, values: Any) -> FrozenEmbedding:
        """Raises BaseModelError where the embedding does more than to look up rows and to scale them."""
        scale = getattr(owner, "embed_scale", None)
        if scale is not None and not torch.is_tensor(scale):
            scale = torch.tensor(float(scale))
        ids = torch.arange(min(4, len(values)), device=self.device)
        few = values[ids].to(self.precision.dtype)
        owner.weight = nn.Parameter(few, requires_grad=False)
        with torch.no_grad():
            whole = owner.to(self.device)(ids)
        if not torch.equal(whole, few if scale is None else few * scale.to(self.device, few.dtype)):
            raise BaseModelError(
                f"a {type(owner).__name__} does more than to look up rows: it cannot be held in 8 bits",
                "choose a base precision that leaves embeddings as they are",
            )
        return FrozenEmbedding(frozen, self.precision.dtype, scale)

    def _begin_head(self, checkpoint: Checkpoint) -> set[str]:
        """First values of what the checkpoint lacks, where that is the head's; a run's replace them."""
        missing = {n for n, p in self.net.named_parameters(remove_duplicate=False) if p.device.type == "meta"}
        output = {n for n in missing if _owner(self.net, n)[0] is self._output}
        lacking = sorted(n for n in missing if n in output or not is_head(self.net, n))
        if lacking:
            raise BaseModelError(
                f"the checkpoint in {checkpoint.folder} lacks {len(lacking)} weights of the model: "
                f"{', '.join(lacking[:3])}",
                "the file is incomplete, or config.json belongs to another model",
            )
        draw = torch.Generator().manual_seed(0)
        for name in sorted(missing):
            owner, last = _owner(self.net, name)
            values = torch.zeros(getattr(owner, last).shape)
            if values.dim() > 1:
                values.normal_(0.0, 0.02, generator=draw)
            elif not name.endswith("bias"):
                values.fill_(1.0)
            setattr(owner, last, nn.Parameter(values.to(self.device), requires_grad=False))
        return missing

    def hold(self, modules: tuple[LoraModule, ...], lora: LoraShape) -> int:
        """Puts LoRA into the linears and moves what is left to the device; returns the base's bytes."""
        chosen = {m.name for m in modules}
        for number, name in self._linears.values():
            layer, key = self._layers[number], _key(number, name)
            linear, frozen = layer.get_submodule(name), self._held.pop(key, None)
            made: nn.Module
            if name in chosen:
                weight = frozen or self.precision.weight(key, turned(linear, linear.weight))
                made = LoraLinear(weight, linear.bias, rank=lora.rank, scaling=lora.scaling)
            elif frozen is not None:
                made = FrozenLinear(frozen, linear.bias)
            else:
                continue
            parent, last = _owner(layer, name)
            setattr(parent, last, made)
        self.net.to(self.device)
        return _bytes(self.net)


def _key(layer: int, module: str) -> str:
    return f"{layer}.{module}"


def _owner(net: Any, name: str) -> tuple[Any, str]:
    path, _, last = name.rpartition(".")
    return net.get_submodule(path), last


def _tensor(net: Any, name: str) -> Any:
    owner, last = _owner(net, name)
    return getattr(owner, last)


def _bytes(net: Any) -> int:
    """Bytes of the weights as they are held; LoRA is not of the base."""
    total, seen = 0, set()
    adapted = {id(t) for m in net.modules() if isinstance(m, LoraLinear) for t in (m.A, m.B)}
    packed = {id(p) for m in net.modules() if isinstance(m, FrozenWeight) for p in m.parameters()}
    for module in net.modules():
        if isinstance(module, FrozenWeight) and id(module) not in seen:
            seen.add(id(module))
            total += module.nbytes
    for parameter in net.parameters():
        if id(parameter) not in adapted | packed:
            total += parameter.numel() * parameter.element_size()
    return total
