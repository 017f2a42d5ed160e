"""Layers by structure: found, named by hand, or refused with what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from torch import nn  # noqa: E402

from edge_sdk.errors import BaseModelError  # noqa: E402
from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.training.model import load_model  # noqa: E402
from edge_sdk.training.model.structure import find_layers, linears_of, lora_modules  # noqa: E402


class Layer(nn.Module):
    def __init__(self, width: int = 8, inner: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)


class OtherLayer(Layer):
    pass


class Net(nn.Module):
    base_model_prefix = "base"

    def __init__(self, **lists: list[nn.Module]) -> None:
        super().__init__()
        self.base = nn.Module()
        for name, modules in lists.items():
            setattr(self.base, name, nn.ModuleList(modules))


def test_one_list_of_like_layers_is_found() -> None:
    net = Net(blocks=[Layer(), Layer()], adapters=[nn.Linear(8, 8), nn.Linear(8, 8)])
    path, layers = find_layers(net, 2)
    assert path == "base.blocks" and layers is net.base.blocks
    assert [m.name for m in linears_of(layers[0])] == ["q", "k", "v", "up", "down"]


def test_no_list_or_several_are_refused_and_named() -> None:
    with pytest.raises(BaseModelError, match=r"0 lists of 3") as none:
        find_layers(Net(blocks=[Layer(), Layer()]), 3)
    assert "base.layers, in run.toml" in none.value.hint
    assert "base.blocks (2 of Layer)" in none.value.hint
    with pytest.raises(BaseModelError, match=r"2 lists of 2") as two:
        find_layers(Net(encoder=[Layer(), Layer()], decoder=[Layer(), Layer()]), 2)
    assert "base.encoder (2 of Layer), base.decoder (2 of Layer)" in two.value.hint
    with pytest.raises(BaseModelError, match="0 lists of 2"):
        find_layers(Net(blocks=[Layer(), OtherLayer()]), 2)


@pytest.mark.parametrize("path", ["base.decoder", "decoder"])
def test_layers_named_by_hand(path: str) -> None:
    net = Net(encoder=[Layer(), Layer()], decoder=[Layer(), OtherLayer()])
    assert find_layers(net, 2, path) == ("base.decoder", net.base.decoder)
    with pytest.raises(BaseModelError, match=r"base\.layers names 'coder'"):
        find_layers(net, 2, "coder")


def test_layers_that_differ_are_refused() -> None:
    with pytest.raises(BaseModelError, match=r"layers 0 and 1 differ in their linears: down \(16 -> 8\)"):
        lora_modules([Layer(), Layer(inner=32)], LoraShape())


def test_naming_the_layers_changes_nothing_where_they_are_found(bases: dict[Any, Path]) -> None:
    folder = bases["gpt2", "causal-lm"]
    found = load_model(folder, (), LoraShape(), "cpu", task="causal-lm")
    named = load_model(folder, (), LoraShape(), "cpu", task="causal-lm", layers="transformer.h")
    assert named.shape == found.shape


def test_what_is_no_transformer_of_one_stack_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig

    MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(BaseModelError, match="mamba, which has no num_attention_heads"):
        load_model(tmp_path, (), LoraShape(), "cpu", task="causal-lm")


def test_logits_that_are_capped_are_refused_in_any_precision(tmp_path: Path) -> None:
    from families import make_base

    from edge_sdk.training.model.frozen import FLOATS

    make_base("gemma2", "causal-lm", tmp_path)
    for precision in FLOATS.values():
        with pytest.raises(BaseModelError, match="scales or caps"):
            load_model(tmp_path, (), LoraShape(), "cpu", task="causal-lm", precision=precision)
