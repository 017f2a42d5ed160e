"""The trainer's own process loads nothing that training never calls, and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

SCRIPT = """
import json, sys
from edge_sdk.training.lean import keep_lean
keep_lean()
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training_lean import losses_of
losses = losses_of(sys.argv[2:])
heavy = ["sympy", "torch._inductor", "torch._dynamo.utils", "torch.distributed.tensor", "accelerate.utils"]
found = [name for name in heavy if name in sys.modules]
import torch._dynamo.utils
twice = torch._dynamo.optimize("eager")(lambda x: x * 2)
print(json.dumps([losses, found, twice(torch.ones(1)).item(), "torch._dynamo.utils" in sys.modules]))
"""


def losses_of(folders: list[str]) -> list[float]:
    """Three steps with the base in each of the folders."""
    from edge_sdk.protocol.model import LoraShape
    from edge_sdk.protocol.spec import TrainSpec
    from edge_sdk.training.model import load_model
    from edge_sdk.training.optimizer import RoundOptimizer
    from edge_sdk.updates.initial import initial_adapter

    losses = []
    for folder in folders:
        model = load_model(Path(folder), ("a", "b", "c"), LoraShape(), "cpu")
        model.set_adapter(initial_adapter(model.shape, LoraShape(), 1))
        model.tune(2)
        optimizer = RoundOptimizer(model.trained(), TrainSpec(), steps=3)
        ids = torch.arange(3, 19).reshape(2, 8)
        for _ in range(3):
            logits = model.logits(ids, torch.ones_like(ids))
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_what_is_left_out_is_not_missed(bases: dict[Any, Path]) -> None:
    folders = [str(bases[family, "classification"]) for family in ("bert", "llama")]
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), *folders],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    losses, found, twice, compiler = json.loads(made.stdout.splitlines()[-1])
    assert losses == pytest.approx(losses_of(folders), rel=1e-6)
    assert found == []
    # who asks for the compiler after all gets the real one
    assert twice == 2.0 and compiler
