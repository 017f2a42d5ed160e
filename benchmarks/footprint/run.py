"""What the resident agent costs: import time, memory before and after a round, size of messages."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import psutil

from aggregator.broker.embedded import start_embedded
from benchmarks.results import Claim, at_most, write_result
from edge_sdk.protocol.frames import HEADER_BYTES, MAX_CHUNK_BYTES
from examples.demo.children import AGENT, AGGREGATOR, Children, Said
from examples.demo.setting import Data, Device, Shape, base_model, write_agent_toml, write_run_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
DEVICE = Device("laptop-cpu")
LONGEST_S = 300.0


def import_seconds(statement: str) -> float:
    """Seconds that ``statement`` takes in a fresh process, without the interpreter's own start."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def foreign_libraries(pid: int) -> list[str]:
    """Of torch and numpy, whose compiled code is mapped into the process."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    return [name for name, mark in (("torch", "libtorch"), ("numpy", "_multiarray_umath")) if mark in maps]


class Sizes:
    """A subscriber that sees all messages of a broker, and keeps the size of the largest."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("mqtt://").partition(":")
        self.largest = self.count = 0
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "footprint")
        self._client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self._client.on_message = self._seen
        self._client.connect(host, int(port))
        self._client.loop_start()

    def _seen(self, _client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        self.largest, self.count = max(self.largest, len(message.payload)), self.count + 1

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Run:
    """An aggregator and one agent; says when things have happened."""

    def __init__(
        self, folder: Path, children: Children, config: dict[str, Any], url: str, min_devices: int
    ) -> None:
        self.children, self.config = children, config
        self.seen: list[Said] = []
        base, devices = base_model(), (DEVICE,)
        data = Data.write(folder / "data", devices, Path("runs/data"))
        shape = Shape(
            rounds=1, steps=config["steps"], batch=config["batch"], max_length=config["max_length"],
            chunk_kib=config["chunk_kib"],
        )  # fmt: skip
        run_toml = write_run_toml(folder / "run.toml", base=base, data=data, devices=min_devices, shape=shape)
        text = run_toml.read_text(encoding="utf-8")
        before, _, after = text.partition("[evaluation.data]")
        transfer = after[after.index("[transfer]") :]
        run_toml.write_text(f'{before}{transfer}\n[broker]\nurl = "{url}"\n', encoding="utf-8")
        children.start("server", [AGGREGATOR, "run", "--config", str(run_toml), "--json"])
        self.until("run.ready")
        agent_toml = write_agent_toml(
            folder / "agent.toml", DEVICE, base=base, data=data, broker=url, rest_mb=0.0
        )
        text = agent_toml.read_text(encoding="utf-8")
        idle = f"[agent]\nidle_unload_s = {config['idle_unload_s']}"
        agent_toml.write_text(text.replace("[agent]", idle, 1), encoding="utf-8")
        self.agent = children.start("agent", [AGENT, "run", "--config", str(agent_toml), "--json"])

    def until(self, event: str) -> Said:
        """The next event of that name."""
        ends = time.monotonic() + LONGEST_S
        while time.monotonic() < ends:
            said = self.children.inbox.get(timeout=LONGEST_S)
            self.seen.append(said)
            if said.event == event:
                return said
        raise TimeoutError(f"no event {event} within {LONGEST_S:g} s")

    def resident_mb(self) -> float:
        """Of the agent, once its trainer is gone."""
        process = psutil.Process(self.agent.process.pid)
        _wait(lambda: not process.children(recursive=True))
        readings = []
        for _ in range(self.config["samples"]):
            readings.append(process.memory_info().rss / 1e6)
            time.sleep(0.5)
        return max(readings)


def _wait(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + LONGEST_S
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError("the trainer did not unload")
        time.sleep(0.2)


def resident(config: dict[str, Any], min_devices: int) -> dict[str, Any]:
    """What an agent holds while it waits for a second device, or, with ``min_devices`` 1, after a round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = start_embedded(folder / "broker")
        sizes = Sizes(broker.url)
        try:
            with Children(folder / "logs") as children:
                run = Run(folder, children, config, broker.url, min_devices)
                run.until("agent.reported")
                if min_devices == 1:
                    run.until("run.finished")
                pid = run.agent.process.pid
                return {
                    "what": "resident", "mb": run.resident_mb(), "foreign": foreign_libraries(pid),
                    "broker": broker.kind, "messages": sizes.count, "largest_message": sizes.largest,
                }  # fmt: skip
        finally:
            sizes.close()
            broker.stop()


def main() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = [
        {"what": "import", "statement": statement, "seconds": import_seconds(statement)}
        for statement in ("import edge_sdk", "from edge_sdk import Agent")
        for _ in range(config["imports"])
    ]
    print("imports measured; now an agent that waits for its first round, and one after it")
    for when, min_devices in (("before its first round", 2), ("after a round", 1)):
        rows.append({"when": when, **resident(config, min_devices)})
        print(json.dumps(rows[-1]))
    imports = [r["seconds"] for r in rows if r.get("statement") == "import edge_sdk"]
    agents = [r for r in rows if r["what"] == "resident"]
    foreign = sorted({name for r in agents for name in r["foreign"]})
    largest = max(r["largest_message"] for r in agents)
    claims = [
        at_most("import", "seconds of `import edge_sdk`, the least of fresh processes", min(imports), 0.3),
        *(
            at_most(f"resident-{i}", f"MB of a connected idle agent {r['when']}", r["mb"], 45.0)
            for i, r in enumerate(agents)
        ),
        Claim(
            "torch-free", "compiled code of torch or numpy in the agent", len(foreign), "== 0", not foreign
        ),
        at_most(
            "message", "bytes of the largest message on the broker", largest, MAX_CHUNK_BYTES + HEADER_BYTES
        ),
    ]
    write_result(FOLDER, config, rows, claims)


if __name__ == "__main__":
    main()
