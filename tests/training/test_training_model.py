"""The resident model: structure, exact adapters, depth."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from edge_sdk.errors import BaseModelError, ContainerError  # noqa: E402
from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.protocol.spec import TrainSpec  # noqa: E402
from edge_sdk.training.model import TunableModel, load_model  # noqa: E402
from edge_sdk.training.optimizer import RoundOptimizer  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402
from edge_sdk.updates.keys import all_keys, tuned_keys  # noqa: E402

LORA = LoraShape(rank=4, alpha=8.0)
HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "bert-no-pooler": {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    },
    "roberta": {
        "classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    },
    "distilbert": {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"},
}  # fmt: skip


def _load(folder: Path) -> TunableModel:
    return load_model(folder, ("a", "b", "c"), LORA, "cpu")


@pytest.mark.parametrize("family", HEADS)
def test_shape_of_each_family(tiny: dict[str, Path], family: str) -> None:
    model = _load(tiny[family])
    shape = model.shape
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads) == (3, 32, 64, 4)
    assert {part.name for part in shape.dense} == HEADS[family]
    assert sorted((m.inputs, m.outputs) for m in shape.modules) == [(32, 32)] * 4 + [(32, 64), (64, 32)]
    assert not any("pooler" in m.name for m in shape.modules)
    assert tuple(model.parts) == all_keys(shape)


@pytest.mark.parametrize("family", HEADS)
def test_an_adapter_set_and_read_back_is_the_same_to_the_bit(tiny: dict[str, Path], family: str) -> None:
    model = _load(tiny[family])
    adapter = initial_adapter(model.shape, LORA, seed=3)
    for key in adapter:
        if key.endswith(".B"):
            adapter[key] = adapter[key] + 0.25
    model.set_adapter(adapter)
    back = model.adapter()
    assert back.keys() == adapter.keys()
    for key, value in adapter.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape
        assert (back[key] == value).all()


def test_an_adapter_of_another_model_is_refused(tiny: dict[str, Path]) -> None:
    model = _load(tiny["bert"])
    adapter = model.adapter()
    value = adapter.pop("dense.classifier.bias")
    with pytest.raises(ContainerError, match=r"dense\.classifier\.bias"):
        model.set_adapter(adapter)
    with pytest.raises(ContainerError, match="is \\(1, 2\\)"):
        model.set_adapter({**adapter, "dense.classifier.bias": value[:, :2]})


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_nothing_frozen_moves_and_has_no_state(tiny: dict[str, Path], family: str) -> None:
    model = _load(tiny[family])
    model.set_adapter({k: v + 0.01 for k, v in initial_adapter(model.shape, LORA, seed=1).items()})
    ids = torch.tensor([[2, 5, 6, 7]])
    adapted = {id(p) for p in model.parts.values()}
    base = {n: p.detach().clone() for n, p in model.net.named_parameters() if id(p) not in adapted}
    for depth in (2, 0, 3, 1):
        before = model.adapter()
        tuned = model.tune(depth)
        assert tuple(tuned) == tuned_keys(model.shape, depth)
        optimizer = RoundOptimizer(model.trained(), TrainSpec(weight_decay=0.1), steps=2)
        for _ in range(2):
            torch.nn.functional.cross_entropy(
                model.logits(ids, torch.ones_like(ids)), torch.tensor([1])
            ).backward()
            optimizer.step()
        after = model.adapter()
        moved = {key for key in after if (after[key] != before[key]).any()}
        assert moved == set(tuned)
        assert len(optimizer._inner.state) == len(tuned)
    assert len(base) > 20
    for name, value in base.items():
        assert torch.equal(model.net.get_parameter(name), value), name


def _step(model: TunableModel, spec: TrainSpec) -> None:
    ids = torch.tensor([[2, 5, 6, 7]])
    optimizer = RoundOptimizer(model.trained(), spec, steps=1)
    torch.nn.functional.cross_entropy(model.logits(ids, torch.ones_like(ids)), torch.tensor([1])).backward()
    optimizer.step()
    assert len(optimizer._inner.state) == len(model.trained())


def test_slots_and_factors_change_from_round_to_round(tiny: dict[str, Path]) -> None:
    """Slots and factors that are not trained keep every bit, weight decay or not."""
    model = _load(tiny["bert"])
    start = {k: v + 0.01 for k, v in initial_adapter(model.shape, LORA, seed=1).items()}
    model.set_adapter(start)
    weights = {id(p) for p in model.net.parameters()}
    spec = TrainSpec(weight_decay=0.1)
    rounds = [
        (2, (0, 2), "AB"),
        (3, (1,), "B"),
        (1, None, "A"),
        (2, (3,), "A"),
        (3, None, "AB"),
        (2, (), "AB"),
    ]
    for depth, slots, factors in rounds:
        before = model.adapter()
        tuned = model.tune(depth, slots=slots, factors=factors)
        assert tuned == list(model.trained())
        assert {k.rsplit(".", 1)[1] for k in tuned if not k.startswith("dense.")} <= set(factors)
        _step(model, spec)
        after = model.adapter()
        chosen = set(range(LORA.rank) if slots is None else slots)
        for key, value in after.items():
            moved = {i for i, row in enumerate(value) if (row != before[key][i]).any()}
            if key.startswith("dense."):
                assert moved
            elif int(key[0]) >= 3 - depth and key[-1] in factors:
                assert moved == chosen, key
            else:
                assert not moved, key
    model.tune(0)
    assert {id(p) for p in model.net.parameters()} == weights
    for key, value in model.adapter().items():
        assert (value == after[key]).all()


def test_what_cannot_be_tuned_is_refused(tiny: dict[str, Path]) -> None:
    model = _load(tiny["bert"])
    with pytest.raises(ValueError, match="depth 4"):
        model.tune(4)
    with pytest.raises(ValueError, match="factors"):
        model.tune(1, factors="C")
    with pytest.raises(ValueError, match="slots"):
        model.tune(1, slots=(4,))


def test_lora_below_the_tuned_layers_still_counts(tiny: dict[str, Path]) -> None:
    model = _load(tiny["bert"])
    ids = torch.tensor([[2, 5, 6, 7]])
    model.set_adapter(initial_adapter(model.shape, LORA, seed=1))
    model.tune(1)
    plain = model.logits(ids, torch.ones_like(ids))
    with torch.no_grad():
        model.parts["0.attention.self.query.B"].fill_(0.5)
        model.parts["0.attention.self.value.B"].fill_(0.5)
    assert not torch.allclose(plain, model.logits(ids, torch.ones_like(ids)))


def test_pickled_weights_are_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny["bert"] / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin"):
        _load(tmp_path)


def test_a_checkpoint_without_encoder_weights_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny["bert"] / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "layer.1.output.dense" not in n}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny["bert"] / "config.json").read_text())
    with pytest.raises(BaseModelError, match=r"layer\.1\.output\.dense"):
        _load(tmp_path)


def test_targets_by_name(tiny: dict[str, Path]) -> None:
    model = load_model(tiny["roberta"], ("a", "b"), LoraShape(rank=2, targets=("query", "value")), "cpu")
    assert [m.name for m in model.shape.modules] == ["attention.self.query", "attention.self.value"]
    with pytest.raises(BaseModelError, match="'qkv'"):
        load_model(tiny["roberta"], ("a", "b"), LoraShape(targets=("qkv",)), "cpu")
