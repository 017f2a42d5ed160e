"""The server's events as lines for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_sdk.console import counted
from edge_sdk.events import Event

__all__ = ["Progress", "device_label", "line_of"]

Fields = Mapping[str, Any]


class Progress:
    """Gives ``write`` one line for each event worth reading; what repeats is said once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._last = ""

    def __call__(self, event: Event) -> None:
        line = line_of(event)
        if line and line != self._last:
            self._last = line
            self._write(line)


def line_of(event: Event) -> str:
    """An event in words; empty for those that are not worth a line."""
    return _line(event.name, event.fields)


def device_label(device: str, device_class: str | None, emulated: bool) -> str:
    """``kitchen (jetson-nano, emulated)``: a machine that only plays a class says so wherever it shows."""
    facts = [fact for fact in (device_class, "emulated" if emulated else None) if fact]
    return f"{device} ({', '.join(facts)})" if facts else device


def _score(f: Fields) -> str:
    if f["perplexity"] is None:
        return f"accuracy {f['accuracy']:.4f}"
    return f"perplexity {f['perplexity']:.4f}, {f['accuracy']:.4f} of {f['tokens']} tokens right"


def _line(name: str, f: Fields) -> str:
    match name:
        case "broker.started":
            return f"broker: {f['kind']} on {f['url']}"
        case "broker.external":
            return f"broker: {f['url']}" + (
                ", insecure: everything travels readable" if f["insecure"] else ""
            )
        case "broker.down":
            return f"broker: no connection to {f['broker']}, trying on ({f['error']})"
        case "run.preparing":
            return f"run {f['run']}: reading the base model {f['base']}"
        case "run.ready":
            own = f" ({f['method_name']})" if f["method_name"] != f["method"] else ""
            return f"run {f['run']}: method {f['method']}{own}, round {f['round']} of {f['rounds']}"
        case "run.finished":
            return f"run finished after {counted(f['rounds'], 'round')} with version {f['version']}"
        case "run.over":
            lacking = ", ".join(f["lacking"])
            return f"the final version was not fetched by {lacking}" if lacking else ""
        case "storage.paused":
            return f"PAUSED: {f['reason']}; goes on by itself when there is room, nothing is lost"
        case "storage.resumed":
            return f"there is room again ({f['free_mb']:.0f} MB): the run goes on"
        case "metrics.served":
            return f"metrics: {f['url']}"
        case "run.stopped":
            return "stopped; the same command goes on from here"
    if name.startswith(("device.", "message.")):
        return _device_line(name, f)
    if name.startswith(("round.", "offer.")):
        return _round_line(name, f)
    return _update_line(name, f)


def _device_line(name: str, f: Fields) -> str:
    match name:
        case "device.joined":
            label = device_label(f["device"], f["device_class"], f["emulated"])
            return f"{label} joined with {counted(f['samples'], 'sample')}" + (
                ", insecure link" if f["insecure"] else ""
            )
        case "device.offline":
            return f"{f['device']} is offline"
        case "device.refused":
            return f"{f['device']} refused ({f['reason']}): {f['message']}"
        case "message.foreign":
            return f"{counted(f['count'], 'message')} of no use from {f['device']}: {f['message']}"
    return ""


def _round_line(name: str, f: Fields) -> str:
    head = f"round {f['round']}"
    match name:
        case "round.waiting":
            return f"{head}: waiting for devices, {f['ready']} of {f['needed']} ready"
        case "round.opened":
            count = len(f["devices"])
            return (
                f"{head} of {f['rounds']}: {counted(count, 'device')} build{'s' if count == 1 else ''} on "
                f"version {f['version']}, within {f['deadline_s']:.0f} s"
            )
        case "offer.none":
            return f"{head}: nothing to offer to {f['device']}: {f['reason']}"
        case "round.uncovered":
            return f"{head}: {f['message']}"
        case "round.choice":
            label = device_label(f["device"], f["device_class"], f["emulated"])
            quantized = counted(f["quantized_layers"], "quantized layer")
            return (
                f"{head}: {label} takes depth {f['depth']} with {quantized} "
                f"({f['peak_mb']:.0f} MB, {f['seconds']:.1f} s, {f['bytes_up'] / 1e3:.0f} kB); "
                f"bound by {f['binding']}" + (f": {f['reason']}" if f["reason"] else "")
            )
        case "round.decline":
            return f"{head}: {f['device']} declined ({f['reason']}): {f['message']}"
        case "round.closed" if f["missed"] or f["awaited"]:
            gone = f"{head}: closed" + (f" without {', '.join(f['missed'])}" if f["missed"] else "")
            return gone + (f"; still awaited: {', '.join(f['awaited'])}" if f["awaited"] else "")
        case "round.held":
            return (
                f"{head}: HELD, {counted(f['updates'], 'update')} kept: {f['message']}; "
                "it is tried again until that is cured"
            )
        case "round.empty":
            return f"{head}: nobody delivered, version {f['version']} stays"
        case "round.done" if f["overhead_s"] is not None:
            return (
                f"{head}: done in {f['open_s'] + f['merge_s']:.1f} s, {f['overhead_s']:.1f} s of it overhead"
            )
    return ""


def _update_line(name: str, f: Fields) -> str:
    match name:
        case "upload.started":
            return f"round {f['round']}: {f['device']} sends {f['bytes'] / 1e3:.0f} kB"
        case "update.received":
            again = f", {f['duplicate_bytes'] / 1e3:.0f} kB of it twice" if f["duplicate_bytes"] else ""
            return (
                f"round {f['round']}: received {f['bytes'] / 1e3:.0f} kB from {f['device']}{again}; "
                f"trained in {f['train_s']:.1f} s, peak {f['measured_peak_mb']:.0f} MB, "
                f"loss {f['loss_last']:.3f}"
            )
        case "update.refused":
            return f"round {f['round']}: update of {f['device']} refused ({f['reason']}): {f['message']}"
        case "update.set_aside":
            return (
                f"round {f['round']}: set aside what {f['device']} sent: it cannot be merged ({f['message']})"
            )
        case "version.made" if f["round"]:
            return f"round {f['round']}: merged {counted(f['updates'], 'update')} into version {f['version']}"
        case "version.evaluated":
            return (
                f"version {f['version']}: {_score(f)}, loss {f['loss']:.4f} "
                f"({counted(f['examples'], 'example')}, {f['seconds']:.1f} s)"
            )
        case "version.not_evaluated":
            return f"version {f['version']} was not evaluated: {f['message']}"
    return ""
