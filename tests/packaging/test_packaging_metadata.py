"""What the package says of itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[ <>=!~;\[]", line, maxsplit=1)[0].lower() for line in requirements}


def test_the_core_stands_on_few_packages() -> None:
    assert _names(PROJECT["dependencies"]) == {"paho-mqtt", "psutil", "msgspec", "typer", "tomli"}


def test_extras_and_commands() -> None:
    assert {"train", "bnb", "nvidia", "server"} <= PROJECT["optional-dependencies"].keys()
    assert PROJECT["scripts"].keys() == {"edge-agent", "edge-aggregator"}


def test_license_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0" in text


def test_constraints_pin_every_direct_dependency_once_per_python() -> None:
    lines = [
        line.strip()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert all("==" in line for line in lines)
    pinned = _names(lines)
    asked = set().union(*map(_names, PROJECT["optional-dependencies"].values()))
    assert asked - {"nvidia-ml-py"} <= pinned
