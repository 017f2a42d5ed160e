"""The aggregator's table, part by part: each in a module of its own, each with a result of its own.

python -m benchmarks.aggregator.run --only crashes
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.results import write_result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


def main() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregator.run")
    parser.add_argument("--only", action="append", choices=list(config), help="default: all parts")
    for part in parser.parse_args().only or list(config):
        rows, claims = importlib.import_module(f"benchmarks.aggregator.{part}").run(config[part])
        write_result(FOLDER, config[part], rows, claims, name=f"result-{part}.json")


if __name__ == "__main__":
    main()
