"""Every family in the table, without code of its own: structure, depth, gradients, export, precision.

``python tests/training/test_training_families.py`` writes the table of docs/models.md anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing:FutureWarning"
    ),  # peft asks for the old name
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # DeBERTa's functions are scripted
]

from families import FAMILIES, table  # noqa: E402
from msgspec.structs import replace  # noqa: E402

from edge_sdk.planning.shapes import shape_of  # noqa: E402
from edge_sdk.protocol.model import LoraShape, ModelShape  # noqa: E402
from edge_sdk.training.model import TunableModel, load_model  # noqa: E402
from edge_sdk.training.model.frozen import FLOATS  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402
from edge_sdk.updates.keys import all_keys, tuned_keys  # noqa: E402
from edge_sdk.updates.peft import write_peft  # noqa: E402

LABELS = ("a", "b", "c")
LORA = LoraShape(rank=4, alpha=8.0)
EACH = [(family, task) for family, row in FAMILIES.items() for task in row.tasks]
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def load(folder: Path, task: str, word: str = "fp32") -> TunableModel:
    model = load_model(folder, LABELS, LORA, "cpu", task=task, precision=FLOATS[word])
    model.set_adapter(initial_adapter(model.shape, LORA, seed=5))
    return model


def rows() -> tuple[Any, Any]:
    """Two rows, the second padded; token 0 is padding's."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 6:] = mask[1, 6:] = 0
    return ids, mask


def loss_of(model: TunableModel) -> Any:
    ids, mask = rows()
    if model.task == "classification":
        return torch.nn.functional.cross_entropy(model.logits(ids, mask), torch.tensor([0, 2]))
    logits = model.next_logits(ids, mask)[:, :-1].float()
    wanted = torch.where(mask[:, 1:] > 0, ids[:, 1:], -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def step(model: TunableModel, rate: float = 0.05) -> None:
    loss_of(model).backward()
    with torch.no_grad():
        for tensor in model.trained().values():
            tensor -= rate * tensor.grad / (tensor.grad.norm() + 1e-6)


def _config_tells(live: ModelShape, folder: Path, task: str) -> None:
    """The other source of a shape, config.json without transformers, says the same of all that is counted."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    read = shape_of(config, task=task, labels=len(LABELS))
    assert read.parameters == pytest.approx(live.parameters, rel=0.005)
    assert read.base_bytes == pytest.approx(live.base_bytes, rel=0.005)
    assert replace(read, parameters=live.parameters, base_bytes=live.base_bytes) == live


@pytest.mark.parametrize(("family", "task"), EACH)
def test_structure(family: str, task: str, bases: dict[Any, Path]) -> None:
    row, model = FAMILIES[family], load(bases[family, task], task)
    shape = model.shape
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads) == (3, 32, 64, 4)
    assert shape.vocabulary == 64 and shape.kv_heads == row.settings.get("num_key_value_heads", 4)
    assert shape.layer_path == row.layers
    _config_tells(shape, bases[family, task], task)
    assert len(shape.modules) == row.linears
    assert {m.transposed for m in shape.modules} == {row.transposed}
    assert tuple(model.parts) == all_keys(shape)
    assert bool(shape.dense) is (task == "classification")
    assert model.attention == ("edge" if row.attention == "sdpa" else row.attention)
    ids, mask = rows()
    hidden = model.hidden(ids, mask)
    assert hidden.shape == (2, 9, 32)
    if task == "classification":
        first = model.encode(ids, mask)
        place = 5 if "causal-lm" in row.tasks else 0
        assert torch.equal(first[1, 0], hidden[1, place])


@pytest.mark.parametrize(("family", "task"), EACH)
def test_depth_trains_just_what_it_says(family: str, task: str, bases: dict[Any, Path]) -> None:
    model = load(bases[family, task], task)
    step_all = {key for key in model.parts if key.endswith(".B")}
    for depth in (3, 0, 1):
        tuned = model.tune(depth)
        assert tuple(tuned) == tuned_keys(model.shape, depth)
        if not tuned:
            with torch.no_grad():
                assert torch.isfinite(loss_of(model))
            continue
        before = model.adapter()
        step(model)
        after = model.adapter()
        moved = {key for key in after if (after[key] != before[key]).any()}
        # A's gradient is zero for as long as B is
        assert moved | {k for k in tuned if k.endswith(".A")} == set(tuned)
        if depth == 3:
            assert step_all <= moved
            step(model)
        else:
            assert moved == set(tuned)


@pytest.mark.parametrize(("family", "task"), EACH)
def test_export_gives_the_live_logits_on_the_base_itself(
    family: str, task: str, bases: dict[Any, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    base = bases[family, task]
    model = load(base, task)
    for depth in (1, 2, 2):  # ragged: the lowest layer is never trained
        model.tune(depth)
        step(model, 0.5)
    ids, mask = rows()
    with torch.inference_mode():
        live = model.logits(ids, mask) if task == "classification" else model.next_logits(ids, mask)
    write_peft(
        tmp_path / "adapter", model.adapter(), shape=model.shape, lora=LORA, base=str(base),
        labels=LABELS if task == "classification" else (), task=task,
    )  # fmt: skip
    if task == "classification":
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    else:
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        bare = plain(input_ids=ids, attention_mask=mask).logits
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        theirs = loaded(input_ids=ids, attention_mask=mask).logits
    real = slice(None) if task == "classification" else mask.bool()
    assert torch.allclose(theirs[real], live[real], atol=1e-4)
    assert (theirs[real] - bare[real]).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "task"), EACH)
def test_half_precision_trains(family: str, task: str, bases: dict[Any, Path]) -> None:
    whole, model = load(bases[family, task], task), load(bases[family, task], task, "bf16")
    assert model.precision == "bf16"
    assert model.shape.base_bytes < 0.7 * whole.shape.base_bytes
    ids, mask = rows()
    assert model.hidden(ids, mask).dtype == torch.bfloat16
    with torch.no_grad():
        assert float(loss_of(model)) == pytest.approx(float(loss_of(whole)), rel=0.1)
    for each in (whole, model):
        each.tune(3)
        loss_of(each).backward()
    theirs = whole.trained()
    for key, tensor in model.trained().items():
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor.grad).all()
        if key.endswith(".B"):
            likeness = torch.cosine_similarity(tensor.grad.flatten(), theirs[key].grad.flatten(), dim=0)
            assert likeness > 0.9, (key, likeness)


def test_the_table_in_the_docs(bases: dict[Any, Path]) -> None:
    models = {family: load(bases[family, row.tasks[0]], row.tasks[0]) for family, row in FAMILIES.items()}
    assert table(models) in DOCS.read_text()


def _write_docs() -> None:
    import tempfile

    from families import make_base

    models = {}
    for family, row in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_base(family, row.tasks[0], Path(folder))
            models[family] = load(Path(folder), row.tasks[0])
    text = DOCS.read_text()
    head, _, rest = text.partition("| Family |")
    _, _, tail = rest.partition("\n\n")
    DOCS.write_text(head + table(models) + "\n\n" + tail)


if __name__ == "__main__":
    sys.exit(_write_docs())
