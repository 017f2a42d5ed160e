"""What the server needs beyond the core, asked for before it is imported."""

from __future__ import annotations

from importlib.util import find_spec

from edge_sdk.errors import MissingExtraError

__all__ = ["need_server_extra"]

_MODULES = ("sqlalchemy", "numpy", "safetensors")


def need_server_extra() -> None:
    """Raises MissingExtraError that names what is missing."""
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the aggregator needs what is not installed: {', '.join(missing)}",
            "pip install 'edge-sdk[server]'",
        )
