"""What is read on boards, laptops and servers, from trees of their files, whole and damaged."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import pytest
from recorded_machines import MACHINES, plant

from edge_sdk.device.machine import read_profile
from edge_sdk.device.power import draw
from edge_sdk.device.tegra import l4t_release
from edge_sdk.protocol.measure import Profile


def write(root: Path, name: str, text: str) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return root


def test_an_orin_nano_with_jetpack_6(tmp_path: Path) -> None:
    profile = read_profile(plant("orin-nano-jp6", tmp_path))
    assert profile.machine.startswith("NVIDIA Jetson Orin Nano")
    assert profile.system == "JetPack 6 (L4T 36.4.3)"
    assert profile.accelerators == ("NVIDIA tegra234 (integrated)",)
    assert (profile.shared_memory, profile.gpus) == (True, ())
    assert profile.memory_mb == pytest.approx(7801044 * 1.024e-3)
    assert profile.free_mb == pytest.approx(5234156 * 1.024e-3)
    assert profile.power_mode == "MAXN_SUPER (mode 2)"
    assert profile.power_w == pytest.approx(4.984 * 1.856)
    assert set(profile.rails_w) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert profile.temperature_c == 52.406
    assert set(profile.temperatures_c) == {"cpu-thermal", "gpu-thermal", "tj-thermal"}
    assert profile.throttling == ()
    assert (profile.cpu_mhz, profile.cpu_max_mhz) == (1190.4, 1728.0)
    assert (profile.battery_percent, profile.on_ac) == (None, None)
    assert profile.at > 0


def test_an_agx_orin_that_is_hot_and_has_no_input_rail(tmp_path: Path) -> None:
    profile = read_profile(plant("agx-orin-jp5", tmp_path))
    assert profile.system == "JetPack 5 (L4T 35.4.1)"
    assert profile.power_mode == "30W (mode 2)", "the default, before nvpmodel was ever used"
    assert profile.power_w == pytest.approx(19.928 * (0.4 + 0.12) + 5 * 0.8), "a fed rail counts once"
    assert "NC" not in profile.rails_w and "VDDQ_VDD2_1V8AO" in profile.rails_w
    assert profile.throttling == ("heat: gpu-throttle-alert",)
    assert profile.temperature_c == 99.5
    assert "GPU-therm" not in profile.temperatures_c, "its rail is off"


def test_a_xavier_nx_that_draws_too_much(tmp_path: Path) -> None:
    profile = read_profile(plant("xavier-nx-jp5", tmp_path))
    assert profile.power_mode == "20W_6CORE (mode 8)"
    assert profile.power_w == pytest.approx(5.016 * 1.25)
    assert profile.throttling == ("over-current",)
    assert profile.temperature_c == 45.5, "PMIC-Die says 50 whatever happens"


def test_a_jetson_seen_from_a_container_that_has_no_device_tree(tmp_path: Path) -> None:
    root = plant("xavier-nx-jp5", tmp_path)
    for name in ("proc/device-tree/model", "proc/device-tree/compatible", "etc/nv_tegra_release"):
        (root / name).unlink()
    profile = read_profile(root)
    assert (profile.accelerators, profile.shared_memory) == (("NVIDIA tegra (integrated)",), True)
    assert profile.reasons["machine"]


def test_a_tx2_with_jetpack_4(tmp_path: Path) -> None:
    root = plant("tx2-jp4", tmp_path)
    profile = read_profile(root)
    release = l4t_release(root)
    assert release is not None and release.jetpack == 4
    assert profile.system == "JetPack 4 (L4T 32.7.1)"
    assert profile.power_mode == "MAXQ (mode 1)"
    assert profile.power_w == 2.864
    assert profile.rails_w == {
        "VDD_SYS_GPU": 0.152, "VDD_SYS_SOC": 0.457, "VDD_IN": 2.864, "VDD_SYS_CPU": 0.305
    }  # fmt: skip
    assert (profile.temperature_c, profile.throttling) == (38.0, ())


def test_a_raspberry_pi_at_its_soft_limit(tmp_path: Path) -> None:
    profile = read_profile(plant("raspberry-pi-5", tmp_path))
    assert profile.machine == "Raspberry Pi 5 Model B Rev 1.0"
    assert profile.system == "Debian GNU/Linux 12 (bookworm)"
    assert profile.processor == "Arm implementer 0x41 part 0xd0b"
    assert profile.shared_memory is None
    assert profile.throttling == ("soft temperature limit",), "what was, since the start, is not told"
    assert (profile.temperature_c, profile.power_mode) == (82.35, "governor ondemand")
    assert profile.power_w is None and profile.reasons["power_w"] == "there is no power meter"


def test_a_raspberry_pi_whose_supply_is_weak(tmp_path: Path) -> None:
    root = plant("raspberry-pi-5", tmp_path)
    write(root, "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled", "0x50005\n")
    write(root, "sys/class/hwmon/hwmon3/in0_lcrit_alarm", "1\n")
    assert read_profile(root).throttling == ("under-voltage", "throttled")


def test_a_laptop_on_its_battery(tmp_path: Path) -> None:
    profile = read_profile(plant("laptop", tmp_path))
    assert profile.machine == "ACME Book 3"
    assert profile.accelerators == ("NVIDIA GeForce RTX 3050 Laptop GPU",)
    assert profile.shared_memory is False
    assert (profile.battery_percent, profile.on_ac) == (83.0, False)
    assert profile.power_w == pytest.approx(11.4 * 1.25)
    assert (profile.power_mode, profile.throttling) == ("low-power", ())
    assert profile.temperature_c == 62.0, "neither the disk's nor the radio's"
    assert profile.reasons == {"gpus": "their driver was not asked"}


def test_a_gpu_that_sleeps_is_not_woken_to_be_asked(tmp_path: Path) -> None:
    root = plant("laptop", tmp_path)
    (place,) = (folder.name for folder in (root / "proc/driver/nvidia/gpus").iterdir())
    asleep = f"sys/bus/pci/devices/{place}/power/runtime_status"
    write(root, asleep, "suspended\n")
    profile = read_profile(root, gpus=True)
    assert (profile.gpus, profile.reasons["gpus"]) == ((), "they sleep, and asking would wake them")
    assert profile.accelerators == ("NVIDIA GeForce RTX 3050 Laptop GPU",)
    for woken in (
        read_profile(root, gpus=True, wake=True),
        read_profile(write(root, asleep, "active\n"), gpus=True),
    ):
        assert "sleep" not in woken.reasons.get("gpus", "")


def test_a_laptop_on_its_supply_counts_energy(tmp_path: Path) -> None:
    root = plant("laptop", tmp_path)
    write(root, "sys/class/power_supply/AC/online", "1\n")
    write(root, "sys/class/power_supply/BAT0/status", "Charging\n")
    assert read_profile(root).on_ac
    assert "interval" in draw(root).why
    drawn = draw(root, interval_s=0.001)
    assert drawn.rails == {"package-0": 0.0}, "of the package, whose part the core is"


def test_energy_counters_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plant("laptop", tmp_path)
    write(root, "sys/class/power_supply/BAT0/status", "Full\n")
    forbid(monkeypatch, "energy_uj")
    assert draw(root, interval_s=0.001).why == "RAPL: energy_uj cannot be read: Permission denied (root may)"


def test_a_server(tmp_path: Path) -> None:
    profile = read_profile(plant("server", tmp_path))
    assert profile.power_w == 182.0
    assert profile.temperatures_c == {"k10temp Tctl": 45.125}
    assert profile.power_mode == "governor performance"
    assert profile.throttling is None and profile.reasons["throttling"]
    assert profile.on_ac is None and profile.reasons["on_ac"]


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """These files refuse, also to root, as those of a sleeping sensor do."""
    true_open = Path.open

    def refuse(path: Path, *words: object, **more: object) -> object:
        if path.name in names or "*" in names:
            raise PermissionError(13, os.strerror(13), str(path))
        return true_open(path, *words, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)


def check(profile: Profile) -> None:
    """Nothing is missing without a reason, and nothing is absurd."""
    for field in set(profile.__struct_fields__) - {"throughput"}:
        if getattr(profile, field) in (None, ""):
            assert profile.reasons.get(field), field
    assert profile.temperature_c is None or -40 < profile.temperature_c < 150
    assert profile.power_w is None or 0 <= profile.power_w < 10_000
    assert profile.battery_percent is None or 0 <= profile.battery_percent <= 100


@pytest.mark.parametrize("machine", MACHINES)
def test_a_profile_is_a_small_record(machine: str, tmp_path: Path) -> None:
    """A status carries it every few minutes, also over a phone's link."""
    assert len(msgspec.json.encode(read_profile(plant(machine, tmp_path)))) < 3000


@pytest.mark.parametrize("machine", MACHINES)
def test_files_that_cannot_be_read(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plant(machine, tmp_path)
    check(read_profile(root))
    forbid(monkeypatch, "*")
    profile = read_profile(root)
    check(profile)
    assert "Permission denied" in profile.reasons["memory_mb"]


GARBAGE = ("", "\0", "nan", "inf", "-1e400", "9" * 400, "??", "pmode:", "<", "\xff\xfe", "0x", "R(release)")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("seed", range(3))
def test_files_that_hold_nonsense_or_are_gone(machine: str, seed: int, tmp_path: Path) -> None:
    root, drawn = plant(machine, tmp_path), random.Random(seed)
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        fate = drawn.random()
        if fate < 0.4:
            file.write_text(drawn.choice(GARBAGE))
        elif fate < 0.6:
            file.unlink()
        elif fate < 0.7:
            file.unlink()
            file.mkdir()
    check(read_profile(root, interval_s=0.001))


@pytest.mark.parametrize("text", ["nan", "1e400", "-5", "300"])
def test_a_charge_that_cannot_be(text: str, tmp_path: Path) -> None:
    root = write(plant("laptop", tmp_path), "sys/class/power_supply/BAT0/capacity", text)
    profile = read_profile(root)
    assert profile.battery_percent is None and profile.reasons["battery_percent"]


def test_a_battery_that_tells_its_energy_alone(tmp_path: Path) -> None:
    root = plant("laptop", tmp_path)
    (root / "sys/class/power_supply/BAT0/capacity").unlink()
    write(root, "sys/class/power_supply/BAT0/energy_now", "20000000\n")
    write(root, "sys/class/power_supply/BAT0/energy_full", "50000000\n")
    assert read_profile(root).battery_percent == 40.0
