"""Power: what is drawn, rail by rail where there are meters; the battery, the supply, the mode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_sdk.device.files import number_in, number_or_why, text_in, text_or_why
from edge_sdk.device.tegra import power_mode as tegra_power_mode
from edge_sdk.device.tegra import tegra_chip

__all__ = ["Draw", "battery", "draw", "power_mode"]

_INPUTS = ("VDD_IN", "POM_5V_IN", "5V_IN")
"""Rails of a Jetson through which all others are fed, where the board has one."""
_FED = ("VDDQ_VDD2_1V8AO",)
"""Fed from another metered rail: not counted a second time."""
_PLAUSIBLE_W = 10_000.0


class Draw(NamedTuple):
    """``watts``: of the whole, or of as much as is metered; None: ``why``."""

    watts: float | None
    rails: dict[str, float]
    why: str = ""


def draw(root: Path, interval_s: float = 0.0) -> Draw:
    """What is drawn now: by a Jetson's rails, a discharging battery, a server's meter, or RAPL.

    Args:
        interval_s: RAPL counts energy: seconds to wait between two readings; 0: it is left out.
    """
    rails = dict(_rails(root))
    if rails:
        entry = next((rails[name] for name in _INPUTS if name in rails), None)
        whole = sum(watts for name, watts in rails.items() if name not in _FED)
        return Draw(entry if entry is not None else whole, rails)
    discharged = _discharge(root)
    if discharged is not None:
        return Draw(discharged, {"battery": discharged})
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if text_in(chip / "name") == "power_meter":
            watts = _watts(number_in(chip / "power1_average"))
            if watts is not None:
                return Draw(watts, {"power_meter": watts})
    return _rapl(root, interval_s)


def _rails(root: Path) -> Iterator[tuple[str, float]]:
    """Rails of INA3221 meters: hwmon since JetPack 5, iio devices before."""
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if text_in(chip / "name") != "ina3221":
            continue
        for file in sorted(chip.glob("in*_label")):
            name, number = text_in(file), file.name[2:].removesuffix("_label")
            volts, amperes = number_in(chip / f"in{number}_input"), number_in(chip / f"curr{number}_input")
            if name and name != "NC" and volts is not None and amperes is not None:
                watts = _watts(volts * amperes)  # mV times mA
                if watts is not None:
                    yield name, watts
    for meter in sorted((root / "sys/bus/i2c/devices").glob("*/iio:device*")):
        for file in sorted(meter.glob("rail_name_*")):
            name, milliwatts = (
                text_in(file),
                number_in(meter / f"in_power{file.name.removeprefix('rail_name_')}_input"),
            )
            if name and milliwatts is not None:
                watts = _watts(milliwatts * 1000)
                if watts is not None:
                    yield name, watts


def _discharge(root: Path) -> float | None:
    """What the machine's own batteries give, all of them; None: none gives anything, or does not say."""
    given = []
    for supply in _batteries(root):
        if text_in(supply / "status") != "Discharging":
            continue
        microwatts = number_in(supply / "power_now")
        if microwatts is None:
            volts, amperes = number_in(supply / "voltage_now"), number_in(supply / "current_now")
            microwatts = None if volts is None or amperes is None else volts * amperes / 1e6
        watts = None if microwatts is None else _watts(abs(microwatts))  # some drivers give it a sign
        if watts:
            given.append(watts)
    return sum(given) if given else None


def _rapl(root: Path, interval_s: float) -> Draw:
    """Packages, and the whole platform (``psys``) where there is a counter for it."""
    zones = [
        zone
        for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
        if zone.name.count(":") == 1
    ]
    if not zones:
        return Draw(None, {}, "there is no power meter")
    before = [number_or_why(zone / "energy_uj") for zone in zones]
    whys = [why for value, why in before if value is None]
    if len(whys) == len(zones):
        return Draw(None, {}, f"RAPL: {whys[0]} (root may)" if "denied" in whys[0] else f"RAPL: {whys[0]}")
    if interval_s <= 0:
        return Draw(
            None, {}, "RAPL counts energy: a draw takes an interval, which edge-agent profile waits for"
        )
    began = time.monotonic()
    time.sleep(interval_s)
    after = [number_in(zone / "energy_uj") for zone in zones]
    lasted = time.monotonic() - began
    rails = {}
    for zone, (first, _), second in zip(zones, before, after, strict=True):
        if first is None or second is None:
            continue
        if second < first:  # the counter went round
            second += number_in(zone / "max_energy_range_uj") or 0.0
        watts = _watts((second - first) / lasted)
        if watts is not None:
            rails[text_in(zone / "name") or zone.name] = watts
    if not rails:
        return Draw(None, {}, "RAPL: its counters cannot be read twice")
    whole = sum(watts for name, watts in rails.items() if name != "psys")
    return Draw(rails.get("psys", whole), rails)


def _watts(microwatts: float | None) -> float | None:
    watts = None if microwatts is None else microwatts / 1e6
    return watts if watts is not None and 0 <= watts < _PLAUSIBLE_W else None


def battery(root: Path) -> tuple[float | None, str, bool | None, str]:
    """Charge of the machine's own battery, or why none; whether it is on a supply, or why nobody knows.

    A machine without a battery is on a supply, or on a power bank that does not tell: only a supply that says
    that it is online is believed.
    """
    charges, discharging, why = [], [], "there is no battery"
    for supply in _batteries(root):
        charge, why = _charge(supply)
        if charge is not None:
            charges.append(charge)
        state = text_in(supply / "status")
        if state in ("Discharging", "Charging", "Full", "Not charging"):
            discharging.append(state == "Discharging")
    online = [
        value > 0
        for supply in _supplies(root)
        if text_in(supply / "type") not in ("", "Battery")
        and (value := number_in(supply / "online")) is not None
    ]
    on_ac: bool | None = None
    if any(online):
        on_ac = True
    elif discharging or charges:
        on_ac = not any(discharging) if discharging else False if online else None
    return (
        min(charges, default=None),
        "" if charges else why,
        on_ac,
        "" if on_ac is not None else "no supply says that it is online, and no battery whether it is charged",
    )


def _charge(supply: Path) -> tuple[float | None, str]:
    percent, why = number_or_why(supply / "capacity")
    if percent is None:
        for now, full in (("energy_now", "energy_full"), ("charge_now", "charge_full")):
            held, most = number_in(supply / now), number_in(supply / full)
            if held is not None and most:
                percent = 100 * held / most
                break
    if percent is None:
        return None, f"its charge cannot be read: {why}"
    # A worn battery may say a little more than full.
    return (
        (min(100.0, percent), "")
        if 0 <= percent <= 120
        else (None, f"its charge is said to be {percent:g} %")
    )


def _supplies(root: Path) -> Iterator[Path]:
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if text_in(supply / "scope") != "Device":  # a mouse's battery, say
            yield supply


def _batteries(root: Path) -> Iterator[Path]:
    return (supply for supply in _supplies(root) if text_in(supply / "type") == "Battery")


def power_mode(root: Path) -> tuple[str | None, str]:
    """nvpmodel's on a Jetson, the firmware's profile on a laptop, else the kernel's governor; or why none."""
    if tegra_chip(root):
        return tegra_power_mode(root)
    profile = text_in(root / "sys/firmware/acpi/platform_profile")
    if profile:
        return profile, ""
    governor, why = text_or_why(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return (f"governor {governor}", "") if governor else (None, f"there is no power mode, and {why}")
