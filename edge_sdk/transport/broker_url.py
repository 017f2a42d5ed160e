"""The broker section of a config file, checked: where the broker is, and how to prove who we are."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edge_sdk.config.broker import BrokerConfig
from edge_sdk.errors import BrokerError, ConfigError, CredentialsError

if TYPE_CHECKING:
    import ssl

__all__ = ["BrokerAddress", "broker_address", "is_loopback", "tls_context"]

_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True)
class BrokerAddress:
    """A broker to connect to. Holds the names of files with secrets, never a secret."""

    host: str
    port: int
    tls: bool
    insecure: bool
    """Plain MQTT off loopback, by leave of the config."""
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def password(self) -> str | None:
        """Read anew at every connect, so that a new password needs no restart.

        Raises CredentialsError when the file cannot be read.
        """
        if self.password_file is None:
            return None
        try:
            return self.password_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CredentialsError(
                f"broker.password_file {self.password_file} cannot be read: {error}",
                "it holds the password alone, readable by the user who runs this",
            ) from error


def broker_address(config: BrokerConfig) -> BrokerAddress:
    """Checks the section as a whole.

    Raises ConfigError for what is written wrongly or names an unreadable file, BrokerError for plain MQTT
    off loopback without ``insecure = true``.
    """
    scheme, host, port = _split(config.url)
    if scheme == "mqtt":
        if config.tls.ca or config.tls.cert or config.tls.key:
            raise ConfigError(
                f"broker.tls is set, but broker.url {config.url!r} is without TLS", "write mqtts://"
            )
        if not is_loopback(host) and not config.insecure:
            raise BrokerError(
                f"broker.url {config.url!r} leaves this machine without TLS: all would travel readable",
                "use mqtts:// with broker.tls.ca, or set broker.insecure = true on a network you trust",
            )
    if (config.tls.cert is None) != (config.tls.key is None):
        given, lacking = ("cert", "key") if config.tls.cert else ("key", "cert")
        raise ConfigError(f"broker.tls.{given} is set without broker.tls.{lacking}", "set both or none")
    if config.password_file is not None and config.username is None:
        raise ConfigError("broker.password_file is set without broker.username", "set broker.username too")
    return BrokerAddress(
        host=host,
        port=port,
        tls=scheme == "mqtts",
        insecure=scheme == "mqtt" and not is_loopback(host),
        username=config.username,
        password_file=_readable("broker.password_file", config.password_file),
        ca=_readable("broker.tls.ca", config.tls.ca),
        cert=_readable("broker.tls.cert", config.tls.cert),
        key=_readable("broker.tls.key", config.tls.key),
    )


def is_loopback(host: str) -> bool:
    """Whether traffic to ``host`` stays on this machine, told from its name alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def tls_context(address: BrokerAddress) -> ssl.SSLContext:
    """TLS 1.2 or later; the broker's name and certificate are always verified.

    Without ``tls.ca`` the system's authorities are trusted. Raises ConfigError for files that hold no PEM.
    """
    import ssl

    context = ssl.create_default_context(cafile=None if address.ca is None else str(address.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if address.cert is not None:
        # The callable keeps OpenSSL from asking for a passphrase on the terminal.
        context.load_cert_chain(str(address.cert), str(address.key), password=lambda: "")
    return context


def _split(url: str) -> tuple[str, str, int]:
    if url == "embedded":
        raise ConfigError(
            "broker.url is 'embedded', which starts a broker on the aggregator's machine only",
            "give a device the url of that broker: mqtt://127.0.0.1:PORT there, mqtts://HOST:8883 elsewhere",
        )
    hint = "write mqtt://host:port or mqtts://host:port"
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"broker.url {_without_secret(url)!r} cannot be read: {error}", hint) from error
    if scheme not in _PORTS:
        raise ConfigError(f"broker.url {_without_secret(url)!r} has the unknown scheme {scheme!r}", hint)
    if "@" in parts.netloc:
        raise ConfigError(
            f"broker.url {_without_secret(url)!r} holds a user name",
            "use broker.username and broker.password_file",
        )
    if not host or any(c.isspace() for c in url):
        raise ConfigError(f"broker.url {url!r} names no host", hint)
    if port == 0:
        raise ConfigError(f"broker.url {url!r} has port 0, which cannot be connected to", hint)
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(f"broker.url {url!r} goes on after the port", hint)
    return scheme, host, port or _PORTS[scheme]


def _without_secret(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}...@{rest.rpartition('@')[2]}" if "@" in rest else url


def _readable(key: str, value: str | None) -> Path | None:
    if value is None:
        return None
    path = Path(value)
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {value}", "paths are relative to the config file")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{key}: the file {value} cannot be read by this user", "change its owner or mode")
    return path
