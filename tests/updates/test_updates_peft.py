"""The exported folder against the real library: the same logits as the base with W + (alpha / r) B A."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file
from updates_fakes import LORA, SHAPE, moved

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.model import DensePart, LoraModule, ModelShape
from edge_sdk.updates.folders import replacing
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import tuned_keys
from edge_sdk.updates.peft import write_peft

OLD_NAME_IN_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LABELS = ("red", "green", "blue")
SMALL = {"vocab_size": 40, "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3}
FAMILIES = {
    "bert": (
        {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32},
        "bert.encoder.layer",
        ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"),
    ),
    "roberta": (
        {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32},
        "roberta.encoder.layer",
        ("attention.self.value", "attention.output.dense", "output.dense"),
    ),
    "distilbert": (
        {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
        "distilbert.transformer.layer",
        ("attention.q_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    ),
}


def export(folder, adapter, shape=SHAPE, **more):
    return write_peft(folder, adapter, shape=shape, lora=LORA, base="some/base", labels=LABELS, **more)


def tiny(family):
    """A random base of three layers and its shape."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes, layer_path, modules = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    first = model.get_submodule(layer_path)[0]
    linears = {name: first.get_submodule(name) for name in modules}
    head = [(n, p) for n, p in model.named_parameters() if not n.startswith(f"{layer_path.split('.')[0]}.")]
    shape = ModelShape(
        family=family, layers=3, hidden=16, intermediate=32, heads=2, vocabulary=40, layer_path=layer_path,
        modules=tuple(
            LoraModule(name=n, inputs=m.in_features, outputs=m.out_features) for n, m in linears.items()
        ),
        dense=tuple(DensePart(name=n, shape=tuple(p.shape)) for n, p in head),
        parameters=1, base_bytes=1,
    )  # fmt: skip
    return torch, model, shape


@pytest.mark.train
@OLD_NAME_IN_PEFT
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_library_loads_it_and_computes_the_same(tmp_path, family):
    torch, base, shape = tiny(family)
    peft = pytest.importorskip("peft")
    start = initial_adapter(shape, LORA, 5)
    # ragged: the bottom layer was never trained, so its B is zero
    adapter = moved(start, tuned_keys(shape, 2), seed=1, size=0.2)
    folded = f"1.{shape.modules[0].name}"
    for factor in "AB":
        width = adapter[f"{folded}.{factor}"].shape[1]
        adapter[f"fold.{folded}.{factor}"] = np.random.default_rng(3).normal(
            0, 0.3, (5, width)
        ).astype(np.float32)  # fmt: skip
    merged = copy.deepcopy(base)
    state = merged.state_dict()
    for layer in range(3):
        for module in shape.modules:
            a, b = (torch.from_numpy(adapter[f"{layer}.{module.name}.{f}"]) for f in "AB")
            state[f"{shape.layer_path}.{layer}.{module.name}.weight"] += LORA.scaling * (b.T @ a)
    a, b = (torch.from_numpy(adapter[f"fold.{folded}.{f}"]) for f in "AB")
    state[f"{shape.layer_path}.{folded}.weight"] += LORA.scaling * (b.T @ a)
    for part in shape.dense:
        state[part.name].copy_(torch.from_numpy(adapter[f"dense.{part.name}"]).reshape(part.shape))
    ids = torch.randint(1, 40, (4, 12))
    folder = export(tmp_path / "adapter", adapter, shape)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    with torch.no_grad():
        want, plain, got = (model(input_ids=ids).logits for model in (merged, base, loaded))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (want - plain).abs().max() > 1e-2
    wrapped = [n for n, m in loaded.named_modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == 3 * len(shape.modules)


@pytest.mark.train
@OLD_NAME_IN_PEFT
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_its_tensors_have_the_names_that_the_library_saves(tmp_path, family):
    _, base, shape = tiny(family)
    peft = pytest.importorskip("peft")
    adapter = moved(initial_adapter(shape, LORA, 5), tuned_keys(shape, 3), seed=1)
    folder = export(tmp_path / "ours", adapter, shape)
    loaded = peft.PeftModel.from_pretrained(base, str(folder))
    ours = load_file(folder / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert ours.keys() == theirs.keys()
    for name, rows in ours.items():
        np.testing.assert_array_equal(rows, theirs[name].numpy())


def test_it_replaces_an_older_folder_and_leaves_nothing_beside_it(tmp_path):
    adapter = initial_adapter(SHAPE, LORA, 0)
    folder = export(tmp_path / "adapter", adapter)
    (folder / "stale").write_text("of an older version")
    export(tmp_path / "adapter", adapter, card="## The run\n\n- after 3 rounds")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"}
    card = (folder / "README.md").read_text()
    assert "after 3 rounds" in card and "red, green, blue" in card and '"some/base"' in card
    assert json.loads((folder / "labels.json").read_text()) == list(LABELS)


def test_what_killed_exports_left_goes_with_the_next_one(tmp_path):
    adapter, whole = initial_adapter(SHAPE, LORA, 0), tmp_path / ".adapter.unfinished-dddddddd.old"
    kept = [tmp_path / name for name in (".adapter.settings", ".other.unfinished-aaaaaaaa", "adapter-2")]
    for folder in (*kept, whole, tmp_path / ".adapter.unfinished-bbbbbbbb"):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    with pytest.raises(RuntimeError), replacing(tmp_path / "adapter") as building:
        (building / "half").touch()
        with replacing(tmp_path / "adapter"):  # another one at the same time: it is let be
            assert (building / "half").exists() and whole.exists()
            raise RuntimeError
    assert {*tmp_path.iterdir()} == {*kept, whole}
    export(tmp_path / "adapter", adapter)
    assert whole.exists(), "until there is another one that is whole, it was the only one"
    export(tmp_path / "adapter", adapter)
    assert {*tmp_path.iterdir()} == {*kept, tmp_path / "adapter"}


def test_the_config_names_no_module_outside_the_layers(tmp_path):
    config = json.loads(
        (export(tmp_path / "a", initial_adapter(SHAPE, LORA, 0)) / "adapter_config.json").read_text()
    )
    assert re.fullmatch(config["target_modules"], "bert.encoder.layer.2.output.dense")
    assert not re.fullmatch(config["target_modules"], "bert.pooler.output.dense")
    assert not re.fullmatch(config["target_modules"], "bert.encoder.layer.2.attention.output.dense")
    assert config["modules_to_save"] == ["classifier"]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8.0, "SEQ_CLS")


@pytest.mark.parametrize("alter", ["missing", "shape"])
def test_an_adapter_that_is_not_whole_is_refused_and_the_older_folder_stays(tmp_path, alter):
    adapter = initial_adapter(SHAPE, LORA, 0)
    folder = export(tmp_path / "adapter", adapter)
    before = (folder / "adapter_model.safetensors").read_bytes()
    if alter == "missing":
        del adapter["1.output.dense.B"]
    else:
        adapter["1.output.dense.B"] = adapter["1.output.dense.B"][:2]
    with pytest.raises(ContainerError, match=r"1\.output\.dense\.B"):
        export(tmp_path / "adapter", adapter)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
