"""Config and access list for a Mosquitto off loopback: TLS, identities, deny by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.topics import Topics
from edge_sdk.transport.rules import MAX_PAYLOAD_BYTES

__all__ = ["write_mosquitto_config"]

_CONFIG = """\
# Mosquitto 2.0 or later, for namespace {namespace}.
listener {port}{bind}
cafile {ca}
certfile {cert}
keyfile {key}
tls_version tlsv1.2
allow_anonymous false
acl_file {acl}
{identity}
set_tcp_nodelay true
persistence false
max_packet_size {packet}
max_inflight_messages 32
max_queued_messages 4000
max_queued_bytes 67108864
log_dest {log}
log_type error
log_type warning
log_type notice
log_type information
connection_messages false
"""
# The client id is forced to be the identity: else one device could evict another by taking its id.
_BY_CERTIFICATE = """\
require_certificate true
use_identity_as_username true
use_username_as_clientid true"""
_BY_ACCOUNT = """\
password_file {passwords}
use_username_as_clientid true"""


def write_mosquitto_config(
    folder: Path,
    namespace: str,
    *,
    ca: Path,
    cert: Path,
    key: Path,
    port: int = 8883,
    bind: str | None = None,
    aggregators: Sequence[str] = ("aggregator",),
    passwords: Path | None = None,
    log: str = "stderr",
    user: str | None = None,
) -> Path:
    """Writes ``mosquitto.conf`` and ``acl`` into ``folder``; returns the path of the former.

    Args:
        ca: authority of the clients' certificates; cert, key: the broker's own, in PEM form.
        bind: address to listen on; None: all.
        aggregators: identities that lead runs; every other identity is a device of that id.
        passwords: a file made by mosquitto_passwd: clients then prove themselves by a password over TLS.
            None: by their certificate, whose common name is their identity.
        user: the account Mosquitto drops to when root starts it; None: its default, ``mosquitto``.
    """
    if not aggregators:
        raise ConfigError("no aggregator is named: nobody could lead a run", "name at least one identity")
    folder.mkdir(parents=True, exist_ok=True)
    acl = folder / "acl"
    acl.write_text(_access_list(namespace, aggregators), encoding="utf-8")
    acl.chmod(0o644)
    identity = _BY_CERTIFICATE if passwords is None else _BY_ACCOUNT.format(passwords=passwords)
    if user is not None:
        identity += f"\nuser {user}"
    config = folder / "mosquitto.conf"
    config.write_text(
        _CONFIG.format(
            namespace=namespace,
            port=port,
            bind=f" {bind}" if bind else "",
            ca=ca,
            cert=cert,
            key=key,
            acl=acl,
            identity=identity,
            packet=MAX_PAYLOAD_BYTES + 1024,
            log=log,
        ),
        encoding="utf-8",
    )
    return config


def _access_list(namespace: str, aggregators: Sequence[str]) -> str:
    """Patterns hold for every identity, %u being its name; what no line allows is denied."""
    topics = Topics(namespace)
    lines = [
        "# What every device may do.",
        f"pattern write {topics.control('+').replace('+', '%u')}",
        f"pattern write {topics.bulk('+').replace('+', '%u')}",
        f"pattern write {topics.presence('+').replace('+', '%u')}",
        f"pattern read fl1/{namespace}/d/%u/r",
        f"pattern read {topics.aggregator}",
        f"pattern read {topics.run}",
        "",
    ]
    for name in aggregators:
        lines += [f"user {name}", f"topic readwrite fl1/{namespace}/#", ""]
    return "\n".join(lines)
