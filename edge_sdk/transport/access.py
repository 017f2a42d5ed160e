"""The way into a broker: its address, and the files that prove who we are, checked and read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.config.broker import BrokerAddress, BrokerConfig, check_broker, is_embedded, parse_broker_url
from edge_sdk.errors import ConfigError, CredentialsError

if TYPE_CHECKING:
    import ssl

__all__ = ["BrokerAccess", "broker_access", "tls_context"]


@dataclass(frozen=True)
class BrokerAccess:
    """A broker that may be connected to. Holds the names of files with secrets, never a secret."""

    address: BrokerAddress
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @property
    def url(self) -> str:
        return str(self.address)

    @property
    def insecure(self) -> bool:
        """Plain MQTT off loopback, by leave of the config."""
        return not self.address.tls and not self.address.loopback

    def password(self) -> str | None:
        """Read anew at every connect, so that a new password needs no restart.

        Raises CredentialsError when the file cannot be read.
        """
        if self.password_file is None:
            return None
        try:
            return self.password_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise CredentialsError(
                f"broker.password_file {self.password_file} cannot be read: {reason}",
                "it holds the password alone, readable by the user who runs this",
            ) from error


def broker_access(config: BrokerConfig) -> BrokerAccess:
    """Checks the section, and that its files can be read. Raises ConfigError with all that is wrong."""
    if is_embedded(config.url):
        raise ConfigError(
            f'broker.url: "{config.url}" starts a broker, which the aggregator alone does',
            "give the url that the aggregator shows: mqtt://127.0.0.1:PORT on its own machine",
        )
    problems = check_broker(config)
    if problems:
        text = "; ".join(f"{problem.key}: {problem.text}" for problem in problems)
        raise ConfigError(text, problems[0].hint)
    return BrokerAccess(
        address=parse_broker_url(config.url),
        username=config.username,
        password_file=_readable("broker.password_file", config.password_file),
        ca=_readable("broker.tls.ca", config.tls.ca),
        cert=_readable("broker.tls.cert", config.tls.cert),
        key=_readable("broker.tls.key", config.tls.key),
    )


def tls_context(access: BrokerAccess) -> ssl.SSLContext:
    """TLS 1.2 or later; the broker's name and certificate are always verified.

    Without ``tls.ca`` the system's authorities are trusted. Raises ConfigError for files that cannot be used.
    """
    import ssl

    try:
        context = ssl.create_default_context(cafile=None if access.ca is None else str(access.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if access.cert is not None:
            # The callable keeps OpenSSL from asking for a passphrase on the terminal.
            context.load_cert_chain(str(access.cert), str(access.key), password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"the files of broker.tls cannot be used: {error}",
            "ca, cert and key are in PEM form, the key without a passphrase and belonging to cert",
        ) from error
    return context


def _readable(key: str, value: str | None) -> Path | None:
    if value is None:
        return None
    path = Path(value)
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {value}", "paths are relative to the config file")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{key}: the file {value} cannot be read by this user", "change its owner or mode")
    return path
