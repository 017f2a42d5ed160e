"""Digests of big files, kept on disk so that a base of gigabytes is read once and not at every start."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from edge_sdk.protocol.base import Digest

__all__ = ["DigestCache"]

_log = logging.getLogger(__name__)
_MOST = 32
_decoder = msgspec.json.Decoder(dict[str, Digest])


class DigestCache:
    """A small JSON file in ``folder``; keys name path, size and mtime of what was read.

    It is only a cache: a damaged file is told in the log and made anew, one that cannot be written is told.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / "base-digests.json"

    def get(self, key: str) -> Digest | None:
        return self._entries().get(key)

    def put(self, key: str, digest: Digest) -> None:
        if self._file is None:
            return
        entries = self._entries()
        entries.pop(key, None)
        entries[key] = digest
        kept = dict(list(entries.items())[-_MOST:])
        new = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(msgspec.json.encode(kept))
            new.replace(self._file)
        except OSError as error:
            _log.warning("the digest of the base cannot be kept in %s: %s", self._file, error.strerror)

    def _entries(self) -> dict[str, Digest]:
        if self._file is None:
            return {}
        try:
            return _decoder.decode(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _log.warning("%s is not used: %s", self._file, error)
            return {}
