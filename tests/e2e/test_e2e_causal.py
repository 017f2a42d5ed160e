"""A causal LM over MQTT: two devices, one with JSONL and one with Parquet, fine-tune a small Llama."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from causal_base import make_llama, write_prompts
from e2e_fleet import Fleet, chain_of, command, mqtt_section
from test_e2e_errors import check_error

from examples.demo.children import AGGREGATOR

pytest.importorskip("pyarrow")
pytestmark = [pytest.mark.e2e, pytest.mark.train]
ROUNDS = 2


def write_run(fleet: Fleet, *, task: str = 'task = "causal-lm"') -> None:
    write_prompts(fleet.folder / "held-out.jsonl", 16, first=48)
    fleet.run_toml.write_text(
        f'[run]\nname = "speak"\n{task}\nstate_dir = "server"\n'
        f"[base]\npath = {json.dumps(str(fleet.base))}\n"
        "[training]\nsteps = 20\nbatch = 8\nmax_length = 16\nlearning_rate = 1e-2\n"
        f"[rounds]\ntotal = {ROUNDS}\nmin_devices = 2\n"
        '[evaluation.data]\npath = "held-out.jsonl"\n[trainer]\ndevice = "cpu"\nthreads = 1\n'
    )


def write_agents(fleet: Fleet, url: str) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = write_prompts(fleet.folder / "one.jsonl", 32)
    lines = write_prompts(fleet.folder / "two.jsonl", 32, 16).read_text().splitlines()
    second = [json.loads(line) for line in lines]
    columns = {"asked": [row["prompt"] for row in second], "said": [row["response"] for row in second]}
    parquet.write_table(pyarrow.table(columns), fleet.folder / "two.parquet")
    data = {
        "one": f'path = "{rows.name}"',
        "two": 'path = "two.parquet"\nprompt = "asked"\nresponse = "said"',
    }
    for device, text in data.items():
        fleet.agent_toml(device).write_text(
            f'[agent]\nid = "{device}"\nstate_dir = "state-{device}"\n'
            f"[base]\npath = {json.dumps(str(fleet.base))}\n[data]\n{text}\n"
            f'[trainer]\ndevice = "cpu"\nthreads = 1\n{mqtt_section(url)}'
        )


@pytest.fixture(scope="module")
def finished(fleets: Callable[[str], Fleet]) -> Fleet:
    fleet = fleets("causal")
    fleet.base = make_llama(fleet.folder / "base", layers=2)
    write_run(fleet)
    fleet.start_server()
    write_agents(fleet, fleet.broker_url())
    for device in ("one", "two"):
        fleet.start_agent(device)
    fleet.run_out()
    return fleet


def test_perplexity_falls(finished: Fleet) -> None:
    told = finished.events("server", "version.evaluated")
    assert [one["version"] for one in told] == list(range(ROUNDS + 1))
    perplexity = [one["perplexity"] for one in told]
    assert perplexity[0] > 15 and perplexity[-1] < 4 and perplexity[-1] < perplexity[1]
    assert {(one["examples"], one["tokens"], one["f1"]) for one in told} == {(16, 16 * 7, None)}
    for device in ("one", "two"):
        (described,) = finished.events(device, "trainer.described")
        assert (described["samples"], described["dropped"]) == (32, 0)
        assert len(finished.events(device, "update.receipt")) == ROUNDS
        assert all(choice["depth"] >= 1 for choice in finished.events(device, "round.choice"))


def test_the_operator_sees_perplexity(finished: Fleet) -> None:
    versions = finished.ask_server("versions")
    best = min(versions, key=lambda one: (one["loss"], -one["number"]))
    status = finished.ask_server("status")
    assert status["best_version"] == best["number"] and status["best_perplexity"] == best["perplexity"]
    assert status["perplexity"] == versions[-1]["perplexity"]
    for words in (("status",), ("versions",)):
        assert "perplexity" in command(AGGREGATOR, *words, "--config", str(finished.run_toml))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # an old name inside peft
def test_the_export_is_a_causal_lm_adapter(finished: Fleet, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edge_sdk.protocol.model import LoraShape
    from edge_sdk.training.model import load_model
    from edge_sdk.updates.versions import read_adapter

    out = tmp_path / "adapter"
    told = json.loads(
        command(AGGREGATOR, "export", "--config", str(finished.run_toml), "--out", str(out), "--json")
    )
    assert "perplexity" in told["why"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    card = (out / "README.md").read_text()
    assert "Held-out perplexity" in card and "AutoModelForCausalLM" in card

    chain = chain_of(finished.ask_server("versions"), told["version"], finished.folder / "server")
    live = load_model(finished.base, (), LoraShape(), "cpu", task="causal-lm")
    live.set_adapter(read_adapter(chain))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(finished.base), out).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.base)
    batch = tokenizer("say grey then dog ?\nthe dog and the grey .", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.inference_mode():
        ours: Any = live.net(input_ids=ids, attention_mask=mask).logits
        theirs = loaded(input_ids=ids, attention_mask=mask).logits
        prompt = tokenizer("say grey then dog ?", return_tensors="pt")["input_ids"]
        said = tokenizer.decode(
            loaded.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=2)[0, len(prompt[0]) :]
        )
    assert float((ours - theirs).abs().max()) <= 1e-4 and float(ours.abs().max()) > 0.1
    assert said.startswith("the") and "</s>" in said


def test_another_task_is_another_run(finished: Fleet) -> None:
    text = finished.run_toml.read_text()
    try:
        write_run(finished, task='labels = ["a", "b"]')
        words = [AGGREGATOR, "run", "--config", str(finished.run_toml)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        check_error(done, 73, ("run.task was 'causal-lm' and is 'classification'",))
    finally:
        finished.run_toml.write_text(text)
