"""Every wrong input is one line, a hint and an exit code; never a traceback."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_fleet import LABELS, Fleet, make_base, mqtt_section

from examples.demo.children import AGENT, AGGREGATOR

pytestmark = [pytest.mark.e2e, pytest.mark.train]


@dataclass(frozen=True)
class Case:
    """``change``: text of the config to replace; what standard error must say, in any order."""

    who: str
    code: int
    says: tuple[str, ...]
    change: tuple[str, str] = ("", "")
    add: str = ""
    rows: str = ""


CASES = {
    "unknown key, nearest suggested": Case(
        "agent", 64, ("memory_mbs", "memory_mb"), add="[limits]\nmemory_mbs = 3\n"
    ),
    "all errors of the file at once": Case(
        "agent", 64, ("uplink_kpbs", "threads"), add="[limits]\nuplink_kpbs = 3\n[trainer]\nthreads = -1\n"
    ),
    "a key of run.toml": Case("agent", 64, ("run.toml",), add="[training]\nsteps = 3\n"),
    "a key of agent.toml": Case("server", 64, ("agent.toml",), add="[limits]\nmemory_mb = 3\n"),
    "no such device class": Case(
        "agent",
        64,
        ("jetson-orin-mini", "jetson-orin-nano-8gb", "raspberry-pi-5"),
        change=('id = "dev"', 'id = "dev"\ndevice_class = "jetson-orin-mini"'),
    ),
    "not TOML": Case("agent", 64, ("agent.toml",), add="[limits\n"),
    "no data file": Case("agent", 64, ("nowhere.jsonl",), change=("dev.jsonl", "nowhere.jsonl")),
    "a row that cannot be read": Case("agent", 65, ("3",), rows='{"text": "one", "label":\n'),
    "a row without a label": Case("agent", 65, ("3", "label"), rows='{"text": "one"}\n'),
    "no base at the path": Case("agent", 66, ("no-such-base",), change=("BASE", "./no-such-base")),
    "a base without weights": Case("agent", 66, ("config.json",), change=("BASE", "/tmp")),
    "no base for the server": Case("server", 66, ("no-such-base",), change=("BASE", "no-such-base")),
    "a hub id that is not here": Case(
        "server", 66, ("somebody/no-such-model",), change=("BASE", "somebody/no-such-model")
    ),
    "a held-out label outside the set": Case(
        "server", 65, ("3", "vegetable"), rows='{"text": "one", "label": "vegetable"}\n'
    ),
    "an unknown method": Case(
        "server", 64, ("fedmagic", "fedquad"), change=('name = "run"', 'name = "run"\nmethod = "fedmagic"')
    ),
    "an unreachable broker (agent)": Case("agent", 69, ("127.0.0.1",)),
    "an unreachable broker (server)": Case(
        "server", 69, ("127.0.0.1",), add='[broker]\nurl = "mqtt://127.0.0.1:PORT"\n'
    ),
    "no TLS off loopback": Case(
        "agent", 64, ("insecure", "mqtts"), change=("mqtt://127.0.0.1:PORT", "mqtt://broker.example:1883")
    ),
}


def _closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _run(folder: Path, base: Path, case: Case) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    good = "".join(json.dumps({"text": "one", "label": LABELS[i]}) + "\n" for i in range(2))
    (folder / "dev.jsonl").write_text(good + case.rows)
    if case.who == "agent":
        text = (
            '[agent]\nid = "dev"\nstate_dir = "state"\n[broker]\nurl = "mqtt://127.0.0.1:PORT"\n'
            '[base]\npath = "BASE"\n[data]\npath = "dev.jsonl"\n'
        )
        config, command = folder / "agent.toml", [AGENT, "run", "--once"]
    else:
        text = (
            f'[run]\nname = "run"\nlabels = {json.dumps(LABELS)}\nstate_dir = "state"\n'
            '[base]\npath = "BASE"\n[training]\nmax_length = 16\n[evaluation.data]\npath = "dev.jsonl"\n'
        )
        config, command = folder / "run.toml", [AGGREGATOR, "run"]
    old, new = case.change
    assert old in text
    text = text.replace(old, new, 1) if old else text
    text = (text + case.add).replace("PORT", str(_closed_port())).replace("BASE", str(base))
    config.write_text(text)
    return subprocess.run(
        [*command, "--config", str(config)], capture_output=True, text=True, timeout=150, cwd=folder
    )


@pytest.fixture(scope="module")
def ended(
    small_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """All cases side by side, first those that wait for a broker for half a minute."""
    folder = tmp_path_factory.mktemp("errors")
    ordered = sorted(CASES.items(), key=lambda item: "unreachable" not in item[0])
    with ThreadPoolExecutor(6) as pool:
        futures = {
            name: pool.submit(_run, folder / str(i), small_base, case)
            for i, (name, case) in enumerate(ordered)
        }
        return {name: future.result() for name, future in futures.items()}


def check_error(done: subprocess.CompletedProcess[str], code: int, says: tuple[str, ...]) -> None:
    told = done.stderr
    assert done.returncode == code, told
    assert "Traceback" not in told + done.stdout
    lines = told.strip().splitlines()
    assert len(lines) <= 2 and lines[0].startswith("error: "), told
    assert lines[-1].startswith("hint: "), told
    assert all(word in told for word in says), told


@pytest.mark.parametrize("name", CASES)
def test_one_line_a_hint_and_a_code(name: str, ended: dict[str, subprocess.CompletedProcess[str]]) -> None:
    check_error(ended[name], CASES[name].code, CASES[name].says)


@pytest.mark.parametrize("command", [(AGENT, "run"), (AGGREGATOR, "run")])
def test_no_config_file(command: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run([*command], capture_output=True, text=True, cwd=tmp_path)
    check_error(done, 64, (".toml", "init"))


# -- what only a run can tell ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def waiting(fleets: Callable[[str], Fleet]) -> Fleet:
    """A run that waits for more devices than will ever come."""
    fleet = fleets("waiting")
    fleet.write_run(devices=9, evaluate=False)
    fleet.start_server()
    fleet.wait_for("server", "run.ready")
    return fleet


def _agent(fleet: Fleet, device: str) -> subprocess.CompletedProcess[str]:
    command = [AGENT, "run", "--config", str(fleet.agent_toml(device)), "--once"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_label_outside_the_runs_set(waiting: Fleet) -> None:
    waiting.write_agent("wrong-label", mqtt_section(waiting.broker_url()))
    with (waiting.folder / "wrong-label.jsonl").open("a") as file:
        file.write('{"text": "one", "label": "vegetable"}\n')
    check_error(_agent(waiting, "wrong-label"), 65, ("vegetable", "65"))


def test_another_fingerprint_names_what_differs(
    waiting: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = make_base(tmp_path_factory.mktemp("other-base"))
    weights = load_file(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] += torch.ones(1)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    fleet = Fleet(waiting.folder, other, waiting.children, waiting.said)
    fleet.write_agent("other-base", mqtt_section(waiting.broker_url()))
    done = _agent(fleet, "other-base")
    check_error(done, 67, ("base", str(other)))
    assert "tokenizer" not in done.stderr
