"""The exported adapter is a PEFT adapter: PEFT itself loads it and gives the live model's logits."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing:FutureWarning"
    ),  # peft asks for the old name
]

from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.protocol.spec import Candidate, TrainSpec  # noqa: E402
from edge_sdk.training.loop import train  # noqa: E402
from edge_sdk.training.model import load_model  # noqa: E402
from edge_sdk.training.tasks.classification import Classification  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402
from edge_sdk.updates.peft import write_peft  # noqa: E402

LABELS = ("a", "b", "c")


@pytest.mark.parametrize("family", ["bert", "bert-no-pooler", "roberta", "distilbert", "minilm"])
def test_peft_gives_the_live_logits(
    family: str, tiny: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = request.getfixturevalue("minilm") if family == "minilm" else tiny[family]
    lora = LoraShape(rank=4, alpha=8.0)
    model = load_model(base, LABELS, lora, "cpu")
    model.set_adapter(initial_adapter(model.shape, lora, seed=4))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 16, (4, 10), generator=draw)
    mask = torch.ones_like(ids)
    batches = iter([(ids, mask, torch.tensor([0, 1, 2, 0]))] * 9)
    # ragged: the top layer trained nine steps, the one below six, the lowest none
    for depth, steps in ((1, 3), (2, 6)):
        train(
            model, batches, Candidate(id="c", depth=depth, steps=steps), TrainSpec(learning_rate=0.02),
            task=Classification(), check=lambda: None, report=lambda *_: None,
        )  # fmt: skip
    with torch.inference_mode():
        live = model.logits(ids, mask)
    folder = tmp_path / "adapter"
    write_peft(folder, model.adapter(), shape=model.shape, lora=lora, base=str(base), labels=LABELS)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    loaded = PeftModel.from_pretrained(plain, folder).eval()
    with torch.inference_mode():
        assert torch.allclose(loaded(input_ids=ids, attention_mask=mask).logits, live, atol=1e-4)
