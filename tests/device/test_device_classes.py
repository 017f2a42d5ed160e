"""Device classes: the files that ship, and how a wrong one is told."""

import subprocess
import sys
from importlib import resources

import pytest

from edge_sdk.device.classes import Figure, device_class, device_classes, parse_device_class
from edge_sdk.errors import ConfigError

MINIMAL = 'name = "x"\ntitle = "X"\nruns_agent = "native"\nshared_memory = true\n'


def test_the_files_that_ship():
    classes = device_classes()
    assert {
        "jetson-nano",
        "jetson-tx2",
        "jetson-orin-nano-8gb",
        "raspberry-pi-5",
        "laptop-cpu",
    } <= classes.keys()
    assert device_class("jetson-tx2").runs_agent == "no"
    assert "JetPack 4" in device_class("jetson-tx2").why
    assert device_class("jetson-agx-xavier").runs_agent == "container"
    for name, found in classes.items():
        assert found.name == name
        assert found.title
        if found.cores:
            assert found.cores.value == int(found.cores.value)
        if found.memory_mb:  # 10^6 bytes of a whole number of GiB
            assert (
                abs(found.memory_mb.value * 1e6 / 2**30 - round(found.memory_mb.value * 1e6 / 2**30)) < 1e-3
            )


def test_every_figure_has_a_source_with_a_date():
    for found in device_classes().values():
        used = set()
        for key in found.__struct_fields__:
            value = getattr(found, key)
            if hasattr(value, "source"):
                assert found.sources[value.source].date
                used.add(value.source)
        assert used == found.sources.keys()


def test_every_key_is_explained():
    readme = resources.files("device_profiles").joinpath("README.md").read_text()
    for key in device_class("laptop-cpu").__struct_fields__:
        assert f"`{key}`" in readme or key == "sources"


def test_an_unknown_class_lists_those_that_exist():
    with pytest.raises(ConfigError) as caught:
        device_class("rasberry-pi-5")
    assert 'did you mean "raspberry-pi-5"?' in str(caught.value)
    assert all(name in str(caught.value) for name in device_classes())


def test_a_minimal_class():
    text = MINIMAL + 'cores = { value = 4, source = "s" }\n[sources.s]\ntitle = "T"\ndate = "2026-01"\n'
    assert parse_device_class("x.toml", text).cores == Figure(value=4, source="s")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x", "x.toml: is not TOML"),
        (MINIMAL + "memory = 3", "memory: is no key"),
        (MINIMAL + "cores = 4", "cores: received 4; allowed: a table"),
        (MINIMAL + "cores = { value = 4 }", "cores.source: is missing"),
        (MINIMAL + 'cores = { value = 4, source = "s" }', 'cores.source: "s" is not in [sources]'),
        (MINIMAL + '[sources.s]\ntitle = "T"\ndate = "soon"', "sources"),
        (MINIMAL.replace('"x"', '"y"'), 'name: received "y"'),
        (MINIMAL.replace("native", "no"), "why: is missing"),
        (MINIMAL.replace("native", "maybe"), 'allowed: one of "container", "native", "no"'),
    ],
)
def test_wrong_classes(text, told):
    with pytest.raises(ConfigError) as caught:
        parse_device_class("x.toml", text)
    assert told in str(caught.value)


def test_these_rooms_stay_light():
    code = """
import sys
import edge_sdk.config.loading, edge_sdk.data.base_files, edge_sdk.data.rows, edge_sdk.device.machine
edge_sdk.device.machine.read_profile()
heavy = {"numpy", "torch", "asyncio", "huggingface_hub", "transformers", "safetensors"} & sys.modules.keys()
sys.exit(", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
