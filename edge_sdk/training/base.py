"""Where the base model is, and on what to compute: the two things a setup leaves to this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from edge_sdk.data.base_files import check_whole, find_base
from edge_sdk.errors import BaseModelError

__all__ = ["compute_device", "gpu_uuid", "local_base"]

_FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.model", "bpe.codes")


def local_base(base: str, check: Callable[[], None] = lambda: None) -> Path:
    """The folder of the base: a local one, the hub cache's, or fetched from the hub where it is a hub id.

    A local folder makes the Hugging Face libraries stay offline. ``check`` is called every second of a
    fetch; raises to end the waiting: what is there by then need not be fetched again. Raises BaseModelError.
    """
    try:
        folder = find_base(base)
        if not Path(base).expanduser().exists():
            check_whole(folder)  # a fetch that was cut short leaves a folder without its weights
    except BaseModelError as missing:
        if Path(base).expanduser().is_absolute() or base.startswith((".", "~")) or base.count("/") > 1:
            raise
        return _fetch(base, missing, check)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    return folder


def _fetch(hub_id: str, missing: BaseModelError, check: Callable[[], None]) -> Path:
    from huggingface_hub import snapshot_download

    fetched: Future[str] = Future()

    def fetch() -> None:
        try:
            # safetensors and text only: a pickle can run any code
            fetched.set_result(snapshot_download(hub_id, allow_patterns=list(_FILES)))
        except BaseException as error:
            fetched.set_exception(error)

    threading.Thread(target=fetch, name="fetch", daemon=True).start()
    while not wait([fetched], timeout=1.0).done:
        check()
    try:
        return Path(fetched.result())
    except Exception as error:  # the hub's and the connection's errors have no common base
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BaseModelError(f"{missing.message}, and cannot be fetched: {reason}", missing.hint) from error


def compute_device(wanted: str) -> Any:
    """The torch device that ``auto``, ``cpu`` or ``cuda:N`` stands for here.

    ``auto`` takes the first CUDA device and falls to the CPU. Raises BaseModelError where CUDA is asked
    for by name and not there.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not there):
        return torch.device("cpu")
    index = int(wanted.partition(":")[2] or 0)
    if index >= there:
        what = (
            f"this machine has {there} CUDA devices"
            if there
            else f"torch {torch.__version__} sees no CUDA device"
        )
        raise BaseModelError(
            f"trainer.device is {wanted}, and {what}",
            "set trainer.device to auto or cpu, or install a torch built for this GPU",
        )
    return torch.device("cuda", index)


def gpu_uuid(device: Any) -> str:
    """``GPU-...``, the driver's own name of a CUDA device; empty where it is none, or torch does not tell."""
    import torch

    if device.type != "cuda":
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # since torch 2.5
    return "" if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"
