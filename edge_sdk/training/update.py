"""The files around a training: the version it starts from, the update and the residual that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import ContainerError, TrainerError
from edge_sdk.protocol.trainer import Train
from edge_sdk.training.model import TunableModel
from edge_sdk.updates.container import read_container
from edge_sdk.updates.delta import write_update
from edge_sdk.updates.keys import Adapter, tuned_keys
from edge_sdk.updates.residual import add_owed, read_residual, write_residual
from edge_sdk.updates.versions import read_adapter

__all__ = ["Files", "Start", "write_results"]


@dataclass(frozen=True)
class Files:
    update: Path
    residual: Path | None


@dataclass(frozen=True)
class Start:
    """What a training starts from. ``residual`` is None without error feedback."""

    adapter: Adapter
    version: int
    residual: Adapter | None

    @classmethod
    def read(cls, request: Train) -> Start:
        """Reads and checks the request's files. Raises ContainerError."""
        versions = [Path(path) for path in request.versions]
        if not versions:
            raise ContainerError("the request names no version to start from")
        with read_container(versions[-1], "version") as container:
            header = container.header
        if header.fingerprint != request.fingerprint or header.version is None:
            raise ContainerError(
                f"{versions[-1].name} is not a version of this run", "its fingerprint is another one's"
            )
        residual: Adapter | None = None
        if request.spec.error_feedback:
            residual = read_residual(Path(request.residual)) if request.residual else {}
            residual = add_owed(residual, [Path(path) for path in request.owed])
        return cls(read_adapter(versions), header.version, residual)


def write_results(request: Train, start: Start, model: TunableModel) -> Files:
    """Writes update.safetensors and, with error feedback, residual.safetensors into the request's folder.

    Raises TrainerError where the training diverged: the version that it started from is not at fault.
    """
    folder = Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = tuned_keys(model.shape, request.candidate.depth, request.spec.factors)
    update = folder / "update.safetensors"
    try:
        residual = write_update(
            update,
            run=request.run,
            round=request.round,
            fingerprint=request.fingerprint,
            builds_on=start.version,
            start=start.adapter,
            end=model.adapter(list(keys)),
            keys=keys,
            codec=request.candidate.codec,
            residual=start.residual,
        )
    except ContainerError as error:
        raise TrainerError(error.message, error.hint) from error
    if residual is None:
        return Files(update, None)
    path = folder / "residual.safetensors"
    write_residual(
        path,
        residual=residual,
        run=request.run,
        round=request.round,
        fingerprint=request.fingerprint,
    )
    return Files(update, path)
