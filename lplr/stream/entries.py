"""Safetensors files, read one tensor at a time and trusted in nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.hf.weight_file import Stamp, reading, stamp_of
from lplr.stream.shards import DTYPE_NAMES

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMS = 16
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, type, shape, first byte; and what the file was like when its header was read."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    stamp: Stamp

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own; CheckpointError when the file cannot be read or is not what it was."""
        blob = torch.empty(self.nbytes, dtype=torch.uint8)
        view, done = blob.numpy().data, 0
        with reading(self.file, self.stamp) as file:
            file.seek(self.offset)
            while done < self.nbytes:  # a raw read may stop short, at 2 GiB at the latest
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.file}: shrank while it was read: download it again")
                done += count
        return blob.view(self.dtype).reshape(self.shape)

    def entry(self, index: int) -> Entry:
        """Entry `index` along the first dimension."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"no entry {index} in shape {self.shape}")
        size = self.nbytes // self.shape[0]
        return Entry(self.file, self.dtype, self.shape[1:], self.offset + index * size, self.stamp)


def read_entries(path: Path) -> dict[str, Entry]:
    """Name -> entry (dtype, shape, nbytes, read()) of one safetensors file; CheckpointError when it is damaged."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The entries of a safetensors file and the byte where its data begin; every offset checked against the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: download the checkpoint again")
    with reading(path) as file:
        stamp = stamp_of(file)
        size = stamp[0]
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        if size < 8 or size < 8 + length <= MAX_HEADER:
            raise CheckpointError(f"{path}: truncated, {size} bytes do not hold its header: download it again")
        raw = file.read(length) if length <= MAX_HEADER else b""
    start, at, entries = 8 + length, 0, {}
    for name, kind, shape, begin, end in _rows(path, raw):
        if kind not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has type {kind}, which cannot be read: convert it to F32 or BF16")
        if begin != at or end - begin != prod(shape) * _DTYPES[kind].itemsize:
            raise CheckpointError(f"{path}: damaged safetensors header at {name}: download it again")
        entries[name], at = Entry(path, _DTYPES[kind], shape, start + begin, stamp), end
    if start + at != size:
        state = "truncated" if size < start + at else "longer than its header says"
        raise CheckpointError(f"{path}: {state}, {size} bytes where {start + at} are expected: download it again")
    return entries, start


def _rows(path: Path, raw: bytes) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """(name, type, shape, begin, end) of every tensor of a header, in the order of the file."""
    damaged = CheckpointError(f"{path}: damaged safetensors header: download it again")
    try:
        table = json.loads(raw, object_pairs_hook=_unique)
        table.pop("__metadata__", None)
        rows = [(name, row["dtype"], tuple(row["shape"]), *row["data_offsets"]) for name, row in table.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    for row in rows:
        numbers = (*row[2], *row[3:])
        # bool is an int to Python, and too many dimensions are none of a weight
        if len(row) != 5 or len(row[2]) > MAX_DIMS or not isinstance(row[1], str):
            raise damaged
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise damaged
    return sorted(rows, key=lambda row: (row[3], row[4]))  # type: ignore[return-value]  # five each, as checked


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError when a key stands twice, of which each reader might take another."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
