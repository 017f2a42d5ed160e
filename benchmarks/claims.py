"""``make claims``: what all benchmarks claim, those that do not hold first."""

from __future__ import annotations

import json
from pathlib import Path


def main() -> None:
    rows = []
    for path in sorted(Path(__file__).parent.glob("*/result*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        where = f"{path.parent.name} ({result['made']['date']}, {result['machine']['processor']})"
        rows += [(claim["holds"], where, claim) for claim in result["claims"]]
    for holds, where, claim in sorted(rows, key=lambda row: row[0]):
        mark = "holds" if holds else "FAILS"
        print(f"{mark}  {claim['id']}: {claim['text']}: {claim['value']} ({claim['bound']})  [{where}]")
    failing = sum(not holds for holds, _, _ in rows)
    print(f"{len(rows)} claims, {failing} of them do not hold")


if __name__ == "__main__":
    main()
