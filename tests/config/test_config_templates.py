"""What ``init`` writes loads, knows every key, and is what ``examples/`` holds."""

import re
from pathlib import Path

import pytest

from edge_sdk.config.agent import AgentConfig
from edge_sdk.config.base_plan import write_plan
from edge_sdk.config.checking import keys, read_toml
from edge_sdk.config.loading import load_agent_config, load_run_config
from edge_sdk.config.run import RunConfig
from edge_sdk.config.templates import agent_toml, run_toml
from edge_sdk.protocol.base_plan import BasePlan, BlockPlan

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = [
    pytest.param("agent.toml", agent_toml, load_agent_config, AgentConfig, id="agent"),
    pytest.param("run.toml", run_toml, load_run_config, RunConfig, id="run"),
]
# Keys whose default is "none", so that their template shows an example.
NO_DEFAULT = {"device_class", "username", "password_file", "ca", "cert", "key", "memory_mb", "uplink_kbps"}
NO_DEFAULT |= {"min_battery_percent", "battery_training_s", "max_temperature_c", "quiet_hours"}
NO_DEFAULT |= {"traffic_mb_per_day"}
NO_DEFAULT |= {"deadline_s", "template", "base_plan", "factors", "layers", "listen"}
NO_DEFAULT |= {"schedule", "selection", "devices_per_round"}
NO_DEFAULT |= {"rule", "server_optimizer", "server_learning_rate", "momentum", "second_moment", "adaptivity"}


def uncommented(text):
    """The template with every key that is commented out switched on."""
    return re.sub(r"^# (?=[a-z_]+ = |\[)", "", text, flags=re.M)


def leaves(table, prefix=""):
    for name, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.fixture
def folder(tmp_path):
    for name in ("train.jsonl", "held-out.jsonl", "password.txt", "ca.pem", "client.pem", "client.key"):
        (tmp_path / name).touch()
    block = BlockPlan(block=0, bits=4, bytes=4, bytes_before=16, salience=1, error=0.01)
    plan = BasePlan(
        base="0" * 64,
        blocks=(block,),
        method="loss",
        calibration="",
        objective=0.01,
        bytes=4,
        bytes_before=16,
    )
    write_plan(tmp_path / "plan.json", plan)
    return tmp_path


@pytest.mark.parametrize(("name", "text", "load", "kind"), KINDS)
def test_every_key_is_in_its_template_and_may_be_switched_on(folder, name, text, load, kind):
    everything = uncommented(text()).replace("mqtt://", "mqtts://").replace('"embedded"', '"mqtts://host"')
    (folder / name).write_text(everything)
    load(folder / name)
    assert sorted(leaves(read_toml(folder / name, "init"))) == sorted(keys(kind))


@pytest.mark.parametrize(("name", "text", "load", "kind"), KINDS)
def test_a_template_loads_and_a_key_switched_on_has_its_default(folder, name, text, load, kind):
    off = [line for line in text().splitlines() if re.match(r"# [a-z_]+ = ", line)]
    defaults = [line for line in off if line[2:].split(" = ")[0] not in NO_DEFAULT]
    assert len(defaults) > 5
    (folder / name).write_text(text())
    plain = load(folder / name)
    (folder / name).write_text(
        "\n".join(line[2:] if line in defaults else line for line in text().splitlines())
    )
    assert load(folder / name) == plain


@pytest.mark.parametrize(("name", "text", "load", "kind"), KINDS)
def test_the_examples_are_the_templates(name, text, load, kind):
    assert (EXAMPLES / name).read_text() == text()


def test_what_init_fills_in_is_quoted(folder):
    odd = 'C:\\models\\"mine" \x7f <DATA>'
    (folder / "agent.toml").write_text(agent_toml(base=odd, id="a"))
    assert read_toml(folder / "agent.toml", "init")["base"]["path"] == odd
    (folder / "run.toml").write_text(run_toml(labels=['a"b', "ü"]))
    assert load_run_config(folder / "run.toml").run.labels == ('a"b', "ü")
