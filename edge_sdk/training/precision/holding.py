"""From a word to a base that is held so: what the loader calls for each weight that it has read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from edge_sdk.errors import MechanismError
from edge_sdk.protocol.base_plan import BASE_WORDS, QUANTIZED_WORDS, WORD_OF_BITS, BasePlan
from edge_sdk.training.model.frozen import BasePrecision, EmbeddingWeight
from edge_sdk.training.precision import kernels
from edge_sdk.training.precision.int8 import Int8
from edge_sdk.training.precision.nf4 import Nf4
from edge_sdk.training.precision.two_bit import TwoBit
from edge_sdk.training.precision.weights import Dense, FrozenWeight

__all__ = ["available", "base_precision", "compute_dtype", "hold", "told"]

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKED: dict[str, Callable[[Any, Any], FrozenWeight]] = {
    "int8": Int8.encode, "nf4": Nf4.encode, "int2": TwoBit.encode,
}  # fmt: skip


def base_precision(word: str, device: Any, plan: BasePlan | None = None) -> BasePrecision:
    """What the loader asks for every frozen weight of a base that is held as ``word``.

    Args:
        word: one of ``BASE_WORDS``. The quantized ones hold embeddings and output layer in 8 bits; norms,
            biases and the head stay as they are.
        plan: for the word ``plan``: the bits of each block.

    Raises MechanismError where the device has not got it, and says why.
    """
    device = torch.device(device)
    why = available(word, device)
    if why is not None:
        raise MechanismError(
            f"a base in {word} is not to be had on {device}: {why}", "choose another trainer.base_precision"
        )
    if (plan is None) is (word == "plan"):
        raise MechanismError(
            f"base precision {word} comes {'without' if plan is None else 'with'} a plan",
            "name the plan as trainer.base_plan, and no trainer.base_precision",
        )
    dtype = compute_dtype(word, device)
    if word not in QUANTIZED_WORDS:
        return BasePrecision(word, dtype)

    def weight(key: str, tensor: Any) -> FrozenWeight:
        if plan is None:
            return hold(tensor, word, device)
        layer = int(key.split(".", 1)[0])
        if layer >= len(plan.blocks):
            raise MechanismError(
                f"the base has a block {layer}, its plan ends after {len(plan.blocks)}",
                "the plan was made for another base: make it anew with edge-agent quantize-base",
            )
        return hold(tensor, WORD_OF_BITS[plan.blocks[layer].bits], device)

    def embedding(name: str, tensor: Any) -> EmbeddingWeight:  # noqa: ARG001
        return Int8.encode(tensor, device)

    return BasePrecision(word, dtype, weight, embedding)


def hold(tensor: Any, word: str, device: Any) -> FrozenWeight:
    """W (out, in) of any floating dtype as ``word`` on ``device``; what is given may be let go of.

    fp16 leaves bf16 as it is, and becomes bf16 where the values leave its range.
    """
    if word in _PACKED:
        return _PACKED[word](tensor, device)
    dtype = _FLOATS[word]
    if word == "fp16" and (tensor.dtype == torch.bfloat16 or _largest(tensor) > 65504.0):
        dtype = torch.bfloat16
    return Dense(tensor.to(device=device, dtype=dtype))


def _largest(tensor: Any) -> float:
    least, most = torch.aminmax(tensor)  # without a copy
    return max(-float(least), float(most))


def compute_dtype(word: str, device: Any) -> Any:
    """What is computed in, and what the residual stream is: the base's own dtype; of a quantized base fp32 on
    a CPU, and bf16 on a GPU that has it."""
    if word in _FLOATS:
        return _FLOATS[word]
    if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def available(word: str, device: Any) -> str | None:
    """Why a base cannot be held as ``word`` on ``device``; None: it can. Found by doing it once, small."""
    if word not in BASE_WORDS:
        return f"there is no such precision; there are {', '.join(BASE_WORDS)}"
    return _tried(word, torch.device(device))


@cache
def _tried(word: str, device: Any) -> str | None:
    try:
        dtype = compute_dtype(word, device)
        for one in _PACKED if word == "plan" else (word,):
            weight = hold(torch.eye(64), one, device)
            x = torch.ones(2, 64, dtype=dtype, device=device)
            y = weight.input_grad(weight(x))
            if not bool(torch.isfinite(y.float()).all()):
                return f"{one} gives {y.flatten()[0].item()} where it should give 1"
    except Exception as error:  # torch's and the driver's errors have no common base
        return f"{type(error).__name__}: {(str(error).strip() or 'no word said').splitlines()[0][:300]}"
    return None


def told(word: str, device: Any) -> str:
    """The word and who decodes it, for logs and reports: ``nf4 by bitsandbytes 0.50.2``."""
    if word not in QUANTIZED_WORDS:
        return word
    of = "nf4" if word == "plan" else word
    return f"{word} by {kernels.implementation(of, torch.device(device))}"
