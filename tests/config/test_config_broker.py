"""Which brokers may be used, decided in one place."""

import pytest

from edge_sdk.config.broker import (
    BrokerConfig,
    TlsConfig,
    check_broker,
    embedded_port,
    is_embedded,
    parse_broker_url,
)
from edge_sdk.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "loopback"),
    [
        ("mqtt://127.0.0.1", "127.0.0.1", 1883, False, True),
        ("mqtt://localhost:7", "localhost", 7, False, True),
        ("MQTTS://Example.org/", "example.org", 8883, True, False),
        ("mqtt://[::1]:1884", "::1", 1884, False, True),
        ("mqtts://10.0.0.1:1", "10.0.0.1", 1, True, False),
        ("mqtt://localhost.example.org", "localhost.example.org", 1883, False, False),
    ],
)
def test_urls(url, host, port, tls, loopback):
    address = parse_broker_url(url)
    assert (address.host, address.port, address.tls, address.loopback) == (host, port, tls, loopback)
    assert parse_broker_url(str(address)) == address


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "http://x", "mqtt://", "mqtt://x:0", "mqtt://x:99999", "mqtt://x:y", "mqtt://x/topic",
     "mqtt://x?a=b", "mqtt://[::1", "tcp://x:1883", "mqtt://a b", "mqtt://a\n"],
)  # fmt: skip
def test_urls_that_are_none(url):
    with pytest.raises(ConfigError, match=r"broker\.url"):
        parse_broker_url(url)
    assert [problem.key for problem in check_broker(BrokerConfig(url=url))] == ["broker.url"]


@pytest.mark.parametrize("url", ["mqtts://me:secret@host", "mqtt://me:secret@host:port", "me:secret@host"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        parse_broker_url(url)
    assert "secret" not in str(caught.value)
    assert "password_file" in str(caught.value)


def keys(**fields):
    return [problem.key for problem in check_broker(BrokerConfig(**fields))]


def test_readable_traffic_off_this_machine_needs_leave():
    assert keys(url="mqtt://10.0.0.1") == ["broker.url"]
    assert keys(url="mqtt://10.0.0.1", insecure=True) == []
    assert keys(url="mqtt://127.0.0.1") == []
    assert keys(url="mqtts://10.0.0.1") == []


def test_halves_are_named():
    assert keys(url="mqtts://x", username="u") == ["broker.password_file"]
    assert keys(url="mqtts://x", password_file="p") == ["broker.username"]
    assert keys(url="mqtts://x", tls=TlsConfig(cert="c")) == ["broker.tls.key"]
    assert keys(url="mqtts://x", tls=TlsConfig(key="k", ca="a")) == ["broker.tls.cert"]


def test_what_would_be_ignored_is_refused():
    assert keys(url="mqtt://127.0.0.1", tls=TlsConfig(ca="a")) == ["broker.tls"]
    assert keys(username="u", password_file="p", tls=TlsConfig(ca="a")) == [
        "broker.username",
        "broker.password_file",
        "broker.tls",
    ]
    assert keys() == []


def test_the_embedded_broker_may_have_a_port():
    assert (is_embedded("embedded"), embedded_port("embedded")) == (True, None)
    assert (is_embedded("embedded:1883"), embedded_port("embedded:1883")) == (True, 1883)
    assert not is_embedded("mqtt://embedded")
    assert keys(url="embedded:1883") == []
    assert keys(url="embedded:0") == keys(url="embedded:x") == ["broker.url"]
    assert keys(url="embeddedly") == ["broker.url"]
