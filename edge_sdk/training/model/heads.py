"""What a task reads of the model: a classifier's head on one token, or a language model's output layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edge_sdk.errors import BaseModelError

__all__ = [
    "base_of",
    "check_causal",
    "check_classifier",
    "head_modules",
    "is_head",
    "reads_last",
    "run_head",
    "single_precision",
]


def base_of(net: Any) -> Any:
    """The model below the head."""
    return getattr(net, net.base_model_prefix)


def head_modules(net: Any) -> tuple[str, ...]:
    """Names of the modules beside the base model that have weights: the task's own."""
    return tuple(
        name
        for name, module in net.named_children()
        if name != net.base_model_prefix and any(True for _ in module.parameters())
    )


def is_head(net: Any, name: str) -> bool:
    """Whether a weight is the head's: beside the base model, or its pooler, which nothing else reads."""
    return not name.startswith(net.base_model_prefix + ".") or name.startswith(
        net.base_model_prefix + ".pooler."
    )


def reads_last(net: Any) -> bool:
    """Decoders classify by the last token, which alone has seen the others; encoders by the first."""
    return hasattr(net, "score")


def run_head(net: Any, first: Any) -> Any:
    """Logits (batch, labels) from the hidden states of one token each, (batch, 1, hidden)."""
    if reads_last(net):
        return net.score(first[:, 0])
    pooler = getattr(net, "pooler", None) or getattr(base_of(net), "pooler", None)
    if pooler is not None:
        return net.classifier(pooler(first))
    if hasattr(net, "pre_classifier"):
        return net.classifier(torch.relu(net.pre_classifier(first[:, 0])))
    return net.classifier(first)


def single_precision(net: Any) -> None:
    """Lets the head compute in fp32, whatever the residual stream is in: its weights are trained."""
    modules = [getattr(net, name) for name in head_modules(net)]
    pooler = getattr(base_of(net), "pooler", None)
    for module in modules + ([pooler] if pooler is not None else []):
        module.register_forward_pre_hook(_to_float)


def _to_float(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].float(), *inputs[1:])


def check_classifier(net: Any, logits: Callable[[Any, Any], Any], device: Any) -> None:
    """What is computed from one token must be what the whole model computes.

    Raises BaseModelError: the head reads more than that token.
    """
    ids, mask = _tokens(net, device)
    try:
        with torch.no_grad():
            whole = net(input_ids=ids, attention_mask=mask).logits
            ours = logits(ids, mask)
    except (AttributeError, TypeError, RuntimeError, IndexError) as error:
        raise BaseModelError(
            f"the head of a {type(net).__name__} is not known here: {str(error).splitlines()[0][:200]}",
            "docs/models.md lists the families that are known to work",
        ) from error
    # the head computes in fp32 whatever the base is held in
    if whole.shape != ours.shape or not torch.allclose(whole, ours, atol=1e-5, rtol=1e-4):
        raise BaseModelError(
            f"the head of a {type(net).__name__} reads more than one token, or has parts that "
            "are not known here",
            "docs/models.md lists the families that are known to work",
        )


def check_causal(net: Any, device: Any) -> None:
    """Hidden states times the output layer must be the model's own logits: ours are computed so.

    The output layer must be given just what the base model returns, and what it gives must come out as it is.
    To see that, it is made to give numbers far apart, which a scale or a cap would change in any precision.

    Raises BaseModelError where it is otherwise.
    """
    seen: dict[str, Any] = {}

    def given(_: Any, inputs: Any, output: Any) -> Any:
        seen["input"] = inputs[0]
        seen["output"] = torch.linspace(-64.0, 64.0, output.shape[-1], device=output.device).to(output.dtype)
        return seen["output"].expand(output.shape)

    ids, mask = _tokens(net, device)
    layer = net.get_output_embeddings()
    hook = None if layer is None else layer.register_forward_hook(given)
    try:
        with torch.no_grad():
            logits = net(input_ids=ids, attention_mask=mask).logits
            hidden = base_of(net)(input_ids=ids, attention_mask=mask).last_hidden_state
    finally:
        if hook is not None:
            hook.remove()
    plain = (
        "input" in seen
        and torch.equal(seen["input"], hidden)
        and torch.equal(logits, seen["output"].to(logits.dtype).expand(logits.shape))
    )
    if not plain:
        raise BaseModelError(
            f"a {type(net).__name__} does more than one product between its hidden states and its logits: "
            "it transforms, scales or caps them",
            "such families train as classifiers; docs/models.md lists those known to work as language models",
        )


def _tokens(net: Any, device: Any) -> tuple[Any, Any]:
    """One row without padding, whose last token is not the padding token either."""
    vocabulary = net.config.vocab_size
    ids = torch.arange(5, 13).remainder(vocabulary)
    pad = getattr(net.config, "pad_token_id", None)
    if pad is not None:
        ids[ids == pad] = (pad + 1) % vocabulary
    ids = ids.unsqueeze(0).to(device)
    return ids, torch.ones_like(ids)
