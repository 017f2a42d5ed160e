"""Temperatures, and what holds clocks down now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_sdk.device.files import number_in, number_or_why, text_in

__all__ = ["temperatures_c", "throttling"]

_ELSEWHERE = ("PMIC-Die", "nvme", "drivetemp", "iwlwifi", "spd5118", "jc42")
"""Sensors of what does not compute, each with limits of its own. Jetson's PMIC-Die always says 50 or 100."""
_PROCESSORS = ("coretemp", "k10temp", "zenpower", "amdgpu")
"""hwmon drivers that say more than the thermal zones do."""
_PLAUSIBLE = (-40_000, 150_000)

_ALERTS = ("-throttle-alert", "-surface-alert", "-balanced", "-heavy")
"""Jetson's cooling devices that lower clocks, by the end of their names: none of them is a fan."""
_CAPS = ("cpufreq-", "devfreq-", "thermal-cpufreq-", "thermal-devfreq-", "Processor")
"""The kernel's own, by the beginning."""
_PI_BITS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
_PI_FILES = (
    "sys/devices/platform/soc*/soc*firmware/get_throttled",
    "sys/devices/platform/*firmware*/get_throttled",
)


def temperatures_c(root: Path) -> tuple[dict[str, float], str]:
    """By sensor, and, where there is none, why. Sensors of what is switched off are left out."""
    found: dict[str, float] = {}
    whys = []
    for name, file in _sensors(root):
        value, why = number_or_why(file)
        if value is None:
            whys.append(f"{name}: {why}")
        elif value != 0 and _PLAUSIBLE[0] < value < _PLAUSIBLE[1]:
            unique = name if name not in found else f"{name} {sum(n.startswith(name) for n in found)}"
            found[unique] = value / 1000
    if found:
        return found, ""
    return found, f"no sensor can be read ({whys[0]})" if whys else "there is no sensor"


def _sensors(root: Path) -> Iterator[tuple[str, Path]]:
    zones = False
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name = text_in(zone / "type") or zone.name
        if not name.startswith(_ELSEWHERE):
            zones = True
            yield name, zone / "temp"
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        driver = text_in(chip / "name") or chip.name
        if driver.startswith(_ELSEWHERE) or (zones and driver not in _PROCESSORS):
            continue
        for file in sorted(chip.glob("temp*_input")):
            label = text_in(chip / file.name.replace("_input", "_label"))
            yield f"{driver} {label}".strip(), file


def throttling(root: Path) -> tuple[tuple[str, ...] | None, str]:
    """What lowers clocks now, in words; empty: nothing does. None: nothing here would tell, and why."""
    held: list[str] = []
    told = False
    for device in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        kind, state = text_in(device / "type"), number_in(device / "cur_state")
        if state is None or not (kind.endswith(_ALERTS) or kind.startswith(_CAPS)):
            continue
        told = True
        if state > 0:
            held.append(f"heat: {kind}")
    for holds, words in (_pi(root), _alarms(root)):
        told |= holds
        held += words
    if not told:
        return None, "neither cooling devices nor the firmware tell of it"
    return tuple(dict.fromkeys(held)), ""


def _pi(root: Path) -> tuple[bool, list[str]]:
    """The firmware's bits of now; those of the past (16 and above) are left alone."""
    for pattern in _PI_FILES:
        for file in sorted(root.glob(pattern)):
            try:
                bits = int(text_in(file).removeprefix("throttled="), 16)
            except ValueError:
                continue
            return True, [word for bit, word in enumerate(_PI_BITS) if bits >> bit & 1]
    return False, []


def _alarms(root: Path) -> tuple[bool, list[str]]:
    """Meters that raise an alarm: a Pi's supply, and the rails of a Jetson."""
    told, words = False, []
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        driver = text_in(chip / "name")
        if driver == "rpi_volt":
            files, word = [chip / "in0_lcrit_alarm"], "under-voltage"
        elif driver == "ina3221":
            files, word = sorted(chip.glob("curr*_crit_alarm")), "over-current"
        else:
            continue
        for file in files:
            state = number_in(file)
            told |= state is not None
            if state:
                words.append(word)
    return told, words
