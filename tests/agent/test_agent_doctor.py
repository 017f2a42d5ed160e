"""Doctor: each finding on machines made of files, and on fakes of what the training side says."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import msgspec
import pytest

from edge_sdk.agent.doctor import exit_code
from edge_sdk.agent.doctor.certificates import validities
from edge_sdk.agent.doctor.checkup import run_checkup
from edge_sdk.agent.doctor.clock import clock_findings
from edge_sdk.agent.doctor.files import file_findings
from edge_sdk.agent.doctor.finding import Finding
from edge_sdk.agent.doctor.machine import machine_findings
from edge_sdk.agent.doctor.training import training_findings
from edge_sdk.agent.lock import AGGREGATOR, FolderLock
from edge_sdk.clock import ManualClock, SystemClock
from edge_sdk.config.agent import (
    AgentConfig,
    AgentSection,
    BaseSection,
    BrokerConfig,
    DataSection,
    LimitsSection,
    TrainerSection,
)
from edge_sdk.config.loading import load_agent_config
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.checkup import (
    Accounting,
    Begun,
    CheckupLine,
    Decoding,
    Kernel,
    Packing,
    StepFailed,
    Versions,
)
from tests.device.recorded_machines import plant
from tests.support.brokers import Authority

TRAINER = TrainerSection()


def only(findings: list[Finding], name: str) -> Finding:
    (found,) = (one for one in findings if one.id == name)
    assert (found.exit_code != 0) == (found.level == "error")
    assert found.fix or found.level in ("ok", "skipped")
    return found


def config_in(folder: Path, extra: str = "", broker: str = 'url = "mqtt://127.0.0.1:1"') -> AgentConfig:
    (folder / "rows.jsonl").write_text('{"text": "a", "label": "no"}\n')
    rest = f'[base]\npath = "base"\n[data]\npath = "rows.jsonl"\n{extra}'
    (folder / "agent.toml").write_text(f'[agent]\nid = "one"\n[broker]\n{broker}\n{rest}')
    return load_agent_config(folder / "agent.toml")


# -- the machine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "level", "word"),
    [
        ("tx2-jp4", "error", "no current torch"),
        ("xavier-nx-jp5", "note", "container"),
        ("orin-nano-jp6", "ok", "JetPack 6"),
        ("laptop", "skipped", "no Jetson"),
    ],
)
def test_jetpack(tmp_path: Path, machine: str, level: str, word: str) -> None:
    finding = only(list(machine_findings(plant(machine, tmp_path), None)), "jetpack")
    assert finding.level == level and word in finding.text


def test_a_jetson_in_a_container_that_does_not_tell_its_release(tmp_path: Path) -> None:
    plant("orin-nano-jp6", tmp_path)
    (tmp_path / "etc/nv_tegra_release").unlink()
    assert only(list(machine_findings(tmp_path, None)), "jetpack").level == "warning"


def test_a_limit_above_what_a_control_group_leaves(tmp_path: Path) -> None:
    plant("laptop", tmp_path)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True, exist_ok=True)
    (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (group / "memory.max").write_text("1000000000\n")
    (group / "memory.current").write_text("0\n")
    small, large = (config_in(tmp_path, f"[limits]\nmemory_mb = {n}\n") for n in (900, 1200))
    assert "limits this process to 1000 MB" in only(list(machine_findings(tmp_path, small)), "memory").text
    finding = only(list(machine_findings(tmp_path, large)), "memory")
    assert finding.level == "warning" and "more than there is" in finding.text


def test_memory_that_cannot_be_read(tmp_path: Path) -> None:
    assert only(list(machine_findings(tmp_path, None)), "memory").level == "warning"


# -- time -------------------------------------------------------------------------------------------------


def test_a_clock_in_1970_is_named_as_the_cause(tmp_path: Path) -> None:
    tls = config_in(tmp_path, broker='url = "mqtts://example.org"')
    finding = only(list(clock_findings(ManualClock(12.0), tls, tmp_path / "agent.toml")), "clock")
    assert finding.level == "error" and finding.exit_code == 69
    assert "1970-01-01" in finding.text and "TLS" in finding.text
    plain = config_in(tmp_path)
    assert only(list(clock_findings(ManualClock(12.0), plain, tmp_path / "agent.toml")), "clock").level == (
        "warning"
    )
    assert only(list(clock_findings(SystemClock(), plain, tmp_path / "agent.toml")), "clock").level == "ok"


def test_certificates_by_the_clock(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")  # for two days from now
    cert = authority.cert("one")
    files = f'[broker.tls]\nca = "{authority.ca}"\ncert = "{cert}"\nkey = "{authority.key("one")}"\n'
    config = config_in(tmp_path, files, broker='url = "mqtts://example.org"')

    def at(wall: float) -> list[Finding]:
        found = [
            one
            for one in clock_findings(ManualClock(wall), config, tmp_path / "agent.toml")
            if one.id == "certificates"
        ]
        assert len(found) == 2
        return found

    now = time.time()
    assert all(one.level == "warning" and "only" in one.text for one in at(now))
    assert all(one.level == "error" and "clock" in one.fix for one in at(12.0))
    assert all("was valid until" in one.text for one in at(now + 3 * 86400))
    (validity,) = validities(cert)
    assert validity.end - validity.begin == 2 * 86400 and abs(validity.begin - now) < 3600
    cert.write_text("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n")
    assert only([at(now)[1]], "certificates").exit_code == 64


# -- the training side ------------------------------------------------------------------------------------


def asked(tmp_path: Path, *lines: CheckupLine, trainer: TrainerSection = TRAINER) -> list[Finding]:
    return list(training_findings(tmp_path, trainer, checkup=lambda _: lines, is_there=lambda _: object()))


def test_without_the_extra_it_says_what_cannot_be_checked(tmp_path: Path) -> None:
    def checkup(_allocator: str) -> list[CheckupLine]:
        raise AssertionError("nothing is there to start")

    found = list(training_findings(tmp_path, TRAINER, checkup=checkup, is_there=lambda _: None))
    assert only(found, "torch").exit_code == 70 and "edge-sdk[train]" in only(found, "torch").fix
    skipped = {one.id for one in found if one.level == "skipped"}
    assert {"kernel", "packing", "bitsandbytes", "memory-peak"} <= skipped


def test_all_is_well(tmp_path: Path) -> None:
    found = asked(
        tmp_path,
        Accounting(allocator="mimalloc", allocator_word="mimalloc 3.4.3"),
        Versions(torch="2.9.0", others={"transformers": "5.0"}),
        Kernel(device="cpu"),
        Packing(device="cpu", by="fbgemm"),
        Decoding(kind="cpu", version="0.50"),
    )
    assert {one.level for one in found} == {"ok", "skipped"}
    assert exit_code(found) == 0


def test_what_works_and_could_be_better_has_its_price(tmp_path: Path) -> None:
    found = asked(
        tmp_path,
        Accounting(allocator="glibc", allocator_word="glibc 2.36"),
        Packing(device="cpu", by="torch"),
        Decoding(kind="cpu", why_not="it is not installed"),
    )
    assert "1.34 times" in only(found, "allocator").text
    assert "17.5 ms" in only(found, "packing").text
    assert "5.1 ms" in only(found, "bitsandbytes").text and "nothing to this base" in found[-1].text
    assert {one.level for one in found if one.id in ("allocator", "packing", "bitsandbytes")} == {"note"}


def test_under_a_memory_limit_glibc_is_the_better_one(tmp_path: Path) -> None:
    limited = AgentConfig(
        agent=AgentSection(id="one"), broker=BrokerConfig(url="mqtt://127.0.0.1"),
        base=BaseSection(path="/base"), data=DataSection(path="/rows"), limits=LimitsSection(memory_mb=900),
    )  # fmt: skip
    assert limited.allocator() == "glibc"
    assert (
        msgspec.structs.replace(limited, trainer=TrainerSection(allocator="mimalloc")).allocator()
        == "mimalloc"
    )
    assert msgspec.structs.replace(limited, limits=LimitsSection()).allocator() == "auto"
    lines = [Accounting(allocator="glibc", allocator_word="glibc 2.36")]
    there = lambda _: object()  # noqa: E731
    for limited, level in ((True, "ok"), (False, "note")):
        found = training_findings(
            tmp_path, TRAINER, "glibc", limited=limited, checkup=lambda _: lines, is_there=there
        )
        assert only(list(found), "allocator").level == level


def test_bitsandbytes_without_its_native_kernels(tmp_path: Path) -> None:
    line = Decoding(kind="cpu", why_not="its native library does not load here")
    finding = only(asked(tmp_path, line, trainer=TrainerSection(base_precision="nf4")), "bitsandbytes")
    assert "native library" in finding.text and "nothing to this base" not in finding.text


def test_memory_that_is_neither_measured_nor_limited(tmp_path: Path) -> None:
    line = Accounting(
        allocator="other", allocator_word="musl", no_mark="Permission denied", no_limit="256 MiB were given"
    )
    found = asked(tmp_path, line)
    assert [one.level for one in found] == ["warning"] * 3
    assert [one.id for one in found] == ["allocator", "memory-peak", "memory-limit"]


def test_a_gpu_that_torch_does_not_see(tmp_path: Path) -> None:
    versions = Versions(torch="2.9.0", others={})
    assert "JetPack" in only(asked(plant("orin-nano-jp6", tmp_path), versions), "gpu").fix
    finding = only(asked(tmp_path, versions, trainer=TrainerSection(device="cuda:0")), "gpu")
    assert finding.exit_code == 71


@pytest.mark.parametrize(("device", "level"), [("auto", "error"), ("cuda:0", "error"), ("cpu", "warning")])
def test_a_kernel_that_fails_is_an_error_where_it_is_used(tmp_path: Path, device: str, level: str) -> None:
    line = StepFailed(step="kernel cuda:0", error="RuntimeError: no kernel image is available")
    finding = only(asked(tmp_path, line, trainer=TrainerSection(device=device)), "kernel")
    assert finding.level == level and "no kernel image" in finding.text


def test_no_memory_to_check_with(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900000 kB\nMemAvailable: 100000 kB\n")
    assert only(asked(tmp_path, Kernel(device="cpu")), "torch").level == "skipped"


def test_an_allocator_that_is_not_there(tmp_path: Path) -> None:
    def checkup(allocator: str) -> list[CheckupLine]:
        if allocator != "auto":
            raise ConfigError("jemalloc is not installed", "install it")
        return [Kernel(device="cpu")]

    there = lambda _: object()  # noqa: E731
    found = list(training_findings(tmp_path, TRAINER, "jemalloc", checkup=checkup, is_there=there))
    assert only(found, "allocator").exit_code == 64 and only(found, "kernel").level == "ok"


DIES = """
import os, signal, sys
if {died} not in sys.argv:
    print({before!r}, flush=True)
    os.kill(os.getpid(), signal.SIGILL)
print({after!r})
"""


def test_a_step_that_kills_its_process_is_told_and_the_rest_is_run() -> None:
    def lines(*records: CheckupLine) -> str:
        return "\n".join(msgspec.json.encode(one).decode() for one in records)

    before = lines(Begun(step="kernel cpu"), Kernel(device="cpu"), Begun(step="decoding cpu"))
    after = lines(Begun(step="packing cpu"), Packing(device="cpu", by="torch"))
    script = DIES.format(died="'decoding cpu'", before=before, after=after)
    found = run_checkup("glibc", command=[sys.executable, "-c", script])
    assert found == [
        Kernel(device="cpu"),
        StepFailed(step="decoding cpu", error="killed by SIGILL"),
        Packing(device="cpu", by="torch"),
    ]


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("import sys; sys.exit('no such thing')", "no such thing"),
        ("print('hello')", "no record"),
        ("import time; time.sleep(60)", "did not end"),
    ],
)
def test_a_checkup_that_does_not_begin(script: str, word: str) -> None:
    (failed,) = run_checkup("glibc", command=[sys.executable, "-c", script], timeout_s=3.0)
    assert isinstance(failed, StepFailed) and failed.step == "start" and word in failed.error


# -- files ------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    found = list(file_findings(config))
    assert only(found, "state").level == "ok" and not (tmp_path / "state").exists()
    assert "hub id" in only(found, "base").text
    assert only(found, "data").level == "ok"
    (tmp_path / "rows.jsonl").write_text('{"text": "", "label": "no"}\n')
    assert only(list(file_findings(config)), "data").exit_code == 65
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "labell": "no"}\n')
    misspelt = only(list(file_findings(config)), "data")
    assert misspelt.level == "warning" and "no column 'label'" in misspelt.text
    assert "columns: text, labell" in misspelt.text and "did you mean 'labell'?" in misspelt.fix
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert only(list(file_findings(config)), "data").level == "ok"
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    assert (
        "no model.safetensors"
        in only(list(file_findings(load_agent_config(tmp_path / "agent.toml"))), "base").text
    )


def test_a_state_folder_is_left_as_it_was(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    lock = FolderLock(tmp_path / "state")
    found = only(list(file_findings(config)), "state")
    lock.release()
    assert found.level == "ok" and str(os.getpid()) in found.text
    assert [one.name for one in (tmp_path / "state").iterdir()] == ["agent.lock"]


def test_an_aggregators_state_folder_is_no_agents(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    lock = FolderLock(tmp_path / "state", AGGREGATOR)
    found = only(list(file_findings(config)), "state")
    lock.release()
    assert found.exit_code == 64 and "of an aggregator" in found.text and "of its own" in found.fix


def test_a_state_folder_that_cannot_be_used(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (tmp_path / "state").write_text("a file")
    assert only(list(file_findings(config)), "state").exit_code == 73
    (tmp_path / "state").unlink()
    (tmp_path / "state").mkdir()
    (tmp_path / "state/agent.db").write_text("no database, but long enough to be looked at" * 9)
    assert only(list(file_findings(config)), "state").exit_code == 73
    if os.geteuid():  # root may write anywhere
        (tmp_path / "state/agent.db").unlink()
        (tmp_path / "state").chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert only(list(file_findings(config)), "state").exit_code == 73


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    config = config_in(tmp_path, '[limits]\nprefix_cache = "disk"\nprefix_cache_mb = 5000\n')

    def free(mb: int) -> Finding:
        usage = type(shutil.disk_usage("/"))(10**11, 0, mb * 10**6)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        return only(list(file_findings(config)), "disk")

    assert free(50).exit_code == 73
    assert free(5500).level == "warning" and "prefix_cache_mb" in free(5500).text
    assert free(7000).level == "ok"
