"""The model without its weights: parameters on the meta device, constants as its own code makes them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from edge_sdk.errors import BaseModelError

__all__ = ["build_empty", "read_config"]

_lock = threading.Lock()
_AUTO = {"classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}
_WHAT = {"classification": "a sequence classifier", "causal-lm": "a causal language model"}


def read_config(folder: Path, labels: tuple[str, ...], task: str) -> Any:
    """The base's config, for ``task``. Raises BaseModelError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _unfit(folder, task, error) from error
    if getattr(config, "quantization_config", None) is not None:
        raise BaseModelError(
            f"the base model in {folder} is quantized already",
            "take its fp32, bf16 or fp16 weights: the fingerprint is of those, and base precision is chosen "
            "on each device",
        )
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise BaseModelError(
                f"the base model in {folder} is a {config.model_type}, which has no {name}: "
                "it is no transformer of one stack of layers",
                "docs/models.md lists the families that are known to work",
            )
    if task == "classification":
        config.num_labels = len(labels)
    # a cache of keys and values is for generating text: here it would only be held
    config.use_cache = False
    return config


def build_empty(config: Any, folder: Path, task: str) -> tuple[Any, str]:
    """The model in evaluation mode, all parameters on the meta device, and the name of its attention.

    Buffers hold what the model's own code puts there.
    """
    auto = getattr(transformers, _AUTO[task])
    refused: Exception = ValueError("it offers no attention that is known here")
    for attention in _attentions():
        try:
            with _quiet(), _parameters_on_meta(), _Untouched():
                net = _from_config(auto, config, attention)
        except (ValueError, ImportError, KeyError, AttributeError, AssertionError) as error:
            refused = error
            continue
        # ours is sdpa's formula: what sdpa cannot compute (capped scores, say), it cannot either
        offers = getattr(net, "_supports_attention_backend", False) and getattr(net, "_supports_sdpa", False)
        if attention == "edge" and not offers:
            continue
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return net.eval().requires_grad_(False), attention
    raise _unfit(folder, task, refused) from refused


def _attentions() -> tuple[str, ...]:
    """From the one that suits the activation store best to the one that every family has."""
    try:
        attention = import_module("edge_sdk.training.activations.attention")
    except ImportError:
        return ("sdpa", "eager")
    attention.register()
    return ("edge", "sdpa", "eager")


def _from_config(auto: Any, config: Any, attention: str) -> Any:
    config = copy.deepcopy(config)  # a config that was built from remembers its attention
    try:
        return auto.from_config(config, attn_implementation=attention, dtype=torch.float32)
    except TypeError:  # transformers 4 has the other word
        return auto.from_config(config, attn_implementation=attention, torch_dtype=torch.float32)


def _unfit(folder: Path, task: str, error: BaseException) -> BaseModelError:
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return BaseModelError(
        f"the base model in {folder} cannot be loaded as {_WHAT[task]}: {line}",
        "docs/models.md lists the families that are known to work; check config.json",
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in this thread get their parameters on the meta device: they have a shape and no values.

    Made under ``torch.device("meta")`` constants (rotary frequencies, position ids) would be lost too.
    """
    mine = threading.get_ident()
    with _lock:
        original = nn.Module.register_parameter

        def register(self: Any, name: str, parameter: Any) -> None:
            original(self, name, parameter)
            held = self._parameters[name]
            if threading.get_ident() == mine and held is not None and held.device.type != "meta":
                self._parameters[name] = nn.Parameter(held.detach().to("meta"), requires_grad=False)

        nn.Module.register_parameter = register
        try:
            yield
        finally:
            nn.Module.register_parameter = original


class _Untouched(TorchFunctionMode):
    """What would write into a tensor that has no values is left out, random first values above all: torch
    does that in Python there, and loads its symbolic mathematics for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        target = args[0] if args else named.get("tensor")  # torch.nn.init's functions come with names
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__")
        if writes and isinstance(target, torch.Tensor) and target.device.type == "meta":
            return target
        return func(*args, **named)


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers says of heads and of unused settings is expected here, and told by the shape."""
    words = transformers.utils.logging
    level = words.get_verbosity()
    words.set_verbosity_error()
    try:
        yield
    finally:
        words.set_verbosity(level)
