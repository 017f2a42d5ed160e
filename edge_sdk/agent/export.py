"""The newest version held, as a PEFT folder that an app can load."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path

from edge_sdk.agent.context import Context
from edge_sdk.agent.joining import Joining, error_of
from edge_sdk.errors import StateError, TrainerError
from edge_sdk.protocol.trainer import Died, Export, Exported, Failed, TrainerReply
from edge_sdk.protocol.wire import VersionRef

__all__ = ["ask_export"]

_KEPT = 2


def ask_export(context: Context, joining: Joining, result: Future[Path]) -> None:
    """Puts the folder's path, or why there is none, into ``result``; the trainer must be free."""
    run, fingerprint = joining.run, joining.fingerprint
    refs = context.record.versions()
    if run is None or fingerprint is None or not refs:
        result.set_exception(
            StateError("this device holds no version of the adapter yet", "wait for its first round")
        )
        return
    newest = refs[max(refs)]
    folder = context.folder / "adapters" / f"{newest.number}-{newest.object[:12]}"
    if folder.is_dir():
        result.set_result(folder)
        return
    chain = _chain(refs, newest)
    if chain is None or not all(context.store.has(ref.object) for ref in chain):
        result.set_exception(
            StateError(
                f"version {newest.number} builds on one that this device no longer holds", "wait for the next"
            )
        )
        return
    folder.parent.mkdir(exist_ok=True)

    def build(id: int) -> Export:
        return Export(
            id=id,
            base=context.config.base.path,
            task=run.task,
            labels=run.labels,
            lora=run.lora,
            shape=run.shape,
            fingerprint=fingerprint,
            versions=tuple(str(context.store.path(ref.object)) for ref in chain),
            folder=str(folder),
        )

    def answer(reply: TrainerReply) -> None:
        match reply:
            case Exported():
                _forget_old(folder.parent)
                context.emit("adapter.exported", version=newest.number, folder=reply.folder)
                result.set_result(Path(reply.folder))
            case Failed():
                result.set_exception(error_of(reply))
            case Died():
                result.set_exception(TrainerError(f"the trainer ended while exporting: {reply.message}"))

    context.desk.ask("export", build, answer)


def _chain(refs: dict[int, VersionRef], newest: VersionRef) -> list[VersionRef] | None:
    """The full version and the deltas that lead to ``newest``; None: one of them is not held."""
    chain = [newest]
    while (parent := chain[0].parent) is not None:
        if parent not in refs or len(chain) > len(refs):
            return None
        chain.insert(0, refs[parent])
    return chain


def _forget_old(folder: Path) -> None:
    """Keeps the two newest exports: an app may still read the one before."""
    exports = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in exports[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
