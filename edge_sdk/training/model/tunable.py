"""The resident model with what is tuned in it, by part keys.

Keys are those of ``edge_sdk.updates``: LoRA factors slot-major, A (rank, in) and B transposed (rank, out),
and the dense parts of the head, (rows, rest).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_sdk.errors import BaseModelError, ContainerError
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.training.model.folding import FOLD, BaseWeight, Folding
from edge_sdk.training.model.heads import base_of, reads_last, run_head
from edge_sdk.training.model.linear import LoraLinear
from edge_sdk.training.precision.weights import FrozenWeight
from edge_sdk.updates.keys import Adapter

__all__ = ["TunableModel"]


@dataclass
class TunableModel:
    """A model with its tunable parts.

    Attributes:
        net: the model as transformers has it, LoRA inside.
        layers: its transformer layers, from the input.
        linears: LoRA linears by ``"{layer}.{module}"``.
        parts: every part by its key: whole factors, and the head's tensors. What an optimizer moves is
            ``trained()``, which differs where slots are chosen.
        task: ``classification`` or ``causal-lm``.
        precision: what the base is held in, as a word.
        attention: ``edge`` (inside the activation store), ``sdpa`` or ``eager``.
        blocks: what was found and exchanged inside the layers, as told by ``install_blocks``.
        output_weight: of a causal language model: the output layer, (vocabulary, hidden), frozen.
        sources: where the frozen weights of ``linears`` lie in the base's files.
        folding: what the present version has folded into them.
        check: to be called in the course of long computations; may raise to end them.
    """

    net: Any
    shape: ModelShape
    lora: LoraShape
    layers: Any
    linears: dict[str, LoraLinear]
    parts: dict[str, Any]
    device: torch.device
    task: str = "classification"
    precision: str = "fp32"
    attention: str = "sdpa"
    blocks: Any = None
    output_weight: FrozenWeight | None = None
    output_bias: Any = None
    sources: dict[str, BaseWeight] = field(default_factory=dict)
    folding: Folding = field(default_factory=Folding)
    check: Callable[[], None] = lambda: None

    def check_length(self, max_length: int) -> None:
        """Raises BaseModelError where the model has no positions for so many tokens."""
        known = getattr(self.net.config, "max_position_embeddings", None)
        words = self.net.get_input_embeddings()
        for module in self.net.modules():
            if isinstance(module, nn.Embedding) and module is not words and module.num_embeddings == known:
                # RoBERTa counts positions from behind the padding token's own
                longest = known - (0 if module.padding_idx is None else module.padding_idx + 1)
                if max_length > longest:
                    raise BaseModelError(
                        f"max_length is {max_length}, this base model takes {longest} tokens at most",
                        "lower training.max_length in run.toml",
                    )

    def hidden(self, ids: Any, mask: Any) -> Any:
        """What the head or the output layer reads: (batch, length, hidden), after the final norm."""
        return base_of(self.net)(input_ids=ids, attention_mask=mask).last_hidden_state

    def encode(self, ids: Any, mask: Any) -> Any:
        """The classifier's input, (batch, 1, hidden): an encoder's first token, a decoder's last real one."""
        hidden = self.hidden(ids, mask)
        if not reads_last(self.net):
            return hidden[:, :1]
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * (mask > 0)).argmax(1)
        return hidden[torch.arange(len(last), device=last.device), last].unsqueeze(1)

    def head(self, first: Any) -> Any:
        """Logits (batch, labels), fp32, from what ``encode`` gives."""
        return run_head(self.net, first.float())

    def logits(self, ids: Any, mask: Any) -> Any:
        """A classifier's logits (batch, labels)."""
        return self.head(self.encode(ids, mask))

    def next_logits(self, ids: Any, mask: Any) -> Any:
        """A language model's logits (batch, length, vocabulary), all at once: for small inputs."""
        if self.output_weight is None:
            raise ValueError("the model was loaded as a classifier")
        return self.output_weight(self.hidden(ids, mask), self.output_bias)

    def tune(self, depth: int, *, slots: Sequence[int] | None = None, factors: str = "AB") -> list[str]:
        """Trains the top ``depth`` layers and the head; returns the trained keys.

        What is frozen has no gradient, so nothing that an optimizer or its weight decay could move; frozen
        LoRA still counts in the forward pass.

        Args:
            slots: rank-1 pairs that are trained; None: all.
            factors: ``AB``, ``A`` or ``B``.
        """
        if not 0 <= depth <= self.shape.layers:
            raise ValueError(f"LoRA depth {depth} is outside 0..{self.shape.layers}")
        if factors not in ("AB", "A", "B"):
            raise ValueError(f"factors must be AB, A or B, received {factors!r}")
        if slots is not None and not all(0 <= slot < self.lora.rank for slot in slots):
            raise ValueError(f"slots {tuple(slots)} are outside 0..{self.lora.rank - 1}")
        bottom = self.shape.layers - depth
        for key, linear in self.linears.items():
            tuned = int(key.split(".", 1)[0]) >= bottom and (slots is None or len(slots) > 0)
            linear.tune(factors if tuned else "", slots)
        for key, parameter in self.parts.items():
            if key.startswith("dense."):
                parameter.requires_grad_(True)
                parameter.grad = None
        return list(self.trained())

    def trained(self) -> dict[str, Any]:
        """The tensors that an optimizer may move, by part key, in the order of the parts.

        A is (slots, in), B (out, slots): of chosen slots, tensors of their own, which go back into the whole
        factors at the next ``tune``.
        """
        found: dict[str, Any] = {}
        for key, linear in self.linears.items():
            found.update({f"{key}.{factor}": tensor for factor, tensor in linear.trained().items()})
        dense = {key: part for key, part in self.parts.items() if key.startswith("dense.")}
        found.update({key: parameter for key, parameter in dense.items() if parameter.requires_grad})
        return found

    def set_adapter(self, adapter: Adapter) -> None:
        """Copies every part into the model, exactly, and ends what ``tune`` began in the layers. What the
        version has folded into the base comes into its weights.

        Raises ContainerError where parts or shapes differ, MechanismError for folds where the base is
        quantized.
        """
        whole, adapter = adapter, {key: rows for key, rows in adapter.items() if not key.startswith(FOLD)}
        if adapter.keys() != self.parts.keys():
            odd = sorted(adapter.keys() ^ self.parts.keys())
            raise ContainerError(
                f"the adapter's parts are not this model's: {len(odd)} differ, {odd[0]} first",
                "the version belongs to another base, LoRA shape or label set",
            )
        for key, parameter in self.parts.items():
            given, stored = tuple(adapter[key].shape), _stored_shape(key, parameter)
            if given != stored:
                raise ContainerError(f"part {key} is {given}, the model's is {stored}")
        self.tune(0)
        self.folding.become(whole, self.linears, self.sources)
        with torch.no_grad():
            for key, parameter in self.parts.items():
                value = torch.tensor(adapter[key], dtype=torch.float32)
                parameter.copy_(value.t() if _is_b(key) else value.reshape(parameter.shape))

    def adapter(self, keys: Sequence[str] | None = None) -> Adapter:
        """The model's parts as they are now, slot-major, float32, owned by the caller."""
        result: Adapter = {}
        for key in self.parts if keys is None else keys:
            value = self._value(key)
            value = value.t() if _is_b(key) else value.reshape(_stored_shape(key, value))
            result[key] = value.cpu().contiguous().clone().numpy()
        return result

    def _value(self, key: str) -> Any:
        if key.startswith("dense."):
            return self.parts[key].detach()
        linear, _, factor = key.rpartition(".")
        return self.linears[linear].factors()["AB".index(factor)].detach()


def _is_b(key: str) -> bool:
    return key.endswith(".B") and not key.startswith("dense.")


def _stored_shape(key: str, parameter: Any) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    if key.startswith("dense."):
        return (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else (1, shape[0])
    return shape[::-1] if key.endswith(".B") else shape
