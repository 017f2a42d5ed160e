"""A small Llama with random weights, a tokenizer without a padding token, and rows that it can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLOURS = ("red", "green", "blue", "grey")
ANIMALS = ("cat", "dog", "bird", "fish")
WORDS = ("say", "the", "then", "a", "and", "?", ".", ":", *COLOURS, *ANIMALS)
CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def make_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """Saves it; every word is a token, and a text begins with ``<s>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=special[3:],
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llama(folder: Path, *, hidden: int = 64, layers: int = 3) -> Path:
    """Saves model and tokenizer into ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder, CHAT)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=6 + len(WORDS), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_prompts(path: Path, rows: int = 48, first: int = 0) -> Path:
    """A colour and an animal are asked for; the answer names them in the other order, and ends."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(first, first + rows):
            colour, animal = COLOURS[i % 4], ANIMALS[(i // 4 + i) % 4]
            row = {"prompt": f"say {colour} then {animal} ?", "response": f"the {animal} and the {colour} ."}
            file.write(json.dumps(row) + "\n")
    return path
