"""Findings about time: a board without a battery starts in 1970, and TLS then trusts nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import edge_sdk
from edge_sdk.agent.doctor.certificates import Validity, validities
from edge_sdk.agent.doctor.finding import Finding
from edge_sdk.clock import Clock
from edge_sdk.config.agent import AgentConfig
from edge_sdk.errors import BrokerError, ConfigError, CredentialsError

__all__ = ["clock_findings"]

_DAY_S = 86400.0
_SOON_S = 30 * _DAY_S
_RIGHT = "set it (timedatectl set-ntp true, or chrony), or give the board a battery for its clock"
_TLS = "the usual cause of TLS that fails, since every certificate seems to lie in the future"


def clock_findings(clock: Clock, config: AgentConfig | None, file: Path) -> Iterator[Finding]:
    """
    Args:
        file: the config's, which was written before now.
    """
    now = clock.wall()
    yield _clock(now, config, file)
    if config is not None:
        yield from _certificates(now, config)


def _clock(now: float, config: AgentConfig | None, file: Path) -> Finding:
    witnesses = [file, Path(edge_sdk.__file__)]
    if config is not None:
        witnesses += [Path(config.agent.state_dir) / "agent.db", Path(config.data.path)]
    newest, written = max(((_written(one), one) for one in witnesses), default=(0.0, file))
    told = f"it is {_date(now)}"
    if now > newest - _DAY_S:
        return Finding(id="clock", level="ok", text=told)
    tls = config is not None and config.broker.url.startswith("mqtts:")
    return Finding(
        id="clock", level="error" if tls else "warning",
        text=f"{told} by this machine's clock, and {written} was written on {_date(newest)}: the clock is "
        f"wrong, {_TLS}",
        fix=_RIGHT, exit_code=BrokerError.exit_code if tls else 0,
    )  # fmt: skip


def _certificates(now: float, config: AgentConfig) -> Iterator[Finding]:
    if not config.broker.url.startswith("mqtts:"):
        return
    tls = config.broker.tls
    for key, name in (("ca", tls.ca), ("cert", tls.cert)):
        if name is not None:
            yield _certificate(f"broker.tls.{key}", Path(name), now, own=key == "cert")
    if tls.ca is None:
        text = "the authorities that the system trusts are asked; broker.tls.ca names none"
        yield Finding(id="certificates", level="ok", text=text)


def _certificate(key: str, file: Path, now: float, *, own: bool) -> Finding:
    try:
        found = validities(file)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        return Finding(
            id="certificates", level="error", text=f"{key}: {file} cannot be used: {why}",
            fix="it holds certificates in PEM form", exit_code=ConfigError.exit_code,
        )  # fmt: skip
    # Of several authorities one that is valid may do; of a chain the first is the device's own.
    one = found[0] if own else max(found, key=lambda validity: _valid(validity, now))
    begin, end = _date(one.begin), _date(one.end)
    if now < one.begin:
        return Finding(
            id="certificates", level="error",
            text=f"{key}: {file} is valid from {begin} on, and by this machine's clock it is {_date(now)}",
            fix=f"a wrong clock is {_TLS}: {_RIGHT}", exit_code=CredentialsError.exit_code,
        )  # fmt: skip
    if now > one.end:
        return Finding(
            id="certificates", level="error",
            text=f"{key}: {file} was valid until {end}, and by this machine's clock it is {_date(now)}",
            fix="have a new one made, where the clock is right", exit_code=CredentialsError.exit_code,
        )  # fmt: skip
    if one.end - now < _SOON_S:
        return Finding(
            id="certificates", level="warning", text=f"{key}: {file} is valid until {end} only",
            fix="have a new one made before then",
        )  # fmt: skip
    return Finding(id="certificates", level="ok", text=f"{key}: {file} is valid until {end}")


def _valid(validity: Validity, now: float) -> tuple[bool, float]:
    return validity.begin <= now <= validity.end, validity.end


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
