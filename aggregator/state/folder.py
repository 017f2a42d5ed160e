"""The server's state folder: where things lie in it, who holds it, and what a crash may have left."""

from __future__ import annotations

from pathlib import Path

from aggregator.state.base import Store
from edge_sdk.agent.lock import AGGREGATOR, FolderLock, holder
from edge_sdk.config.run import RunSection
from edge_sdk.errors import ConfigError, MissingExtraError, StateError
from edge_sdk.transport.objects import ObjectStore

__all__ = ["StateFolder", "check_objects", "open_store"]

_DEFAULT = RunSection(name="any").state_dir


class StateFolder:
    """Paths below ``run.state_dir``. Nothing is made before ``lock``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = path / AGGREGATOR.database
        self.objects = path / "objects"
        self.partials = path / "partials"
        self.work = path / "work"
        self.trainer = path / "trainer"
        self.broker = path / "broker"
        self.broker_file = path / "broker.json"
        self._lock: FolderLock | None = None

    def lock(self) -> None:
        """Takes the folder for this process; made by us it is its user's alone.

        Raises StateError where another process has it or it cannot be made, and ConfigError where it is an
        agent's.
        """
        self.check_name()
        self._lock = FolderLock(self.path, AGGREGATOR)
        for folder in (self.objects, self.partials, self.work):
            folder.mkdir(mode=0o700, exist_ok=True)

    def check_name(self) -> None:
        """Raises ConfigError where the run began in ``state``, the default before this one."""
        before = self.path.with_name("state")
        if self.path.name != _DEFAULT or self.database.is_file():
            return
        if (before / AGGREGATOR.database).is_file():
            raise ConfigError(
                f"{AGGREGATOR.key}: the default is {_DEFAULT} now, and a run lies in {before}",
                'set state_dir = "state" under [run] to go on with it',
            )

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def holder(self) -> int | None:
        """The process that works in the folder; None: none does."""
        return holder(self.path, AGGREGATOR)


def open_store(folder: StateFolder, *, read_only: bool = False) -> Store:
    """The store of a state folder. Raises MissingExtraError without SQLAlchemy, StateError for no state.

    Read only, it raises ConfigError where the state is found under the default's former name.
    """
    try:
        from aggregator.state.sql import SqlStore, sqlite_url
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the aggregator needs {error.name}, which is not installed", "pip install 'edge-sdk[server]'"
        ) from error
    if read_only and not folder.database.is_file():
        folder.check_name()
        raise StateError(
            f"there is no run in {folder.path} yet", "start it with `edge-aggregator run --config run.toml`"
        )
    return SqlStore(sqlite_url(folder.database), read_only=read_only)


def check_objects(store: Store, objects: ObjectStore) -> None:
    """Raises StateError where a row names an object that is gone: what was accepted would be lost."""
    missing = sorted(digest for digest in store.objects() if not objects.has(digest))
    if missing:
        raise StateError(
            f"{len(missing)} accepted objects are missing in {objects.folder}, {missing[0][:12]} the first",
            "restore the folder from a backup; an aggregator never goes on without what it accepted",
        )
