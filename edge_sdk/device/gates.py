"""Gates: whether this machine may work now, judged from what was read of it. Nothing is read here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import time

from edge_sdk.config.agent import GatesSection
from edge_sdk.protocol.measure import Profile

__all__ = ["BATTERY_MARGIN", "Closed", "Gates"]

BATTERY_MARGIN = 2.0
"""Percent: a gauge that wavers must not start and stop the training."""


@dataclass(frozen=True)
class Closed:
    """A gate that does not pass, by its name, and why, with figures."""

    gate: str
    reason: str

    def __str__(self) -> str:
        return f"{self.gate}: {self.reason}"


class Gates:
    """The owner's gates. What closes at one figure opens at another, so they remember how they stood."""

    def __init__(self, config: GatesSection) -> None:
        self._config = config
        self._low = self._hot = False

    @property
    def any(self) -> bool:
        """Whether there is one that may close."""
        return self.reads_machine or bool(self._config.quiet_hours)

    @property
    def reads_machine(self) -> bool:
        """Whether one needs battery, supply or temperature."""
        return self._watches_power or self.reads_heat

    @property
    def reads_heat(self) -> bool:
        """Whether one needs the temperature, which a GPU tells through its driver alone."""
        return self._config.max_temperature_c is not None

    @property
    def _watches_power(self) -> bool:
        return self._config.min_battery_percent is not None or self._config.ac_only

    def closed(self, profile: Profile, local: time) -> tuple[Closed, ...]:
        """Those that do not pass at that local time."""
        power = (self._battery(profile), self._supply(profile))
        found = (*power, self._temperature(profile), self._quiet(local))
        return tuple(one for one in found if one is not None)

    def blind(self, profile: Profile) -> tuple[str, ...]:
        """What cannot be judged on this machine, and so passes: one line each."""
        config, reasons = self._config, profile.reasons
        told = []
        if config.max_temperature_c is not None and profile.temperature_c is None:
            told.append(f"gates.max_temperature_c has no effect: {reasons.get('temperature_c', 'not read')}")
        if self._watches_power and profile.on_ac is None and profile.battery_percent is None:
            why = reasons.get("battery_percent", "not read")
            told.append(f"the gates for battery and supply have no effect: {why}")
        return tuple(told)

    def _battery(self, profile: Profile) -> Closed | None:
        least, charge = self._config.min_battery_percent, profile.battery_percent
        if least is None or charge is None or profile.on_ac:
            self._low = False
            return None
        self._low = charge < (min(least + BATTERY_MARGIN, 100.0) if self._low else least)
        if not self._low:
            return None
        return Closed("battery", f"{charge:.0f} %, and {least:g} % are needed on battery")

    def _supply(self, profile: Profile) -> Closed | None:
        """A machine that reports neither supply nor battery hangs on the mains."""
        if not self._config.ac_only or profile.on_ac:
            return None
        if profile.on_ac is None and profile.battery_percent is None:
            return None
        return Closed("supply", "on battery" if profile.on_ac is False else "cannot be told from battery")

    def _temperature(self, profile: Profile) -> Closed | None:
        most, degrees = self._config.max_temperature_c, profile.temperature_c
        if most is None or degrees is None:
            self._hot = False
            return None
        cooled = most - self._config.temperature_margin_c
        self._hot = degrees >= cooled if self._hot else degrees > most
        if not self._hot:
            return None
        return Closed("temperature", f"{degrees:.0f} °C, closed above {most:g}, open again below {cooled:g}")

    def _quiet(self, local: time) -> Closed | None:
        now = f"{local:%H:%M}"
        for window in self._config.quiet_hours:
            begin, _, end = window.partition("-")
            within = begin <= now < end if begin < end else now >= begin or now < end
            if within:
                return Closed("quiet hours", f"{window}, and it is {now}")
        return None
