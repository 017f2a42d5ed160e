"""The broker section, the same in both config files, and the one place that judges a broker's address."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from edge_sdk.config.kinds import FilePath
from edge_sdk.config.problems import Problem, shown
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.base import Name, Record, Text

__all__ = [
    "BrokerAddress",
    "BrokerConfig",
    "TlsConfig",
    "check_broker",
    "embedded_port",
    "is_embedded",
    "parse_broker_url",
]

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_FORMS = "mqtt://host:port or mqtts://host:port"


class TlsConfig(Record, frozen=True, kw_only=True):
    """Files in PEM form; paths are relative to the config file."""

    ca: FilePath | None = None
    """None: the authorities that the system trusts."""
    cert: FilePath | None = None
    key: FilePath | None = None


class BrokerConfig(Record, frozen=True, kw_only=True):
    url: Text = "embedded"
    """``embedded`` or ``embedded:port`` (aggregator only: its own broker, on loopback), ``mqtt://host:port``,
    ``mqtts://host:port``."""
    namespace: Name = "edge"
    username: Text | None = None
    password_file: FilePath | None = None
    insecure: bool = False
    """Allow ``mqtt://`` off loopback: everything, the password too, travels readable."""
    tls: TlsConfig = TlsConfig()


@dataclass(frozen=True)
class BrokerAddress:
    """Where a broker listens. ``tls`` is told by the scheme, ``mqtts``."""

    host: str
    port: int
    tls: bool

    @property
    def loopback(self) -> bool:
        """Whether nothing leaves this machine on the way to it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def parse_broker_url(url: str) -> BrokerAddress:
    """The address in ``mqtt://host:port`` or ``mqtts://host:port``; the port may be left out (1883, 8883).

    Raises ConfigError for anything else, also for a user or a password in the URL.
    """
    if "@" in url:
        # The URL is shown by `status`, in logs and in the errors below; a password must not be.
        raise ConfigError(
            "broker.url: holds a user name or a password", "use broker.username and broker.password_file"
        )
    wrong = ConfigError(f"broker.url: received {shown(url)}; allowed: {_FORMS}")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in _PORTS or not host or port == 0 or not url.isprintable() or " " in url:
        raise wrong
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise wrong
    return BrokerAddress(host, port or _PORTS[parts.scheme], parts.scheme == "mqtts")


def is_embedded(url: str) -> bool:
    """Whether the aggregator is to start a broker of its own."""
    return url == "embedded" or url.startswith("embedded:")


def embedded_port(url: str) -> int | None:
    """The port in ``embedded:port``; None: any. Raises ConfigError for what is no port."""
    _, _, text = url.partition(":")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise ConfigError(
            f'broker.url: received "{url}"; allowed: embedded, or embedded:PORT from 1 to 65535'
        )
    return int(text)


def check_broker(broker: BrokerConfig) -> list[Problem]:
    """What is wrong with a broker section as a whole; empty where it may be used. Files are not looked at."""
    problems = []
    if is_embedded(broker.url):
        try:
            embedded_port(broker.url)
        except ConfigError as error:
            key, _, text = error.message.partition(": ")
            problems.append(Problem(key, text, error.hint))
        meaningless = [name for name in ("username", "password_file") if getattr(broker, name) is not None]
        if broker.tls != TlsConfig():
            meaningless.append("tls")
        problems += [
            Problem(
                f"broker.{name}", "has no meaning with the embedded broker", "set broker.url, or remove it"
            )
            for name in meaningless
        ]
        return problems
    try:
        address = parse_broker_url(broker.url)
    except ConfigError as error:
        key, _, text = error.message.partition(": ")
        problems.append(Problem(key, text, error.hint))
    else:
        if not address.tls and not address.loopback and not broker.insecure:
            problems.append(
                Problem(
                    "broker.url",
                    f'received "{broker.url}": refused: everything would travel readable, the password too',
                    "use mqtts://, or set broker.insecure = true on a network that you trust",
                )
            )
        if not address.tls and broker.tls != TlsConfig():
            problems.append(
                Problem("broker.tls", f'has no meaning with "{broker.url}"', "use mqtts://, or remove it")
            )
    for one, other in (("username", "password_file"), ("password_file", "username")):
        if getattr(broker, one) is not None and getattr(broker, other) is None:
            problems.append(Problem(f"broker.{other}", f"is missing: broker.{one} is set", "give both"))
    for one, other in (("cert", "key"), ("key", "cert")):
        if getattr(broker.tls, one) is not None and getattr(broker.tls, other) is None:
            problems.append(
                Problem(f"broker.tls.{other}", f"is missing: broker.tls.{one} is set", "give both")
            )
    return problems
