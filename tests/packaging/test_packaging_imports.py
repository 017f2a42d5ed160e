"""What a fresh process imports: the torch-free core stays free of torch and numpy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "peft", "safetensors", "sqlalchemy", "matplotlib", "amqtt")

_BLOCKED = f"""
import importlib, json, pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is not for the core")
sys.meta_path.insert(0, Refuse())
import edge_sdk, device_profiles
found = [m.name for package in (edge_sdk, device_profiles)
         for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".",
                                        onerror=lambda name: None)]
core = [n for n in found if not n.startswith(("edge_sdk.training", "edge_sdk.updates"))]
for name in core:
    importlib.import_module(name)
print(json.dumps(core))
"""


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_of_the_core_imports_without_the_extras() -> None:
    core = json.loads(fresh(_BLOCKED))
    rooms = {name.split(".")[1] for name in core if "." in name}
    assert {"agent", "cli", "config", "data", "device", "planning", "protocol", "transport"} <= rooms


@pytest.mark.parametrize(
    "statement", ["import edge_sdk", "from edge_sdk import Agent", "import edge_sdk.cli.main"]
)
def test_imports_bring_neither_torch_nor_numpy(statement: str) -> None:
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(fresh(code)))
    assert not modules & set(HEAVY)
