"""Bad config files: everything that is wrong is told at once, and what to do about it."""

import os
from pathlib import Path

import pytest

from edge_sdk.config.loading import load_agent_config, load_run_config
from edge_sdk.errors import ConfigError

AGENT = """
[agent]
id = "a"
[broker]
url = "mqtt://127.0.0.1:1883"
[base]
path = "org/model"
[data]
path = "rows.jsonl"
"""
RUN = """
[run]
name = "r"
labels = ["x", "y"]
[base]
path = "org/model"
"""


@pytest.fixture
def agent(tmp_path):
    (tmp_path / "rows.jsonl").touch()

    def load(text=AGENT, extra=""):
        (tmp_path / "agent.toml").write_text(text + extra)
        return load_agent_config(tmp_path / "agent.toml")

    return load


@pytest.fixture
def run(tmp_path):
    def load(text=RUN, extra=""):
        (tmp_path / "run.toml").write_text(text + extra)
        return load_run_config(tmp_path / "run.toml")

    return load


def error(load, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    return str(caught.value)


def test_paths_are_absolute_and_start_at_the_file(agent, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "agent.toml").write_text(AGENT)
    config = load_agent_config("../agent.toml")
    assert config.data.path == str(tmp_path / "rows.jsonl")
    assert config.agent.state_dir == str(tmp_path / "state")


def test_a_base_is_a_folder_or_a_hub_id(agent, tmp_path, monkeypatch):
    assert agent().base.path == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert agent().base.path == str(tmp_path / "org" / "model")
    missing = agent(AGENT.replace("org/model", "./org/none"))
    assert missing.base.path == str(tmp_path / "org" / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert agent(AGENT.replace("org/model", "~/org/model")).base.path == str(tmp_path / "org" / "model")


def test_all_errors_of_a_file_come_at_once(agent, tmp_path):
    text = """
    [agent]
    id = "a b"
    device_clas = "jetson-nano"
    emulated = 1
    [broker]
    url = "mqtt://example.org"
    username = "u"
    [base]
    [data]
    path = "nothing.jsonl"
    [trainer]
    threads = -1
    [limits]
    memory_mb = nan
    """
    lines = error(agent, text).splitlines()
    assert lines[0].endswith("agent.toml: 9 errors:")
    keys = [line.strip().split(": ")[0] for line in lines[1:]]
    assert sorted(keys) == [
        "agent.device_clas", "agent.emulated", "agent.id", "base.path", "broker.password_file", "broker.url",
        "data.path", "limits.memory_mb", "trainer.threads",
    ]  # fmt: skip


def test_one_error_is_one_line(agent):
    text = error(agent, extra="[trainer]\nthreads = -1")
    assert "\n" not in text
    assert text.endswith("agent.toml: trainer.threads: received -1; allowed: an integer at least 0")


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("[trainer]\nthread = 1", 'trainer.thread: is no key of this file (did you mean "threads"?)'),
        (
            "[trainer]\nmemory_mb = 1",
            "trainer.memory_mb: is no key of this file (here it is limits.memory_mb)",
        ),
        (
            "[lora]\nrank = 4",
            "lora: is no section of this file ([lora] belongs in run.toml, which the server owns)",
        ),
        ("[trainer]\nsteps = 4", "training.steps belongs in run.toml, which the server owns"),
        ("[limit]\nx = 1", 'limit: is no section of this file (did you mean "limits"?)'),
        ("[limits]\nzzz = 1", "[limits] holds memory_mb, uplink_kbps"),
        ("[trainer]\nthreads = 1.5", "trainer.threads: received 1.5; allowed: an integer at least 0"),
        ("[trainer]\nthreads = true", "received true; allowed: an integer"),
        ('[trainer]\ndevice = "cuda:x"', '"cuda:x"; allowed: "auto", "cpu" or "cuda:N"'),
        ("[limits]\nmemory_mb = inf", "received inf; allowed: a finite number above 0"),
        ("[limits]\nmemory_mb = nan", "received nan; allowed: a finite number above 0"),
        ("[limits]\nmemory_mb = 1e300", "allowed: a finite number above 0, at most 1000000000"),
        (
            "[gates]\nmax_temperature_c = 4",
            "gates.temperature_margin_c: is 5, and gates.max_temperature_c 4: once closed it would never",
        ),
        ("trainer = 3", "data.trainer: is no key"),
    ],
)
def test_keys_and_values(agent, extra, told):
    assert told in error(agent, extra=extra)


def test_a_section_that_is_no_table(agent):
    assert "limits: received 3; allowed: a table, [limits]" in error(agent, "limits = 3\n" + AGENT)


def test_missing_sections_name_their_keys(agent):
    text = error(agent, "")
    for key in ("agent.id", "base.path", "data.path", "broker.url"):
        assert f"{key}: is missing" in text


def test_an_int_is_a_float(agent):
    assert agent(extra="[limits]\nmemory_mb = 900").limits.memory_mb == 900.0


def test_a_newline_is_no_part_of_a_name(agent):
    assert "agent.id" in error(agent, AGENT.replace('"a"', '"a\\n"'))


def test_device_classes_that_exist_are_listed(agent):
    text = error(agent, AGENT.replace('id = "a"', 'id = "a"\ndevice_class = "jetson-nanoo"'))
    assert 'agent.device_class: there is no device class "jetson-nanoo" (did you mean "jetson-nano"?' in text
    assert "raspberry-pi-5" in text
    assert "agent.device_class" in error(agent, AGENT.replace('id = "a"', 'id = "a"\nemulated = true'))


def test_an_agent_has_no_embedded_broker(agent):
    assert "broker.url" in error(agent, AGENT.replace("mqtt://127.0.0.1:1883", "embedded"))


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("none.csv", "which does not exist (looked at "),
        (".", "which is no file"),
        ("~nobody-of-that-name/x.csv", "which is no path here"),
        ("a\\u0000b.csv", "which"),
        ("", "allowed: the path of a file that exists"),
    ],
)
def test_data_paths(agent, path, told):
    text = error(agent, AGENT.replace("rows.jsonl", path))
    assert "data.path: received" in text
    assert told in text


def test_who_only_looks_needs_no_files(agent, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    assert "data.path" in error(agent, AGENT)
    (tmp_path / "agent.toml").write_text(AGENT + '[trainer]\nbase_plan = "gone.json"\n')
    config = load_agent_config(tmp_path / "agent.toml", files=False)
    assert config.data.path == str(tmp_path / "rows.jsonl")


def test_data_formats_and_columns(agent, tmp_path):
    (tmp_path / "rows.xlsx").touch()
    assert 'suffix ".xlsx"' in error(agent, AGENT.replace("rows.jsonl", "rows.xlsx"))
    assert "data.label" in error(agent, extra='text = "label"')
    assert "data.response" in error(agent, extra='prompt = "x"\nresponse = "x"')
    (tmp_path / "rows.parquet").touch()
    assert agent(AGENT.replace("rows.jsonl", "rows.parquet")).data.messages == "messages"


def test_a_state_folder_that_is_a_file(agent, tmp_path):
    (tmp_path / "state").touch()
    assert "agent.state_dir" in error(agent, AGENT.replace('id = "a"', 'id = "a"\nstate_dir = "state"'))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('["x", "y"]', '["x", "x", "y"]', 'run.labels: holds "x" more than once'),
        ('["x", "y"]', '["x", ""]', "run.labels: holds an empty label"),
        ('["x", "y"]', '["x"]', "run.labels: received a list of 1; allowed: a list of 2 to 4096 values"),
        ('["x", "y"]', '["x", 3]', "run.labels[1]: received 3; allowed: text"),
        ('name = "r"', 'name = "r"\ntemplate = "{txt}"', "run.template"),
        ('name = "r"', 'name = "r"\nid = "r"', "agent.id belongs in agent.toml, which the device owns"),
        ("[base]", "[lora]\ntargets = []\n[base]", "lora.targets"),
        ("[base]", '[data]\npath = "x"\n[base]', "here it is [evaluation.data]"),
        ("[base]", '[evaluation.data]\npath = "x"\n[base]', "evaluation.data.path"),
        ("[base]", "[evaluation]\n[base]", "evaluation.data.path: is missing"),
        (
            "[base]",
            '[training]\noptimizer = "adam"\n[base]',
            'received "adam"; allowed: one of "adamw", "adamw8bit", "paged-adamw8bit", "sgd"',
        ),
        ("[base]", "[training]\nlearning_rate = 20\n[base]", "a finite number above 0, at most 10"),
        ("[base]", "[training]\nsteps = 10000000\n[base]", "an integer at least 1, at most 1000000"),
        ("[base]", "[lora]\nrank = 5000\n[base]", "an integer at least 1, at most 4096"),
        ("[base]", "[rounds]\ndeadline_s = 1e12\n[base]", "a finite number above 0, at most 1000000000"),
        ("[base]", "[transfer]\nchunk_kib = 257\n[base]", "an integer at least 1, at most 256"),
        ("[base]", '[rounds]\nschedule = "buffered"\nlate = "refuse"\n[base]', "rounds.late"),
        ("[base]", '[rounds]\nselection = "all"\ndevices_per_round = 2\n[base]', "rounds.devices_per_round"),
        ("[base]", '[rounds]\nselection = "utility"\n[base]', "rounds.devices_per_round is missing"),
        ("[base]", "[rounds]\ndevices_per_round = 1.5\n[base]", "an integer at least 1 or a finite number"),
        ("[base]", "[rounds]\nquorum = 0\n[base]", "above 0, at most 1"),
    ],
)
def test_run_rules(run, old, new, told):
    assert told in error(run, RUN.replace(old, new))


CAUSAL = RUN.replace('labels = ["x", "y"]', 'task = "causal-lm"')


def test_a_causal_lm_has_a_template_of_its_own_and_no_labels(run):
    assert run().run.row_template == "{text}"
    config = run(CAUSAL).run
    assert (config.labels, config.row_template) == ((), "{prompt}\n{response}")
    template = "<q>{prompt}</q> {response} <end>"
    assert run(CAUSAL.replace("[base]", f'template = "{template}"\n[base]')).run.row_template == template


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            '"causal-lm"',
            '"causal-lm"\nlabels = ["a", "b"]',
            "run.labels: received a list of 2, but run.task is",
        ),
        ('"causal-lm"', '"classification"', "run.labels: is missing; allowed: a list of 2 to 4096 values"),
        ('"causal-lm"', '"summaries"', 'received "summaries"; allowed: one of "causal-lm", "classification"'),
        ('"causal-lm"', '"causal-lm"\ntemplate = "{text}"', "run.template: received"),
        ('"causal-lm"', '"causal-lm"\ntemplate = "{response}{prompt}"', "holds {prompt}, then {response}"),
        ('"causal-lm"', '"causal-lm"\ntemplate = "{prompt}{prompt}{response}"', "run.template"),
    ],
)
def test_task_rules(run, old, new, told):
    assert told in error(run, CAUSAL.replace(old, new))


def test_a_run_needs_little(run):
    config = run()
    assert config.broker.url == "embedded"
    assert config.evaluation is None


def test_files_that_cannot_be_used(tmp_path):
    assert "there is no such file" in error(load_run_config, tmp_path / "none.toml")
    assert "cannot be read" in error(load_run_config, tmp_path)
    assert "is above 4 MiB" in error(load_run_config, Path("/dev/zero"))
    (tmp_path / "run.toml").write_text('[run]\nname = "r"\nlabels = x\n[base]')
    assert "run.toml: is not TOML: " in error(load_run_config, tmp_path / "run.toml")
    assert "line 3" in error(load_run_config, tmp_path / "run.toml")
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in error(load_run_config, tmp_path / "run.toml")
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + RUN.encode())
    assert load_run_config(tmp_path / "run.toml").run.name == "r"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "run.toml").chmod(0)
    assert "cannot be read" in error(load_run_config, tmp_path / "run.toml")
