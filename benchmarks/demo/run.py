"""The demo as one command: does it learn because of the adapters, in time, and as the devices predicted?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.results import at_least, at_most, write_result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
OUT = Path("runs/bench-demo")


def off_by(device: dict[str, Any]) -> float:
    """How far the predicted peak is off, in units of what is allowed: 25 % of the measured one, or 8 MB."""
    measured = device["measured_peak_mb"]
    return abs(device["predicted_peak_mb"] - measured) / max(0.25 * measured, 8.0)


def main() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "examples.demo", "--json", "--out", str(OUT), *config["arguments"]]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    total_s = time.monotonic() - began
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    devices = summary.pop("devices")
    rows = [
        {"what": "run", "total_s": round(total_s, 1), **summary},
        *({"what": "device", **device} for device in devices),
    ]
    end, control = summary["accuracy_end"], summary["accuracy_head_only"]
    choices = {(d["depth"], d["quantized_layers"], d["binding_budget"]) for d in devices}
    write_result(
        FOLDER,
        config,
        rows,
        [
            at_least("accuracy", "held-out accuracy after the run", end, 0.62),
            at_least("adapters", "above the same run with the head alone", end - control, 0.05),
            at_most("time", "seconds of the whole command", total_s, 300.0),
            at_least("choices", "different choices, binding budget included", len(choices), 3),
            at_most("peak", "worst predicted peak, 1 = 25 % or 8 MB off", max(map(off_by, devices)), 1.0),
            at_most("resent", "bytes sent again without a fault", sum(d["bytes_resent"] for d in devices), 0),
        ],
    )


if __name__ == "__main__":
    main()
