"""A version of a run as a PEFT folder, told by its card."""

from __future__ import annotations

import queue
import threading

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file
from updates_fakes import FINGERPRINT, LORA, SHAPE, moved

from aggregator import export
from aggregator.export import Origin, export_merged, export_peft
from edge_sdk.config.run import RunBaseSection, RunConfig, RunSection
from edge_sdk.errors import ContainerError
from edge_sdk.protocol.model import Fingerprint
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import Failed, Progress
from edge_sdk.protocol.wire import Run
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import all_keys
from edge_sdk.updates.versions import write_version

RUN = Run(
    run="paint", nonce="n1", base="some/base", labels=("red", "green", "blue"), max_length=64, micro_batch=8,
    lora=LORA, spec=TrainSpec(), shape=SHAPE,
    fingerprint=Fingerprint(
        base=FINGERPRINT, tokenizer=FINGERPRINT, labels=FINGERPRINT, head="classification", max_length=64,
        template=FINGERPRINT, targets=("all-linear",), rank=LORA.rank, alpha=LORA.alpha,
    ),
)  # fmt: skip
ORIGIN = Origin(number=1, rounds=1, method="fedquad")


def chain(folder):
    """A full version and a delta to it; their paths, and what they lead to."""
    common = {"run": RUN.run, "fingerprint": RUN.fingerprint.digest}
    first = write_version(folder / "0", round=0, number=0, adapter=initial_adapter(SHAPE, LORA, 0), **common)
    last = write_version(
        folder / "1", round=1, number=1, adapter=moved(first, all_keys(SHAPE), 1), parent=(0, first),
        codec="int8", **common,
    )  # fmt: skip
    return [folder / "0", folder / "1"], last


def test_the_end_of_the_chain_is_exported_and_its_run_told(tmp_path):
    versions, last = chain(tmp_path)
    folder = export_peft(
        tmp_path / "adapter", versions, RUN, base="some/base",
        origin=Origin(
            number=1, rounds=1, method="fedquad", accuracy=0.8125, devices=("elm", "oak"), updates=2,
            mean_depth=1.5, layers=2, versions=3, best=2,
        ),
    )  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"
    np.testing.assert_array_equal(tensors[name], last["1.output.dense.B"].T)
    card = (folder / "README.md").read_text()
    told = ("`paint`", "version 1 of 3", "2 (elm, oak)", "0.8125", "fedquad", "depth 1.5 of 2", "rows is 2")
    for word in (*told, RUN.fingerprint.digest):
        assert word in card


def test_a_version_of_another_run_is_not_exported(tmp_path):
    versions, _ = chain(tmp_path)
    other = msgspec.structs.replace(RUN, fingerprint=msgspec.structs.replace(RUN.fingerprint, rank=2))
    with pytest.raises(ContainerError, match="serves only the run that made it"):
        export_peft(tmp_path / "adapter", versions, other, base="some/base", origin=ORIGIN)
    assert not (tmp_path / "adapter").exists()


class Interrupted(queue.SimpleQueue):
    """Ctrl-C comes while the first reply is waited for."""

    pressed = False

    def get(self, *args, **kwargs):
        if not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return super().get(*args, **kwargs)


class Host:
    """A trainer at an export, which it ends soon after an interrupt, or not."""

    def __init__(self, heeds):
        self.heeds, self.did = heeds, []

    def start(self, deliver):
        self.deliver = deliver

    def request(self, request):
        self.did.append("request")

    def interrupt(self):
        self.did.append("interrupt")
        self.deliver(Progress(id=1, stage="loading", done=0, total=1))
        if self.heeds:
            threading.Timer(0.05, self.end).start()

    def end(self):
        self.did.append("cleaned")
        self.deliver(Failed(id=1, cause="interrupted", message="interrupted"))

    def close(self):
        self.did.append("close")


@pytest.mark.parametrize("heeds", [True, False])
def test_ctrl_c_lets_the_trainer_remove_what_it_wrote(heeds, tmp_path, monkeypatch):
    monkeypatch.setattr(export.queue, "SimpleQueue", Interrupted)
    if not heeds:
        monkeypatch.setattr(export, "_INTERRUPT_S", 0.05)
    host = Host(heeds)
    config = RunConfig(
        run=RunSection(name="paint", labels=RUN.labels, state_dir=str(tmp_path)),
        base=RunBaseSection(path="some/base"),
    )
    with pytest.raises(KeyboardInterrupt):
        export_merged(tmp_path / "out", [], RUN, base="some/base", origin=ORIGIN, config=config, trainer=host)
    assert host.did == ["request", "interrupt", *["cleaned"] * heeds, "close"]
