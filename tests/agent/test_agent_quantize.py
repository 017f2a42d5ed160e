"""``edge-agent quantize-base``: the plan as a table, as JSON and as a file that agent.toml may name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from agent_fakes import PRINT, World
from msgspec.structs import replace
from typer.testing import CliRunner

from edge_sdk.cli import quantizing
from edge_sdk.cli.main import app
from edge_sdk.config.agent import TrainerSection
from edge_sdk.config.base_plan import read_plan, write_plan
from edge_sdk.config.loading import load_agent_config
from edge_sdk.errors import BaseModelError, ConfigError
from edge_sdk.protocol.base_plan import BasePlan, BlockPlan
from edge_sdk.protocol.trainer import BasePlanned

ROOT = str(Path(__file__).parents[2])


def quantize(cwd: Path, *words: str, path: str = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "from edge_sdk.cli.main import main; main()", "quantize-base",
         *words],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=240,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An agent's folder whose base is a random language model."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "no"}\n')
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, trainer: str = "") -> None:
    (folder / "agent.toml").write_text(
        f'[agent]\nid = "one"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n[base]\npath = "base"\n'
        f'[data]\npath = "rows.jsonl"\n[trainer]\n{trainer}\n'
    )


@pytest.mark.train
def test_a_plan_is_shown_and_written_and_the_config_takes_it(folder: Path) -> None:
    small = json.loads(quantize(folder, "--base", "base", "--precision", "int2", "--json").stdout)
    assert small["bytes"] + small["saved_bytes"] == small["bytes_before"] and small["written"] is None
    assert {block["bits"] for block in small["blocks"]} == {2}
    # room for two of the three blocks at 4 bits, which at this width take 1.55 times as much
    budget = str((small["bytes"] + 1.3 * small["blocks"][0]["bytes"]) / 1e6)
    done = quantize(folder, "--base", "base", "--budget-mb", budget, "--length", "16", "--out", "plan.json")
    assert done.returncode == 0, done.stderr
    plan = read_plan(folder / "plan.json")
    lines = done.stdout.splitlines()
    assert "salience by the loss's rise, calibrated on 32 rows of random tokens" in lines
    rows = [line.split() for line in lines if line[:5].strip().isdigit()]
    assert [int(row[2]) for row in rows] == list(plan.bits) and sorted(plan.bits) == [2, 4, 4]
    assert f"{plan.bytes_before / plan.bytes:.1f} times smaller" in done.stdout
    assert "measured 6 of 6" in done.stderr and "measured" not in done.stdout
    assert plan.bytes <= float(budget) * 1e6

    write_config(folder, 'base_plan = "plan.json"')
    assert load_agent_config(folder / "agent.toml").trainer.base_held() == ("plan", plan)


@pytest.mark.parametrize(("size", "word"), [(8, "fp32"), (4, "fp16")])
def test_a_budget_above_the_whole_base(
    size: int, word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    block = BlockPlan(block=0, bits=16, bytes=4, bytes_before=size, salience=1.0, error=0.01)
    plan = BasePlan(
        base=PRINT.base, blocks=(block,), method="loss", calibration="rows", objective=0.01,
        bytes=4_000_000, bytes_before=5_000_000,
    )  # fmt: skip
    monkeypatch.setattr(quantizing, "_ask", lambda request, tell: BasePlanned(id=1, plan=plan, seconds=1.0))
    (tmp_path / "config.json").write_text("{}")
    for budget, needless in ((5.0, True), (4.9, False)):
        done = CliRunner().invoke(app, ["quantize-base", "--base", str(tmp_path), "--budget-mb", str(budget)])
        assert done.exit_code == 0
        assert ("no plan is needed" in done.stdout) == needless and (f'"{word}"' in done.stdout) == needless


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    assert "one of --budget-mb and --precision" in refused(quantize(tmp_path), 64)
    both = quantize(tmp_path, "--budget-mb", "3", "--precision", "nf4")
    assert "one of --budget-mb and --precision" in refused(both, 64)
    assert "name a base each" in refused(
        quantize(tmp_path, "--base", "b", "-c", "c", "--precision", "nf4"), 64
    )
    assert "no such folder" in refused(quantize(tmp_path, "--base", "./b", "--precision", "nf4"), 66)
    assert "agent.toml" in refused(quantize(tmp_path, "--precision", "nf4"), 64)
    missing = quantize(tmp_path, "--base", ".", "--precision", "nf4", "--calibration", "none.jsonl")
    assert "there is no such file" in refused(missing, 64)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text('raise ModuleNotFoundError("No module named torch", name="torch")\n')
    done = quantize(tmp_path, "--base", "base", "--precision", "nf4", "--json", path=f"{hidden}:{ROOT}")
    told = refused(done, 70)
    assert "torch, which is not installed" in told and "edge-sdk[train]" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [("{}", "is no base plan"), ("x", "is no base plan"), (None, "cannot be read")],
    ids=["empty", "no-json", "missing"],
)
def test_a_file_that_is_no_plan(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_plan(tmp_path / "plan.json")


def test_a_config_whose_plan_is_none_or_beside_a_precision(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "no"}\n')
    (tmp_path / "plan.json").write_text("{}")
    write_config(tmp_path, 'base_plan = "plan.json"')
    with pytest.raises(ConfigError, match=r"trainer\.base_plan.*is no base plan"):
        load_agent_config(tmp_path / "agent.toml")
    write_config(tmp_path, 'base_plan = "plan.json"\nbase_precision = "nf4"')
    with pytest.raises(ConfigError, match=r"base_plan says otherwise"):
        load_agent_config(tmp_path / "agent.toml")
    write_config(tmp_path, 'base_precision = "int3"')
    with pytest.raises(ConfigError, match=r"trainer\.base_precision"):
        load_agent_config(tmp_path / "agent.toml")


@pytest.mark.parametrize("own", [True, False], ids=["own", "other"])
def test_an_agent_takes_the_plan_of_its_own_base_alone(tmp_path: Path, own: bool) -> None:
    block = BlockPlan(block=0, bits=4, bytes=4, bytes_before=16, salience=1.0, error=0.01)
    plan = BasePlan(
        base=PRINT.base if own else "f" * 64, blocks=(block,), method="loss", calibration="rows",
        objective=0.01, bytes=4, bytes_before=16,
    )  # fmt: skip
    write_plan(tmp_path / "plan.json", plan)
    world = World(tmp_path)
    world.config = replace(world.config, trainer=TrainerSection(base_plan=str(tmp_path / "plan.json")))
    world.start()
    world.aggregator.hello()
    world.settle()
    if own:
        setups = [request.setup for request in world.trainer.requests]
        assert {(setup.base_precision, setup.base_plan) for setup in setups} == {("plan", plan)}
    else:
        assert isinstance(world.core.error, BaseModelError)
        assert "made for another base" in world.core.error.message
