"""A base's tensors, read one at a time into memory of their own, under the names that the model has for them.

Nothing is mapped: pages of a mapped file count as the process's memory for as long as it likes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_sdk.data.base_files import weight_files
from edge_sdk.data.tensor_files import Tensor, read_header
from edge_sdk.errors import BaseModelError

__all__ = ["Checkpoint", "Entry", "assign_names"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_LEGACY = ((re.compile(r"\bgamma$"), "weight"), (re.compile(r"\bbeta$"), "bias"))
_CONSTANTS = re.compile(
    r"(^|\.)(position_ids|masked_bias|rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.bias)$"
)
"""What older checkpoints hold although the code computes it."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint: where it lies."""

    path: Path
    tensor: Tensor

    @property
    def dtype(self) -> Any:
        """torch's. Raises BaseModelError."""
        dtype = _DTYPES.get(self.tensor.dtype)
        if dtype is None:
            raise BaseModelError(
                f"base model {self.path}: tensor {self.tensor.name!r} is of dtype {self.tensor.dtype}, "
                "which is a packed format that is not read here",
                "take the model's fp32, bf16 or fp16 weights; base precision is chosen on the device",
            )
        return dtype

    def read(self) -> Any:
        """Its values, of the dtype and shape of the file. Raises BaseModelError."""
        values = torch.empty(self.tensor.shape, dtype=self.dtype)
        view = memoryview(values.view(-1).view(torch.uint8).numpy())
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.tensor.begin)
            filled = 0
            while filled < self.tensor.size:
                count = file.readinto(view[filled:])
                if not count:
                    raise BaseModelError(
                        f"base model {self.path}: ends early, in tensor {self.tensor.name!r}",
                        "fetch it again",
                    )
                filled += count
        return values

    def digest(self) -> bytes:
        """sha256 of its bytes."""
        hasher = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(self.tensor.begin)
            left = self.tensor.size
            while left and (block := file.read(min(left, 1 << 20))):
                hasher.update(block)
                left -= len(block)
        return hasher.digest()


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a base, of one file or of many, by their names there."""

    folder: Path
    entries: dict[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises BaseModelError: no safetensors, a damaged file, or a name that two files hold."""
        entries: dict[str, Entry] = {}
        for path in weight_files(folder):
            for tensor in read_header(path).tensors:
                if tensor.name in entries:
                    raise BaseModelError(f"base model {path}: repeats the tensor {tensor.name!r}")
                entries[tensor.name] = Entry(path, tensor)
        return cls(folder, entries)


def assign_names(checkpoint: Checkpoint, net: Any, places: Iterable[str]) -> dict[str, Entry]:
    """Entries by the model's own names, in the order of the file.

    Names are taken as they are, with the renamings that transformers makes on loading (older names, and those
    that it keeps for a family), and with or without the base model's prefix: a checkpoint may be of the bare
    base model, or of one with another head.

    Raises:
        BaseModelError: weights of the base model have no place in ``net``, or two claim the same.
    """
    wanted = set(places)
    prefix = net.base_model_prefix + "."
    bare = not any(name.startswith(prefix) for name in checkpoint.entries)
    renamed = _family_names(net, checkpoint.entries)
    found: dict[str, Entry] = {}
    strange = []
    for name, entry in checkpoint.entries.items():
        options = dict.fromkeys(
            option
            for known in (renamed[name], name)
            for plain in (known, _modern(known))
            for option in (plain, prefix + plain, plain.removeprefix(prefix))
        )
        place = next((option for option in options if option in wanted), None)
        if place is None:
            if (bare or name.startswith(prefix)) and not _dispensable(name, net):
                strange.append(name)
        elif place in found:
            raise BaseModelError(
                f"the checkpoint in {checkpoint.folder} has two tensors for {place}: "
                f"{found[place].tensor.name} and {name}"
            )
        else:
            found[place] = entry
    if strange:
        raise BaseModelError(
            f"a {type(net).__name__} has no place for {len(strange)} tensors of the checkpoint in "
            f"{checkpoint.folder}: {', '.join(strange[:3])}",
            "config.json belongs to another model, or the family's weights are put together from several "
            "tensors on loading (experts are), which is not supported",
        )
    return found


def _modern(name: str) -> str:
    for old, new in _LEGACY:
        name = old.sub(new, name)
    return name


def _dispensable(name: str, net: Any) -> bool:
    """Whether the model does well without a tensor: constants, a pooler or a head that this net lacks."""
    prefix = net.base_model_prefix + "."
    ignored = getattr(net, "_keys_to_ignore_on_load_unexpected", None) or ()
    top = name.removeprefix(prefix).split(".", 1)[0]
    return (
        _CONSTANTS.search(name) is not None
        or any(re.search(pattern, name) for pattern in ignored)
        or top in ("pooler", "cls", "classifier", "lm_head", "score", "qa_outputs")
    )


def _family_names(net: Any, names: Iterable[str]) -> dict[str, str]:
    """Names after the renamings that this transformers keeps for the family; older ones keep none."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:
        return {name: name for name in names}
    renamings = [each for each in get_model_conversion_mapping(net) if isinstance(each, WeightRenaming)]
    return {name: apply_renamings(name, renamings) for name in names}
