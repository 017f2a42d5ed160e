"""Loading layer by layer: the same tensors as transformers loads, and never more memory than it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from families import FAMILIES  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from edge_sdk.errors import BaseModelError  # noqa: E402
from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.training.model import TunableModel, load_model  # noqa: E402
from edge_sdk.training.model.building import build_empty  # noqa: E402
from edge_sdk.training.model.frozen import FLOATS, BasePrecision, FrozenLinear  # noqa: E402
from edge_sdk.training.precision.int8 import Int8  # noqa: E402
from edge_sdk.training.precision.weights import Dense  # noqa: E402

LORA = LoraShape(rank=2)
LABELS = ("a", "b", "c")


def load(folder: Path, task: str = "classification", **more: Any) -> TunableModel:
    return load_model(folder, LABELS, LORA, "cpu", task=task, **more)


def reference(folder: Path, task: str, dtype: Any = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=dtype).eval()


def tensors(model: TunableModel) -> dict[str, Any]:
    """All that the model holds, under transformers' names; of blocks put in, the original's."""
    found = dict(model.net.named_parameters(remove_duplicate=False)) | dict(model.net.named_buffers())
    plain = {name.replace(".plain.", "."): value for name, value in found.items()}
    for key, linear in model.linears.items():
        layer, _, name = key.partition(".")
        place = f"{model.shape.layer_path}.{layer}.{name}.weight"
        weight = linear.frozen.dense()
        if linear.bias is not None:
            plain[place.replace(".weight", ".bias")] = linear.bias
        transposed = next(m.transposed for m in model.shape.modules if m.name == name)
        plain[place] = weight.t() if transposed else weight
    return plain


def assert_same(model: TunableModel, net: Any, fresh: set[str]) -> None:
    ours = tensors(model)
    theirs = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers())
    assert len(theirs) > 20
    for name, value in theirs.items():
        if name.split(".")[0] not in fresh:
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(("family", "task"), [(f, t) for f, row in FAMILIES.items() for t in row.tasks])
def test_every_tensor_is_as_transformers_loads_it(family: str, task: str, bases: dict[Any, Path]) -> None:
    folder = bases[family, task]
    model = load(folder, task)
    assert_same(model, reference(folder, task), fresh=set())


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "classification"), ("gpt2", "causal-lm"), ("llama", "causal-lm")]
)
def test_bare_base_models_and_other_heads(
    family: str, task: str, bases: dict[Any, Path], tmp_path: Path
) -> None:
    """The same weights without the prefix and without the head, and with a head of another task."""
    folder = bases[family, task]
    model = load(folder, task)
    prefix = model.net.base_model_prefix + "."
    found = load_file(folder / "model.safetensors")
    bare = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
    write(tmp_path, folder, bare)
    if "lm_head.weight" in found:
        with pytest.raises(BaseModelError, match="lm_head"):
            load(tmp_path, task)
        return
    assert_same(load(tmp_path, task), reference(folder, task), fresh={"classifier"})
    other = {n: t for n, t in found.items() if n.startswith(prefix)} | {"cls.predictions.bias": torch.ones(3)}
    write(tmp_path, folder, other)
    assert_same(load(tmp_path, task), reference(folder, task), fresh={"classifier"})


def test_older_names(bases: dict[Any, Path], tmp_path: Path) -> None:
    folder = bases["bert", "classification"]
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in load_file(folder / "model.safetensors").items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    assert any(name.endswith("gamma") for name in old)
    write(tmp_path, folder, old)
    assert_same(load(tmp_path), reference(folder, "classification"), fresh=set())


def test_shards(bases: dict[Any, Path], tmp_path: Path) -> None:
    folder = bases["qwen3", "causal-lm"]
    found = load_file(folder / "model.safetensors")
    names = sorted(found)
    index = {}
    for i in range(3):
        name = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({n: found[n] for n in names[i::3]}, tmp_path / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(names[i::3], name))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert_same(load(tmp_path, "causal-lm"), reference(folder, "causal-lm"), fresh=set())


def test_tied_weights_are_held_once_and_apart_where_the_checkpoint_has_them_apart(
    bases: dict[Any, Path], tmp_path: Path
) -> None:
    folder = bases["gemma", "causal-lm"]
    model = load(folder, "causal-lm")
    words = model.net.get_input_embeddings().weight
    assert model.output_weight is not None
    assert model.output_weight.dense().data_ptr() == words.data_ptr()
    found = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in found
    words = found["model.embed_tokens.weight"]
    write(tmp_path, folder, {**found, "lm_head.weight": words.clone()})
    again = load(tmp_path, "causal-lm")
    assert again.net.lm_head.weight is again.net.get_input_embeddings().weight
    write(tmp_path, folder, {**found, "lm_head.weight": words + 1})
    apart = load(tmp_path, "causal-lm")
    assert torch.equal(apart.net.lm_head.weight, apart.net.get_input_embeddings().weight + 1)


def test_what_has_no_place_is_named(bases: dict[Any, Path], tmp_path: Path) -> None:
    folder = bases["llama", "causal-lm"]
    found = load_file(folder / "model.safetensors")
    write(tmp_path, folder, {**found, "model.layers.0.mlp.router.weight": torch.ones(2)})
    with pytest.raises(BaseModelError, match=r"no place for 1 tensors.*model\.layers\.0\.mlp\.router"):
        load(tmp_path, "causal-lm")
    write(tmp_path, folder, {n: t for n, t in found.items() if "layers.1.mlp.up_proj" not in n})
    with pytest.raises(BaseModelError, match=r"lacks 1 weights.*model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path, "causal-lm")
    write(tmp_path, folder, {**found, "model.norm.weight": torch.ones(3)})
    with pytest.raises(BaseModelError, match=r"'model\.norm\.weight'.* is \(3,\)"):
        load(tmp_path, "causal-lm")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "x"}})
    )
    with pytest.raises(BaseModelError, match="quantized already"):
        load(tmp_path, "causal-lm")


def test_each_weight_is_handed_over_once_by_its_key(bases: dict[Any, Path]) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    tables: list[str] = []

    def make(key: str, tensor: Any) -> Any:
        assert key not in seen
        seen[key] = tuple(tensor.shape)
        return Dense(tensor)

    def table(name: str, tensor: Any) -> Any:
        tables.append(name)
        return Int8.encode(tensor)

    model = load_model(
        bases["gpt2", "causal-lm"], (), LoraShape(rank=2, targets=("c_attn",)), "cpu", task="causal-lm",
        precision=BasePrecision("test", torch.float32, make, table),
    )  # fmt: skip
    assert len(seen) == 3 * 4 and seen["0.attn.c_attn"] == (96, 32) and seen["2.mlp.c_fc"] == (64, 32)
    assert tables == ["transformer.wte.weight"]
    assert sum(isinstance(module, FrozenLinear) for module in model.net.modules()) == 3 * 3 + 1
    plain = load(bases["gpt2", "causal-lm"], "causal-lm")
    assert model.shape.base_bytes < plain.shape.base_bytes
    ids = torch.arange(3, 12).unsqueeze(0)
    theirs = plain.next_logits(ids, torch.ones_like(ids))
    ours = model.next_logits(ids, torch.ones_like(ids))
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("word", ["bf16", "fp16"])
def test_half_precision_is_as_transformers_rounds_it(word: str, bases: dict[Any, Path]) -> None:
    folder = bases["llama", "causal-lm"]
    model = load(folder, "causal-lm", precision=FLOATS[word])
    net = reference(folder, "causal-lm", FLOATS[word].dtype)
    theirs = dict(net.named_parameters())
    for name, value in tensors(model).items():
        if name in theirs:
            assert torch.equal(value.to(theirs[name].dtype), theirs[name]), name
    linear = next(iter(model.linears.values()))
    assert linear.frozen.dense(torch.float32).dtype == torch.float32 and linear.A.dtype == torch.float32


PEAK = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from edge_sdk.protocol.model import LoraShape
from edge_sdk.training.model import load_model
from edge_sdk.training.model.frozen import FLOATS, BasePrecision
from edge_sdk.training.allocator import settle_allocator, trim
from edge_sdk.training.precision.int8 import Int8
from transformers.models.llama import modeling_llama

def held(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

int8 = BasePrecision("int8", torch.float32, lambda key, t: Int8.encode(t), lambda name, t: Int8.encode(t))
settle_allocator()
load_model(Path(sys.argv[2]), (), LoraShape(rank=2), "cpu", task="causal-lm", precision=int8)
for word in ("int8", "fp32"):
    model = None
    trim()
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    precision = int8 if word == "int8" else FLOATS[word]
    model = load_model(Path(sys.argv[1]), (), LoraShape(rank=2), "cpu", task="causal-lm", precision=precision)
    print(json.dumps([word, model.shape.base_bytes, held("VmRSS") - before, held("VmHWM") - before]))
"""


@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_what_stays_and_one_tensor(bases: dict[Any, Path], tmp_path: Path) -> None:
    """A base of 84 MB in fp32, whose largest tensor takes 17."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=3, vocab_size=8192,
        num_attention_heads=8, num_key_value_heads=8, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    net, _ = build_empty(config, tmp_path, "causal-lm")
    ones = {name: torch.full(value.shape, 0.5) for name, value in net.state_dict().items()}
    save_file(ones, tmp_path / "model.safetensors", metadata={"format": "pt"})
    size, largest = sum(t.nbytes for t in ones.values()), 8192 * 512 * 4
    assert 80e6 < size < 90e6
    made = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(bases["llama", "causal-lm"])],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    lines = [json.loads(line) for line in made.stdout.splitlines() if line.startswith("[")]
    assert [line[0] for line in lines] == ["int8", "fp32"]
    for word, stays, rest, peak in lines:
        assert stays == pytest.approx(size if word == "fp32" else size / 4, rel=0.2)
        assert rest < 1.15 * stays + 8e6, (word, rest)
        # the tensor as it is read, what is made of it, and the encoder's temporaries
        assert peak < rest + 2.2 * largest, (word, rest, peak)


def write(folder: Path, like: Path, found: dict[str, Any]) -> None:
    save_file(
        {n: t.clone().contiguous() for n, t in found.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text((like / "config.json").read_text())
