"""The model families that the tests and docs/models.md tell of: a tiny random model of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WIDTHS = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 40,
}  # fmt: skip
_DECODER = {**_WIDTHS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
ENCODER = ("classification",)
DECODER = ("classification", "causal-lm")


@dataclass(frozen=True)
class Family:
    """Attributes:
    config: transformers' class of its config.
    linears: of one layer.
    attention: without our own attention function.
    """

    name: str
    config: str
    tasks: tuple[str, ...]
    layers: str
    linears: int
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    transposed: bool = False


FAMILIES = {
    "bert": Family("BERT", "BertConfig", ENCODER, "bert.encoder.layer", 6, _WIDTHS),
    "roberta": Family("RoBERTa", "RobertaConfig", ENCODER, "roberta.encoder.layer", 6, _WIDTHS),
    "distilbert": Family(
        "DistilBERT", "DistilBertConfig", ENCODER, "distilbert.transformer.layer", 6,
        {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4,
         "max_position_embeddings": 40},
    ),
    "deberta-v2": Family(
        "DeBERTa-v2, v3", "DebertaV2Config", ENCODER, "deberta.encoder.layer", 6,
        {**_WIDTHS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
         "share_att_key": True, "position_biased_input": False, "norm_rel_ebd": "layer_norm"},
        attention="eager",
    ),
    "gpt2": Family(
        "GPT-2", "GPT2Config", DECODER, "transformer.h", 4,
        {"vocab_size": 64, "n_embd": 32, "n_inner": 64, "n_layer": 3, "n_head": 4, "n_positions": 40,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        transposed=True,
    ),
    "llama": Family("Llama", "LlamaConfig", DECODER, "model.layers", 7, _GROUPED),
    "qwen2": Family("Qwen2", "Qwen2Config", DECODER, "model.layers", 7, _GROUPED),
    "qwen3": Family("Qwen3", "Qwen3Config", DECODER, "model.layers", 7, _GROUPED),
    "gemma": Family("Gemma", "GemmaConfig", DECODER, "model.layers", 7, _GROUPED),
    "phi": Family("Phi", "PhiConfig", DECODER, "model.layers", 6, _DECODER),
    "mistral": Family("Mistral", "MistralConfig", DECODER, "model.layers", 7, _GROUPED),
    "phi3": Family("Phi-3", "Phi3Config", DECODER, "model.layers", 4, _GROUPED),
}  # fmt: skip

REFUSED = {"gemma2": Family("Gemma 2", "Gemma2Config", ("causal-lm",), "model.layers", 7, _GROUPED)}
"""As language models."""


def make_base(family: str, task: str, folder: Path, **settings: Any) -> None:
    """Saves a random model of the family: three layers, weights large enough that every one matters."""
    import torch
    import transformers

    row = (FAMILIES | REFUSED)[family]
    config = getattr(transformers, row.config)(**{**row.settings, **settings})
    config.initializer_range = 0.15
    config.num_labels = 3
    kind = "AutoModelForCausalLM" if task == "causal-lm" else "AutoModelForSequenceClassification"
    torch.manual_seed(3)
    net = getattr(transformers, kind).from_config(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:  # biases and norms begin as zeros and ones, which hide mistakes
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    net.save_pretrained(folder)


def table(models: dict[str, Any]) -> str:
    """The table of docs/models.md, from a loaded model of each family."""
    lines = [
        "| Family | Tasks | Linears with LoRA | Attention | Norms kept | Feed-forward block |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for family, row in FAMILIES.items():
        model = models[family]
        report, layers = model.blocks, model.shape.layers
        block = ", ".join(report.functions) if report.feed_forwards == layers else "as it is"
        inside = "inside the store" if model.attention == "edge" else f"outside ({model.attention})"
        lines.append(
            f"| {row.name} | {', '.join(row.tasks)} | {len(model.shape.modules)} | {inside} "
            f"| {report.norms // layers} | {block} |"
        )
    return "\n".join(lines)
