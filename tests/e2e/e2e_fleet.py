"""A small run of real processes: a random BERT, config files, commands, a look at what passes the broker."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho

from edge_sdk.config.broker import BrokerConfig
from examples.demo.children import AGENT, AGGREGATOR, Child, Children, Said

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog")
LABELS = ("colour", "number", "animal")
CHUNK_KIB, WINDOW = 32, 2
METHOD = '''"""A method of the test's own: full depth, as small updates."""
from aggregator.merging.layer_mean import LayerMean
from aggregator.methods.base import Method
from aggregator.planner.allocation import FullDepth

METHOD = Method(
    name="full-int8", allocation=FullDepth(), merge=LayerMean(), codec="int8", error_feedback=True
)
'''


def chain_of(versions: Sequence[Mapping[str, Any]], number: int, folder: Path) -> list[Path]:
    """The files below a server's folder that lead to a version, as ``versions --json`` tells of them."""
    at: int | None = number
    chain: list[Path] = []
    by_number = {version["number"]: version for version in versions}
    while at is not None:
        (path,) = [one for one in folder.rglob(f"*{by_number[at]['object']}*") if one.is_file()]
        chain.insert(0, path)
        at = by_number[at]["parent"]
    return chain


def make_base(folder: Path) -> Path:
    """A random BERT with a real tokenizer; an int8 update of its four layers takes five chunks."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: int = 64) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            label = i % len(LABELS)
            words = [WORDS[(3 * label + (i + j) % 3) % len(WORDS)] for j in range(1 + i % 4)]
            file.write(json.dumps({"text": " ".join(words), "label": LABELS[label]}) + "\n")
    return path


@dataclass
class Fleet:
    """One run in one folder. ``said``: every event so far, by who said it."""

    folder: Path
    base: Path
    children: Children
    said: dict[str, list[Said]] = field(default_factory=dict)

    # -- files ----------------------------------------------------------------------------------------

    @property
    def run_toml(self) -> Path:
        return self.folder / "run.toml"

    def write_run(
        self,
        *,
        method: str = "fedquad",
        rounds: int = 1,
        steps: int = 3,
        devices: int = 1,
        evaluate: bool = True,
        broker: str = "",
        linger_s: float = 30,
    ) -> None:
        write_rows(self.folder / "held-out.jsonl", 24)
        evaluation = '[evaluation.data]\npath = "held-out.jsonl"\n' if evaluate else ""
        self.run_toml.write_text(
            f'[run]\nname = "small"\nmethod = "{method}"\nlabels = {json.dumps(LABELS)}\n'
            f'state_dir = "server"\n[base]\npath = {json.dumps(str(self.base))}\n'
            f"[training]\nsteps = {steps}\nbatch = 4\nmax_length = 16\n"
            f"[rounds]\ntotal = {rounds}\nmin_devices = {devices}\nlinger_s = {linger_s}\n{evaluation}"
            f"[transfer]\nchunk_kib = {CHUNK_KIB}\nwindow = {WINDOW}\n{broker}"
            f"[trainer]\ndevice = 'cpu'\nthreads = 1\n",
            encoding="utf-8",
        )

    def agent_toml(self, device: str) -> Path:
        return self.folder / f"{device}.toml"

    def write_agent(self, device: str, broker: str, *, extra: str = "", **keys: Any) -> None:
        rows = write_rows(self.folder / f"{device}.jsonl")
        limits = "".join(f"{key} = {value}\n" for key, value in keys.items())
        self.agent_toml(device).write_text(
            f'[agent]\nid = "{device}"\nstate_dir = "state-{device}"\n'
            f"[base]\npath = {json.dumps(str(self.base))}\n[data]\npath = {json.dumps(str(rows))}\n"
            f"[trainer]\ndevice = 'cpu'\nthreads = 1\n[limits]\n{limits}{broker}{extra}",
            encoding="utf-8",
        )

    # -- processes ------------------------------------------------------------------------------------

    def start_server(self) -> Child:
        command = [AGGREGATOR, "run", "--config", str(self.run_toml), "--json"]
        return self.children.start("server", command, self.folder)

    def start_agent(self, device: str) -> Child:
        command = [AGENT, "run", "--config", str(self.agent_toml(device)), "--once", "--json"]
        return self.children.start(device, command, self.folder)

    def broker_url(self) -> str:
        """Of the embedded broker, once it is there."""
        return str(self.wait_for("server", "broker.started").fields["url"])

    # -- what happens ---------------------------------------------------------------------------------

    def wait_for(
        self,
        who: str,
        event: str,
        where: Callable[[Mapping[str, Any]], bool] = lambda fields: True,
        timeout_s: float = 120.0,
    ) -> Said:
        """The first such event, which may have been before. Fails when a child ends with an error."""

        def found() -> Said | None:
            return next((s for s in self.said.get(who, []) if s.event == event and where(s.fields)), None)

        if (said := found()) is not None:
            return said
        for said in self.children.events(timeout_s=timeout_s):
            self._keep(said)
            if said.who == who and said.event == event and where(said.fields):
                return said
        raise AssertionError(f"{who} ended without saying {event}: {self.children[who].last_words()}")

    def run_out(self, timeout_s: float = 180.0) -> None:
        """Until every child has ended, well."""
        for said in self.children.events(timeout_s=timeout_s):
            self._keep(said)

    def events(self, who: str, event: str) -> list[Mapping[str, Any]]:
        return [said.fields for said in self.said.get(who, []) if said.event == event]

    def _keep(self, said: Said) -> None:
        self.said.setdefault(said.who, []).append(said)

    # -- afterwards -----------------------------------------------------------------------------------

    def ask_server(self, *words: str) -> Any:
        return json.loads(command(AGGREGATOR, *words, "--config", str(self.run_toml), "--json"))

    def agent_status(self, device: str) -> Any:
        return json.loads(command(AGENT, "status", "--config", str(self.agent_toml(device)), "--json"))


def command(*words: str, code: int = 0) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout


def mqtt_section(url: str) -> str:
    return f'[broker]\nurl = "{url}"\n'


def broker_section(config: BrokerConfig) -> str:
    """The section of either config file for ``config``."""
    lines = [f'url = "{config.url}"', f'namespace = "{config.namespace}"']
    lines += [f'{k} = "{getattr(config, k)}"' for k in ("username", "password_file") if getattr(config, k)]
    tls = [f'{k} = "{getattr(config.tls, k)}"' for k in ("ca", "cert", "key") if getattr(config.tls, k)]
    return "\n".join(["[broker]", *lines, "[broker.tls]", *tls]) + "\n"


class Spy:
    """A client of its own at the broker: counts the chunks of every device, and the largest message."""

    def __init__(self, url: str) -> None:
        self.chunks: dict[str, int] = {}
        self.largest = 0
        self.not_binary: set[str] = set()
        self._news = threading.Condition()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_message = self._on_message
        self._client.on_connect = lambda *_: self._client.subscribe("fl1/#", qos=0)
        host, port = url.removeprefix("mqtt://").rsplit(":", 1)
        self._client.connect(host, int(port))
        self._client.loop_start()

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        with self._news:
            self.largest = max(self.largest, len(message.payload))
            match = re.fullmatch(r"fl1/[^/]+/s/[^/]+/d/([^/]+)/b", message.topic)
            if match:
                self.chunks[match[1]] = self.chunks.get(match[1], 0) + 1
            self._news.notify_all()

    def wait_for_chunks(self, device: str, count: int, timeout_s: float = 120.0) -> None:
        """Until ``device`` has sent that many since the spy came."""
        with self._news:
            ends = time.monotonic() + timeout_s
            while self.chunks.get(device, 0) < count:
                assert self._news.wait(ends - time.monotonic()), f"{device} sent {self.chunks}"

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
