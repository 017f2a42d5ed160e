"""A merged model is an ordinary transformers model: it gives the logits of base and adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from families import make_base  # noqa: E402

from edge_sdk.errors import BaseModelError  # noqa: E402
from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.training.failures import InterruptError  # noqa: E402
from edge_sdk.training.merged import write_merged  # noqa: E402
from edge_sdk.training.model import load_model  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402
from edge_sdk.updates.versions import VersionChain, write_version  # noqa: E402

LORA = LoraShape(rank=2, alpha=4.0)


def a_version(folder, shape):
    """A version in which every part of B and of the head is something, and one module has a fold."""
    adapter = initial_adapter(shape, LORA, seed=2)
    draw = torch.Generator().manual_seed(5)
    for key, rows in adapter.items():
        adapter[key] = rows + 0.1 * torch.randn(rows.shape, generator=draw).numpy()
    module = shape.modules[-1]
    for factor, width in (("A", module.inputs), ("B", module.outputs)):
        adapter[f"fold.1.{module.name}.{factor}"] = 0.1 * torch.randn(5, width, generator=draw).numpy()
    path = folder / "version.safetensors"
    held = write_version(path, run="r", round=1, number=1, fingerprint="a" * 64, adapter=adapter)
    return VersionChain([path]), held


@pytest.mark.parametrize(
    ("family", "task", "transposed", "dtype"),
    [
        ("bert", "classification", False, torch.float32),
        ("gpt2", "causal-lm", True, torch.float32),
        ("llama", "causal-lm", False, torch.bfloat16),
    ],
)
def test_it_gives_the_same_logits(family, task, transposed, dtype, tmp_path: Path) -> None:
    import transformers

    base = tmp_path / "base"
    make_base(family, task, base)
    labels = ("a", "b", "c") if task == "classification" else ()
    kind = "SequenceClassification" if labels else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    if dtype != torch.float32:
        auto.from_pretrained(base).to(dtype).save_pretrained(base)
    kept, left = ("tokenizer.json", "vocab.txt", "chat_template.jinja"), ("modules.json", "data_config.json")
    for name in (*kept, *left):
        (base / name).write_text("{}")
    model = load_model(base, labels, LORA, "cpu", task=task)
    assert model.shape.modules[0].transposed == transposed
    version, held = a_version(tmp_path, model.shape)
    model.set_adapter(held)
    model.tune(model.shape.layers)
    folder = write_merged(
        tmp_path / "merged", base, version, shape=model.shape, lora=LORA, labels=labels, task=task,
        card="## The run",
    )  # fmt: skip
    merged = auto.from_pretrained(folder).eval()
    assert next(merged.parameters()).dtype == dtype
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        live = model.net(input_ids=ids).logits
        plain = auto.from_pretrained(base).eval()(input_ids=ids).logits.float() if not labels else None
        told = merged(input_ids=ids).logits.float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1 * float(live.abs().max())
    assert torch.allclose(told, live, atol=tolerance)
    if plain is not None:
        assert not torch.allclose(told, plain, atol=tolerance)
    written = {path.name for path in folder.iterdir()} - {"generation_config.json"}
    assert written == {"README.md", "config.json", "model.safetensors", *kept}
    assert "## The run" in (folder / "README.md").read_text()
    if labels:
        assert merged.config.id2label == dict(enumerate(labels))


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_base("bert", "classification", base)
    model = load_model(base, ("a", "b", "c"), LORA, "cpu")
    version, _ = a_version(tmp_path, model.shape)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="quantized"):
        write_merged(
            tmp_path / "merged", base, version, shape=model.shape, lora=LORA, labels=("a", "b", "c"),
            task="classification",
        )  # fmt: skip
    assert not (tmp_path / "merged").exists()


def test_an_interrupt_leaves_nothing_and_what_was_there(tmp_path: Path) -> None:
    base, into = tmp_path / "base", tmp_path / "exports" / "merged"
    make_base("bert", "classification", base)
    model = load_model(base, ("a", "b", "c"), LORA, "cpu")
    version, _ = a_version(tmp_path, model.shape)
    into.mkdir(parents=True)
    (into / "older").touch()
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 9:
            raise InterruptError

    with pytest.raises(InterruptError):
        write_merged(
            into, base, version, shape=model.shape, lora=LORA, labels=("a", "b", "c"), task="classification",
            check=check,
        )  # fmt: skip
    assert [path.name for path in into.parent.rglob("*")] == ["merged", "older"]
