"""The run as its events tell it: lines for the screen, and what the summary is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from examples.demo.children import Said
from examples.demo.setting import Device

__all__ = ["DeviceStory", "Story"]


@dataclass
class DeviceStory:
    """What one device said. ``rounds``: by number, the fields of its choice, training and receipt."""

    device: Device
    probing: bool = False
    probe: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)

    def round(self, number: int) -> dict[str, Any]:
        return self.rounds.setdefault(number, {"round": number})

    @property
    def trained(self) -> list[dict[str, Any]]:
        """Rounds that it took part in to the end, in order."""
        return [told for _, told in sorted(self.rounds.items()) if "measured_peak_mb" in told]


class Story:
    """Takes events as they come; ``feed`` gives the line that is worth showing, if any."""

    def __init__(self, devices: Iterable[Device], began: float) -> None:
        self.devices = {device.id: DeviceStory(device) for device in devices}
        self.began = began
        self.broker = ""
        self.broker_url = ""
        self.accuracy: list[dict[str, Any]] = []
        self.rounds: dict[int, dict[str, Any]] = {}
        self.problems: list[str] = []

    def feed(self, said: Said) -> str | None:
        f = said.fields
        device = self.devices.get(said.who)
        line = self._server(said, f) if device is None else self._device(device, said.event, f)
        if line is None:
            return None
        who = "server" if device is None else f"{said.who} (emulated)"
        return f"{said.at - self.began:6.1f} s  {who}: {line}"

    def _server(self, said: Said, f: Mapping[str, Any]) -> str | None:
        match said.event:
            case "broker.started":
                self.broker, self.broker_url = f["kind"], f["url"]
                return f"embedded broker {f['kind']} at {f['url']}"
            case "round.opened":
                return f"round {f['round']} of {f['rounds']} with {len(f['devices'])} devices"
            case "version.evaluated":
                self.accuracy.append(
                    {
                        "round": f["round"],
                        "wall_s": round(said.at - self.began, 1),
                        "accuracy": f["accuracy"],
                        "loss": f["loss"],
                    }
                )
                return f"version {f['version']}: held-out accuracy {f['accuracy']:.3f}"
            case "round.done":
                self.rounds[f["round"]] = dict(f)
                return None
            case "round.decline" | "version.not_evaluated" | "offer.none" | "run.failed" | "device.refused":
                told = f"{said.event}: {f.get('device', '')} {f.get('message', f.get('reason', ''))}"
                self.problems.append(told)
                return told
            case "run.finished":
                return "all rounds done"
        return None

    def _device(self, device: DeviceStory, event: str, f: Mapping[str, Any]) -> str | None:
        match event:
            case "trainer.progress":
                device.probing = device.probing or f["stage"] == "probing"
                return None
            case "trainer.probed":
                device.probe = dict(f)
                return (
                    f"{f['rest_mb']:.0f} MB at rest; a tuned layer takes {f['layer_mb']:.1f} MB, "
                    f"{f['saved_mb']:.1f} less when quantized (measured)"
                )
            case "round.choice":
                device.round(f["round"]).update(
                    depth=f["depth"],
                    quantized_layers=f["quantized_layers"],
                    binding_budget=f["binding"],
                    attempt=f["attempt"],
                    predicted_peak_mb=f["peak_mb"],
                    predicted_s=f["seconds"],
                    reason=f["reason"],
                )
                return f"depth {f['depth']}, {f['quantized_layers']} quantized; bound by {f['binding']}"
            case "training.done":
                told = device.round(f["round"])
                told.update(
                    rest_mb=f["rest_mb"],
                    measured_peak_mb=f["peak_mb"],
                    train_s=f["train_s"],
                    loss=f["loss_last"],
                )
                return (
                    f"trained in {f['train_s']:.1f} s, peak {f['peak_mb']:.0f} MB above rest "
                    f"({told.get('predicted_peak_mb', 0):.0f} predicted)"
                )
            case "update.receipt":
                device.round(f["round"]).update(update_bytes=f["bytes"], bytes_resent=f["bytes_resent"])
                again = f", {f['bytes_resent']} bytes of it twice" if f["bytes_resent"] else ""
                return f"update of {f['bytes'] / 1e3:.0f} kB received by the server{again}"
            case "training.failed" if f["memory"]:
                # no problem yet: what comes next is a smaller choice, or a decline
                return f"ran out of memory: {f['message']}"
            case "training.failed" | "trainer.died" | "round.decline" | "problem" | "agent.failed":
                self.problems.append(f"{device.device.id}: {f['message']}")
                return f"{event}: {f['message']}"
            case "connection.down":
                return "no connection to the broker"
        return None
