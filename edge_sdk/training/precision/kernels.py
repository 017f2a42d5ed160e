"""Who decodes int8 and NF4: bitsandbytes where it is installed, runs, and is quicker; torch everywhere else.

Both read the same bytes and give the same values. bitsandbytes is native code for some machines: it is tried
in a process of its own first, so that one that it does not run on (SIGILL, a missing CUDA library, an image
for another GPU) costs a reason, not the trainer.

Measured on a CPU with AVX-512, one thread, 16.8 M weights decoded: NF4 bitsandbytes 2.4 ms, torch 5.1; int8
bitsandbytes 5.2 ms, torch 2.1; a product with 1024 rows takes 370. So int8 is torch's there. Importing
bitsandbytes costs 1 s and 47 MB, which is why nothing is imported before an NF4 base is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from functools import cache
from typing import Any

import torch

__all__ = ["dequantize_int8", "dequantize_nf4", "implementation", "uses_bitsandbytes", "why_not"]

_log = logging.getLogger(__name__)

_TIMEOUT_S = 120.0
_QUICKER = {("nf4", "cpu"), ("nf4", "cuda"), ("int8", "cuda")}

_TRIAL = """
import json, logging, sys
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
device, levels = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
import bitsandbytes
from bitsandbytes.cextension import lib
if "Mock" in type(lib).__name__:
    sys.exit("its native library does not load here")
scales = torch.ones(8, dtype=torch.float32, device=device)
codes = torch.arange(256, dtype=torch.uint8, device=device)
pairs = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, 64, "nf4", (8, 64), torch.float32)
table = torch.tensor(levels)
if not torch.equal(pairs.cpu().flatten(), torch.stack([table.repeat_interleave(16), table.repeat(16)], 1).flatten()):
    sys.exit("its NF4 is another than it should be")
table = torch.arange(-128.0, 128.0)
bytes = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales[:4], table.to(device), 64, torch.float32)
if not torch.equal(bytes.cpu(), table):
    sys.exit("its int8 is another than it should be")
print(bitsandbytes.__version__)
"""  # noqa: E501


def implementation(word: str, device: Any) -> str:
    """What decodes ``word`` on ``device``: ``torch``, or ``bitsandbytes`` with its version."""
    return f"bitsandbytes {_trial(device.type)[0]}" if uses_bitsandbytes(word, device) else "torch"


def uses_bitsandbytes(word: str, device: Any) -> bool:
    """Whether bitsandbytes decodes ``word`` on ``device``. The first question tries it out, in seconds."""
    return (word, device.type) in _QUICKER and why_not(word, device) is None


def why_not(word: str, device: Any) -> str | None:
    """Why bitsandbytes does not decode ``word`` on ``device``; None: it does."""
    if (word, device.type) not in _QUICKER:
        return f"torch decodes {word} on {device.type} at least as quickly"
    return _trial(device.type)[1]


@cache
def _trial(kind: str) -> tuple[str, str | None]:
    """Version, and why it does not run."""
    from edge_sdk.training.precision.nf4 import LEVELS

    if importlib.util.find_spec("bitsandbytes") is None:
        return "", "it is not installed"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _TRIAL, json.dumps([kind, LEVELS])],
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"it could not be tried: {type(error).__name__}"
    if tried.returncode == 0:
        return tried.stdout.split()[-1], None
    last = (tried.stderr.strip().splitlines() or ["no word said"])[-1][:300]
    reason = f"killed by signal {-tried.returncode}" if tried.returncode < 0 else last
    _log.warning("bitsandbytes is not used on %s: %s", kind, reason)
    return "", reason


@cache
def _operators() -> Any:
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it tells of kernels that nothing here would use
    try:
        import bitsandbytes  # noqa: F401 - registers them
    finally:
        logger.setLevel(before)
    return torch.ops.bitsandbytes


def dequantize_nf4(codes: Any, scales: Any, block: int, dtype: Any) -> Any:
    """(rows, bytes) -> (rows, 2 bytes)."""
    shape = (codes.shape[0], 2 * codes.shape[1])
    return _operators().dequantize_4bit(codes.contiguous(), scales.contiguous(), block, "nf4", shape, dtype)


def dequantize_int8(codes: Any, scales: Any, block: int, dtype: Any) -> Any:
    """(rows, values) -> the same."""
    return _operators().dequantize_blockwise(
        codes.contiguous(), scales.contiguous(), _integers(codes.device), block, dtype
    )


@cache
def _integers(device: Any) -> Any:
    return torch.arange(-128, 128, dtype=torch.float32, device=device)
