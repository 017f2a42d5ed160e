"""Where and how rows of hidden states are kept: their form in bytes, and shelves in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edge_sdk.planning.cost import PREFIX_GROUP
from edge_sdk.training.activations.kernels import pack_rows, row_bytes, unpack_rows

__all__ = ["DiskShelf", "KeptRows", "MemoryShelf", "RowForm", "Shelf", "on_disk"]

_HALF_MAX = 32768.0


class RowForm:
    """Hidden states of a row as bytes.

    ``exact``: as they are. ``fp16``: with a float32 scale a row, so that none overflows. ``int8``: groups of
    at most 64 values with scale and offset, as the activation store packs them, rounded to the nearest.
    """

    def __init__(self, name: str, like: Any) -> None:
        """``like``: hidden states (batch, ...) of the shape and dtype that all will have."""
        self.name = name
        self._shape, self._dtype = tuple(like.shape[1:]), like.dtype
        count = like[0].numel()
        self._group = next(g for g in range(min(PREFIX_GROUP, count), 0, -1) if self._shape[-1] % g == 0)
        if name == "exact":
            self.nbytes = count * like.element_size()
        elif name == "fp16":
            self.nbytes = 2 * count + 4
        elif name == "int8":
            self.nbytes = count // self._group * row_bytes(8, self._group)
        else:
            raise ValueError(f"hidden states have no form {name!r}")

    def encode(self, hidden: Any) -> Any:
        """(n, ...) -> (n, nbytes) uint8, in host memory."""
        flat = hidden.detach().reshape(len(hidden), -1)
        if self.name == "exact":
            return flat.contiguous().view(torch.uint8).cpu()
        if self.name == "int8":
            return pack_rows(flat.reshape(-1, self._group), 8).view(len(hidden), -1).cpu()
        scale = (flat.abs().amax(dim=1, keepdim=True).float() / _HALF_MAX).clamp(min=1.0)
        halves = (flat / scale).to(torch.float16)
        return torch.cat((halves.view(torch.uint8), scale.view(torch.uint8)), dim=1).cpu()

    def decode(self, coded: Any, device: Any) -> Any:
        """(n, nbytes) uint8 -> (n, ...) on ``device``, in the dtype that they had."""
        coded, shape = coded.to(device), (len(coded), *self._shape)
        if self.name == "exact":
            return coded.view(self._dtype).view(shape)
        if self.name == "int8":
            rows = coded.view(-1, row_bytes(8, self._group))
            return unpack_rows(rows, 8, self._group, self._dtype).view(shape)
        scale = coded[:, -4:].contiguous().view(torch.float32)
        values = coded[:, :-4].contiguous().view(torch.float16)
        return (values.float() * scale).to(self._dtype).view(shape)


class MemoryShelf:
    """Rows in host memory, which is taken as they come."""

    def __init__(self, rows: int, width: int) -> None:
        self.nbytes = rows * width
        self._rows = torch.empty((rows, width), dtype=torch.uint8)

    def write(self, slots: Any, coded: Any) -> None:
        """slots (n,), coded (n, width) uint8."""
        self._rows[slots] = coded

    def read(self, slots: Any) -> Any:
        return self._rows[slots]

    def close(self) -> None:
        self._rows = self._rows[:0].clone()


class DiskShelf:
    """Rows in a file that has no name: whatever ends this process gives its space back.

    Read and written by calls, not mapped: mapped pages would count as this process's memory.
    Raises OSError where the disk is too full.
    """

    def __init__(self, rows: int, width: int, folder: Path) -> None:
        self.nbytes = rows * width
        self._width = width
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "prefix.part"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        path.unlink()
        try:
            os.posix_fallocate(self._file, 0, max(1, self.nbytes))
        except OSError:
            self.close()
            raise

    def write(self, slots: Any, coded: Any) -> None:
        data = memoryview(coded.numpy()).cast("B")
        for i, slot in enumerate(slots.tolist()):
            part, place = data[i * self._width : (i + 1) * self._width], slot * self._width
            while part:
                written = os.pwrite(self._file, part, place)
                part, place = part[written:], place + written

    def read(self, slots: Any) -> Any:
        coded = torch.empty((len(slots), self._width), dtype=torch.uint8)
        data = memoryview(coded.numpy()).cast("B")
        for i, slot in enumerate(slots.tolist()):
            part, place = data[i * self._width : (i + 1) * self._width], slot * self._width
            while part:
                count = os.preadv(self._file, [part], place)
                if count == 0:
                    raise OSError("the file of kept hidden states ended early")
                part, place = part[count:], place + count
        return coded

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


Shelf = MemoryShelf | DiskShelf


def on_disk(folder: Path) -> Callable[[int, int], Shelf]:
    """Makes shelves in ``folder``."""
    return lambda rows, width: DiskShelf(rows, width, folder)


class KeptRows:
    """Hidden states of chosen rows, each from its first ``put`` on.

    Args:
        chosen: numbers of the rows that are kept, of ``rows`` in all.
    """

    def __init__(
        self, chosen: Any, rows: int, form: RowForm, shelf: Callable[[int, int], Shelf] = MemoryShelf
    ) -> None:
        self.nbytes = len(chosen) * form.nbytes
        self._form = form
        self._shelf = shelf(len(chosen), form.nbytes)
        self._slots = torch.full((rows,), -1, dtype=torch.int64)
        self._slots[chosen] = torch.arange(len(chosen))
        self._there = torch.zeros(rows, dtype=torch.bool)

    def has(self, rows: Any) -> Any:
        """(n,) bool."""
        return self._there[rows]

    def put(self, rows: Any, hidden: Any) -> None:
        """Keeps those of ``rows`` (n,) that were chosen; hidden (n, ...)."""
        wanted = self._slots[rows] >= 0
        rows = rows[wanted]
        if len(rows):
            self._shelf.write(self._slots[rows], self._form.encode(hidden[wanted.to(hidden.device)]))
            self._there[rows] = True

    def get(self, rows: Any, device: Any) -> Any:
        """Hidden states (n, ...) of rows that are there."""
        return self._form.decode(self._shelf.read(self._slots[rows]), device)

    def close(self) -> None:
        self._there.fill_(False)
        self._shelf.close()
