"""A version as a PEFT adapter, with a card that tells the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_sdk.protocol.wire import Run
from edge_sdk.updates.peft import write_peft
from edge_sdk.updates.versions import read_adapter

__all__ = ["export_peft"]


def export_peft(
    folder: Path,
    versions: Sequence[Path],
    run: Run,
    *,
    base: str,
    number: int,
    rounds: int,
    accuracy: float | None = None,
    perplexity: float | None = None,
    devices: Sequence[str] = (),
) -> Path:
    """Writes the version that the chain ``versions`` leads to; replaces an older folder.

    ``base``: where the base model lies, for the adapter's config. Raises ContainerError
    for versions that are damaged or not of this run.
    """
    score = f"accuracy: {'not evaluated' if accuracy is None else f'{accuracy:.4f}'}"
    if perplexity is not None:
        score = f"perplexity: {perplexity:.4f}"
    lines = [
        "## The run",
        "",
        f"- Run `{run.run}`, version {number} after {rounds} rounds",
        f"- Devices: {', '.join(devices) if devices else 'none yet'}",
        f"- Held-out {score}",
        f"- Maximum length {run.max_length}, template `{run.template}`",
        f"- Fingerprint `{run.fingerprint.digest}`",
    ]
    return write_peft(
        folder,
        read_adapter(versions, run.fingerprint.digest),
        shape=run.shape,
        lora=run.lora,
        base=base,
        labels=run.labels,
        task=run.task,
        card="\n".join(lines),
    )
