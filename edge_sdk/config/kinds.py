"""Kinds of values that config files hold beyond plain text: paths, which loading makes absolute."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["BasePath", "FilePath", "FolderPath"]


def _path(kind: str, description: str) -> msgspec.Meta:
    return msgspec.Meta(min_length=1, max_length=4096, description=description, extra={"path": kind})


FilePath = Annotated[str, _path("file", "the path of a file that exists")]
FolderPath = Annotated[str, _path("folder", "the path of a folder")]
"""Made where it does not exist yet."""
BasePath = Annotated[str, _path("base", "a folder with a base model, or a hub id such as org/name")]
"""Absolute where such a folder exists; otherwise a hub id stays as it is."""
