"""``edge-agent doctor``."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import typer

from edge_sdk.agent.doctor import Finding, examine, exit_code
from edge_sdk.console import counted, one_line

__all__ = ["show_findings"]

_WIDTH = 14


def show_findings(config: Path, *, as_json: bool) -> None:
    """Shows each finding when it is made; ends with the code of the first error."""
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not as_json:
            for line in _lines(finding):
                typer.echo(line)
    code = exit_code(findings)
    if as_json:
        told = {"exit_code": code, "findings": [msgspec.to_builtins(finding) for finding in findings]}
        typer.echo(json.dumps(told))
    else:
        typer.echo(_sum(findings))
    raise typer.Exit(code)


def _lines(finding: Finding) -> list[str]:
    mark = "-" if finding.level == "skipped" else finding.level
    lines = [f"{mark:<8} {finding.id:<{_WIDTH}} {one_line(finding.text)}"]
    if finding.fix and finding.level in ("note", "warning", "error"):
        lines.append(f"{'':<8} {'':<{_WIDTH}} fix: {one_line(finding.fix)}")
    return lines


def _sum(findings: list[Finding]) -> str:
    counts = []
    for level in ("error", "warning", "note"):
        count = sum(finding.level == level for finding in findings)
        if count:
            counts.append(counted(count, level))
    return ", ".join(counts) or "nothing to mend"
