"""What went wrong with a broker, told apart: not reachable, not allowed in, not what it should be."""

from __future__ import annotations

import socket
import ssl

from paho.mqtt.reasoncodes import ReasonCode

from edge_sdk.errors import BrokerError, CredentialsError, EdgeError, ProtocolError
from edge_sdk.transport.access import BrokerAccess

__all__ = [
    "CONNECT_S",
    "NoAnswerError",
    "NotYetValidError",
    "TakenOverError",
    "connect_error",
    "refusal",
    "tls_error",
]

CONNECT_S = 10.0
"""How long a broker may take to accept a connection, and to answer CONNECT."""

_UNSUPPORTED_VERSION, _BAD_CLIENT_ID, _TAKEN_OVER, _TOO_LARGE = 132, 133, 142, 149
_NOT_ALLOWED = {134, 135, 138, 140}  # bad user name or password, not authorized, banned, bad method
_NOT_YET_VALID = 9  # X509_V_ERR_CERT_NOT_YET_VALID
_CLOCK_HINT = (
    "check broker.tls.ca and this device's clock: a board without a battery starts in 1970, "
    "and every certificate lies in its future"
)


class NoAnswerError(BrokerError):
    """The connection ended before the broker said anything: perhaps it does not speak this version."""


class NotYetValidError(CredentialsError):
    """The broker's certificate lies in this device's future: waiting for the right time helps."""


class TakenOverError(BrokerError):
    """Another client connected under the same id."""


def refusal(access: BrokerAccess, client_id: str, version5: bool, reason: ReasonCode) -> EdgeError:
    """What a reason code of the broker means to a user."""
    url, value = access.url, reason.value
    if value in _NOT_ALLOWED:
        who = "without a user name" if access.username is None else f"as {access.username!r}"
        return CredentialsError(
            f"the broker {url} did not let {client_id!r} in {who}: {reason}",
            "check broker.username and broker.password_file, or the device's certificate",
        )
    if value == _TAKEN_OVER:
        return TakenOverError(
            f"another client connected to {url} as {client_id!r}",
            "two devices with one id? agent.id must be different on each",
        )
    if value == _UNSUPPORTED_VERSION:
        return NoAnswerError(f"the broker {url} does not speak MQTT {'5' if version5 else '3.1.1'}")
    if value == _BAD_CLIENT_ID:
        return BrokerError(f"the broker {url} does not accept the client id {client_id!r}")
    if value == _TOO_LARGE:
        return ProtocolError(f"the broker {url} ended the connection over a message that is too large")
    return BrokerError(f"the broker {url} ended the connection: {reason}")


def connect_error(access: BrokerAccess, error: OSError) -> EdgeError:
    if isinstance(error, ssl.SSLError):
        return tls_error(access, error)
    if isinstance(error, socket.gaierror):
        return BrokerError(f"the host of {access.url} is unknown: {error.strerror}", "check broker.url")
    if isinstance(error, TimeoutError):
        return BrokerError(
            f"no answer from {access.url} in {CONNECT_S:.0f} s", "check the network and the firewall"
        )
    if isinstance(error, ConnectionResetError) and access.address.tls:
        return _no_tls(access)
    return BrokerError(
        f"no broker answers at {access.url}: {error.strerror or error}",
        "is it running, and is the port right?",
    )


def _no_tls(access: BrokerAccess) -> EdgeError:
    return BrokerError(
        f"{access.url} does not speak TLS", "use the broker's TLS port, usually 8883, or mqtt:// on loopback"
    )


def tls_error(access: BrokerAccess, error: ssl.SSLError) -> EdgeError:
    if isinstance(error, ssl.SSLCertVerificationError):
        kind = NotYetValidError if error.verify_code == _NOT_YET_VALID else CredentialsError
        return kind(f"the certificate of {access.url} was not accepted: {error.verify_message}", _CLOCK_HINT)
    reason = error.reason or ""
    if any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")):
        return CredentialsError(
            f"the broker {access.url} refused this device's certificate: {reason.lower().replace('_', ' ')}",
            f"check broker.tls.cert and broker.tls.key; {_CLOCK_HINT}",
        )
    if isinstance(error, ssl.SSLEOFError) or reason in (
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "RECORD_LAYER_FAILURE",
        "UNEXPECTED_EOF_WHILE_READING",
    ):
        return _no_tls(access)
    return BrokerError(f"TLS with {access.url} failed: {reason or error}")
