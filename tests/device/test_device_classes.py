"""Device classes: the files that ship, and how a wrong one is told."""

import subprocess
import sys
from importlib import resources

import pytest

from edge_sdk.device.capacity import GPU_SYSTEM_MB, SYSTEM_MB, capacity
from edge_sdk.device.classes import Figure, PowerMode, device_class, device_classes, parse_device_class
from edge_sdk.errors import ConfigError

MINIMAL = 'name = "x"\ntitle = "X"\nruns_agent = "native"\nshared_memory = true\n'
SOURCE = '[sources.s]\ntitle = "T"\ndate = "2026-01"\n'


def test_the_files_that_ship():
    classes = device_classes()
    assert len(classes) >= 24
    jetsons = ["nano", "tx2", "xavier-nx", "agx-xavier", "orin-nano-4gb", "orin-nano-8gb"]
    jetsons += ["orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb"]
    assert {f"jetson-{name}" for name in jetsons} | {"raspberry-pi-5", "laptop-cpu"} <= classes.keys()
    assert device_class("jetson-tx2").runs_agent == device_class("jetson-nano").runs_agent == "no"
    assert "JetPack 4" in device_class("jetson-tx2").why
    assert device_class("jetson-agx-xavier").runs_agent == "container"
    for name, found in classes.items():
        assert found.name == name
        assert found.title
        if found.cores:
            assert found.cores.value == int(found.cores.value)
        for memory in filter(None, (found.memory_mb, found.accelerator_memory_mb)):
            gib = memory.value * 1e6 / 2**30  # 10^6 bytes of a whole number of GiB
            assert abs(gib - round(gib)) < 1e-3


def test_every_jetson_has_its_power_modes():
    for name, found in device_classes().items():
        if name.startswith("jetson-"):
            assert len(found.power_modes) >= 2
            assert all(mode.cores for mode in found.power_modes.values())


def test_every_figure_has_a_source_with_a_date():
    for found in device_classes().values():
        used = {mode.source for mode in found.power_modes.values()}
        for key in found.__struct_fields__:
            value = getattr(found, key)
            if hasattr(value, "source"):
                assert found.sources[value.source].date
                used.add(value.source)
        assert used == found.sources.keys()


def test_every_key_is_explained():
    readme = resources.files("device_profiles").joinpath("README.md").read_text()
    for key in (*device_class("laptop-cpu").__struct_fields__, *PowerMode.__struct_fields__):
        assert f"`{key}`" in readme or key in ("sources", "note")


def test_an_unknown_class_lists_those_that_exist():
    with pytest.raises(ConfigError) as caught:
        device_class("rasberry-pi-5")
    assert 'did you mean "raspberry-pi-5"?' in str(caught.value)
    assert all(name in str(caught.value) for name in device_classes())


def test_a_minimal_class():
    text = MINIMAL + 'cores = { value = 4, source = "s" }\n' + SOURCE
    assert parse_device_class("x.toml", text).cores == Figure(value=4, source="s")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x", "x.toml: is not TOML"),
        (MINIMAL + "memory = 3", "memory: is no key"),
        (MINIMAL + "cores = 4", "cores: received 4; allowed: a table"),
        (MINIMAL + "cores = { value = 4 }", "cores.source: is missing"),
        (MINIMAL + 'cores = { value = 4, source = "s" }', 'cores.source: "s" is not in [sources]'),
        (MINIMAL + '[sources.s]\ntitle = "T"\ndate = "soon"', 'sources.s.date: received "soon"'),
        (MINIMAL + SOURCE, "sources.s: no figure names it"),
        (MINIMAL.replace('"x"', '"y"'), 'name: received "y"'),
        (MINIMAL.replace("native", "no"), "why: is missing"),
        (MINIMAL.replace("native", "maybe"), 'allowed: one of "container", "native", "no"'),
        (MINIMAL + "[power_modes]\n15W = { watts = 15 }", "power_modes.15W.source: is missing"),
        (MINIMAL + "[power_modes]\n15W = 15", "power_modes.15W: received 15; allowed: a table"),
        (MINIMAL + '[power_modes]\n15W = { source = "s" }', 'power_modes.15W.source: "s" is not in'),
        (MINIMAL + 'idle_mb = { value = 4, source = "s" }\n' + SOURCE, "idle_mb: stands without visible_mb"),
    ],
)
def test_wrong_classes(text, told):
    with pytest.raises(ConfigError) as caught:
        parse_device_class("x.toml", text)
    assert told in str(caught.value)


def test_everything_wrong_with_a_file_is_told_at_once():
    text = (
        MINIMAL.replace("true", '"yes"')
        + """
        memory_mb = { value = -1, source = "s" }
        [power_modes]
        15W = { watts = "15", source = "s" }
        30W = { wats = 30, source = "s" }
        [sources.s]
        title = "T"
    """
    )
    with pytest.raises(ConfigError) as caught:
        parse_device_class("x.toml", text)
    for told in (
        "5 errors", "shared_memory", "memory_mb.value", "power_modes.15W.watts",
        'power_modes.30W.wats: is no key of this file (did you mean "watts"?)', "sources.s.date: is missing",
    ):  # fmt: skip
        assert told in str(caught.value)


def test_a_mode_cannot_switch_on_more_than_there_is():
    text = MINIMAL + 'cores = { value = 4, source = "s" }\npower_modes.A = { cores = 5, source = "s" }\n'
    with pytest.raises(ConfigError, match=r"power_modes.A.cores: received 5; the class has 4"):
        parse_device_class("x.toml", text + SOURCE)


def test_memory_for_a_program_says_how_it_came_about():
    measured = capacity(device_class("jetson-agx-xavier"))
    assert 30_000 < measured.memory_mb < 33_000 and "idle board" in measured.memory_how
    half = capacity(device_class("jetson-xavier-nx"))
    assert half.memory_mb == device_class("jetson-xavier-nx").visible_mb.value - SYSTEM_MB
    assert "assumed" in half.memory_how
    own = capacity(device_class("laptop-rtx-4060"))
    assert own.memory_mb == 8590 - GPU_SYSTEM_MB and "assumed" in own.memory_how
    none = capacity(device_class("laptop-cpu"))
    assert none.memory_mb is None and any(text.startswith("memory_mb: ") for text in none.absent)


def test_a_power_mode_decides_the_peak():
    board = device_class("jetson-agx-orin-64gb")
    assert capacity(board).fp32_tflops == 5.3
    assert capacity(board, "MAXN").fp32_tflops == pytest.approx(5.3, rel=0.01)  # by cores and clock
    slow = capacity(board, "MODE_15W")
    assert slow.fp32_tflops == pytest.approx(2e-6 * 768 * 408, rel=1e-3)
    assert (slow.cores, slow.watts) == (4, 15)
    unknown = capacity(device_class("laptop-rtx-4090"), "80W")  # its clock is not known
    assert unknown.fp32_tflops is None and any("fp32" in text for text in unknown.absent)
    with pytest.raises(ConfigError, match="no power mode"):
        capacity(board, "60W")


def test_these_rooms_stay_light():
    code = """
import sys
import edge_sdk.config.loading, edge_sdk.data.base_files, edge_sdk.data.rows, edge_sdk.device.machine
import edge_sdk.device.fleets, edge_sdk.device.capacity
edge_sdk.device.machine.read_profile()
heavy = {"numpy", "torch", "asyncio", "huggingface_hub", "transformers", "safetensors"} & sys.modules.keys()
sys.exit(", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
