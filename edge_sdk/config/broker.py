"""The broker section, the same in both config files."""

from __future__ import annotations

from edge_sdk.protocol.base import Name, Record, Text

__all__ = ["BrokerConfig", "TlsConfig"]


class TlsConfig(Record, frozen=True, kw_only=True):
    """Files in PEM form; paths are relative to the config file."""

    ca: Text | None = None
    cert: Text | None = None
    key: Text | None = None


class BrokerConfig(Record, frozen=True, kw_only=True):
    url: Text = "embedded"
    """``embedded`` (aggregator only: its own broker, on loopback), ``mqtt://host:port``, ``mqtts://host:port``."""
    namespace: Name = "edge"
    username: Text | None = None
    password_file: Text | None = None
    insecure: bool = False
    """Allow ``mqtt://`` off loopback: everything, the password too, travels readable."""
    tls: TlsConfig = TlsConfig()
