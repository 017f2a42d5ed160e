"""The generated config of a broker off loopback. That it works is shown by the transport's TLS tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.broker.mosquitto_config import write_mosquitto_config
from edge_sdk.errors import ConfigError, ProtocolError

FILES = {"ca": Path("/tls/ca.crt"), "cert": Path("/tls/broker.crt"), "key": Path("/tls/broker.key")}


def test_devices_reach_their_own_topics_and_nothing_else(tmp_path: Path) -> None:
    config = write_mosquitto_config(tmp_path, "farm", **FILES)
    text = config.read_text()
    for line in (
        "listener 8883",
        "allow_anonymous false",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "set_tcp_nodelay true",
        f"acl_file {tmp_path / 'acl'}",
    ):
        assert line in text.splitlines()
    rules = [line for line in (tmp_path / "acl").read_text().splitlines() if line and line[0] != "#"]
    assert rules == [
        "pattern write fl1/farm/s/0/d/%u/c",
        "pattern write fl1/farm/s/0/d/%u/b",
        "pattern write fl1/farm/p/%u",
        "pattern read fl1/farm/d/%u/r",
        "pattern read fl1/farm/a/0",
        "pattern read fl1/farm/m",
        "user aggregator",
        "topic readwrite fl1/farm/#",
    ]


def test_by_password_no_certificate_is_asked_for(tmp_path: Path) -> None:
    text = write_mosquitto_config(tmp_path, "farm", **FILES, passwords=Path("/secret")).read_text()
    assert "password_file /secret" in text
    assert "use_username_as_clientid true" in text
    assert "require_certificate" not in text


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no aggregator"):
        write_mosquitto_config(tmp_path, "farm", **FILES, aggregators=())
    with pytest.raises(ProtocolError, match="topic level"):
        write_mosquitto_config(tmp_path, "a/b", **FILES)
