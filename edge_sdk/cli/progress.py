"""The agent's events as lines for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from edge_sdk.console import counted
from edge_sdk.events import Event

__all__ = ["Progress"]

Fields = Mapping[str, Any]
_QUARTERS = 4


class Progress:
    """Gives ``write`` one line for each event worth reading; what repeats is said once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._last = ""
        self._quarter = (0, -1)

    def __call__(self, event: Event) -> None:
        line = self._training(event.fields) if event.name == "training.progress" else _line(event)
        if line and line != self._last:
            self._last = line
            self._write(line)

    def _training(self, fields: Fields) -> str:
        """At every quarter of a round's steps."""
        done, total = fields["done"], max(1, fields["total"])
        quarter = (fields["round"], _QUARTERS * done // total)
        if fields["stage"] != "training" or quarter == self._quarter:
            return ""
        self._quarter = quarter
        loss = "" if fields["loss"] is None else f", loss {fields['loss']:.3f}"
        return f"round {fields['round']}: step {done} of {total}{loss}"


_SURPRISE = 1.1
"""Of the memory predicted: more than that is told."""


def _line(event: Event) -> str:
    f = event.fields
    match event.name:
        case "agent.started":
            return f"device {f['device']}, broker {f['broker']}"
        case "connection.up":
            return f"connected to {f['broker']}"
        case "connection.down":
            why = f": {f['error']}" if f["error"] else ""
            return f"no connection to {f['broker']}{why}; trying again until it is back"
        case "run.joined":
            return f"run {f['run']}: base and task agree"
        case "trainer.described":
            short = f" ({f['dropped']} left out: nothing to learn within max_length)" if f["dropped"] else ""
            base = f", base in {f['base_held']}" if f["base_held"] else ""
            return (
                f"{counted(f['samples'], 'row')}{short}, trainer on {f['device']} under {f['allocator']} "
                f"holds {f['rest_mb']:.0f} MB at rest{base}"
            )
        case "trainer.probed":
            return (
                f"probed {f['probes']} settings: {f['layer_mb']:.1f} MB a layer, "
                f"{f['saved_mb']:.1f} MB less when quantized"
            )
        case "link.measured" if f["rtt_ms"] is not None:
            ways = (("up_bps", "up"), ("down_bps", "down"))
            rates = [f"{f[way] / 1e6:.3g} Mbit/s {word}" for way, word in ways if f[way] is not None]
            trip = f"{f['rtt_ms']:.3g} ms there and back"
            return f"link: {', '.join([*rates, trip])}"
        case "fit.corrected" if f["last_peak"] > _SURPRISE:
            return (
                f"took {f['last_peak']:.2f} times the memory that the probe predicts; "
                f"predictions are now {f['peak']:.2f} times that"
            )
        case "agent.permission":
            return f"now {f['permission']}{': ' + f['reason'] if f['reason'] else ''}"
        case "round.offer":
            return f"round {f['round']}: offered {f['candidates']} candidates, {f['deadline_s']:.0f} s"
        case "round.choice":
            again = "smaller: " if f["attempt"] else ""
            return (
                f"round {f['round']}: {again}depth {f['depth']}, {f['quantized_layers']} layers quantized "
                f"({f['peak_mb']:.0f} MB, {f['seconds']:.1f} s, {f['bytes_up'] / 1e3:.0f} kB); "
                f"bound by {f['binding']}" + (f": {f['reason']}" if f["reason"] else "")
            )
        case "round.decline":
            return f"round {f['round']}: declined, {f['message']}"
        case "training.done":
            return (
                f"round {f['round']}: trained in {f['train_s']:.1f} s, peak {f['peak_mb']:.0f} MB "
                f"above rest, loss {f['loss_last']:.3f}"
            )
        case "training.failed":
            what = "out of memory" if f["memory"] else "the trainer failed"
            return f"round {f['round']}: {what}: {f['message']}"
        case "update.queued":
            return f"round {f['round']}: update of {f['bytes'] / 1e3:.0f} kB on its way"
        case "update.receipt":
            return f"round {f['round']}: received"
        case "update.refused":
            return f"round {f['round']}: update refused ({f['reason']}): {f['message']}"
        case "traffic.spent":
            return (
                f"{f['bytes'] / 1e6:.1f} MB of today's {f['mb_per_day']:g} MB are used: what is large waits "
                f"until {datetime.fromtimestamp(f['until']):%Y-%m-%d %H:%M}"
            )
        case "join.postponed":
            return f"{f['message']} ({f['hint']}); tried again in {f['again_s'] / 60:.0f} min"
        case "run.finished":
            return f"run {f['run']} has finished"
        case "problem":
            return f"problem: {f['message']}{' (' + f['hint'] + ')' if f['hint'] else ''}"
    return ""
