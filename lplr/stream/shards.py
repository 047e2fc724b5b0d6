"""Files that appear whole or not at all: safetensors shards, the index, texts; and their checksums.

Every file is written beside its place under a hidden name, flushed to the disk, and moved into place by
a rename; a process killed at any moment leaves the old file, the new one, or none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lplr.errors import OutputError

INDEX = "model.safetensors.index.json"
CHUNK = 1 << 24
# torch type -> its name in a safetensors header
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, type)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def shard_name(index: int, shards: int) -> str:
    """File name of one shard, as transformers writes it."""
    return f"model-{index + 1:05d}-of-{shards:05d}.safetensors"


def write_shard(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    layout: Layout | None = None,
) -> str:
    """Write a safetensors file, one tensor in memory at a time, and return its SHA-256.

    The same tensors and metadata give the same bytes: tensors stand by item size (so that each is aligned) and
    name.  layout tells shape and type of each, so that tensors that are made when asked for are asked for once.
    Raises OutputError when the disk is full or the folder cannot be written.
    """
    layout = layout or {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    order, header, size = shard_header(layout, metadata)
    digest = hashlib.sha256(header)
    with _replacing(path, size) as file:
        file.write(header)
        for name in order:
            for piece in _pieces(tensors[name]):
                digest.update(piece)
                file.write(piece)
    return digest.hexdigest()


def shard_header(layout: Layout, metadata: Mapping[str, str] | None = None) -> tuple[list[str], bytes, int]:
    """The order of the tensors, the first bytes of their safetensors file, and the size of the whole file."""
    order = sorted(layout, key=lambda name: (-layout[name][1].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
    end = 0
    for name in order:
        shape, dtype = layout[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file in place of `path`; OutputError as for `write_shard`."""
    with _replacing(path, len(content)) as file:
        file.write(content)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text in place of `path`."""
    write_atomic(path, text.encode())


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a sharded checkpoint: tensor name -> file name, and the bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pieces(tensor: Tensor) -> Iterable[memoryview]:
    """The bytes of a tensor in row-major order, 16 MiB at a time."""
    if tensor.numel() == 0:
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK]


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and leaves nothing behind when it does not."""
    partial = path.with_name(f".{path.name}.partial")  # one name a target: a killed run's remains are overwritten
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise write_error(path, size, error) from error
    finally:
        with suppress(OSError):  # gone when all went well; a folder that cannot be written holds none
            partial.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the renaming itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(path: Path, size: int, error: OSError) -> OutputError:
    """What could not be written, the space there is, what to do; on one line."""
    if error.errno in _FULL:
        free = shutil.disk_usage(path.parent).free
        return OutputError(
            f"cannot write {path} ({size:,} bytes): the disk or the quota is full, {free:,} bytes are free: "
            "make room, then run the same command again to go on"
        )
    if error.errno in _DENIED:
        return OutputError(f"cannot write {path}: {error.strerror}: give an output folder that you may write to")
    if error.errno == errno.ENOENT:
        return OutputError(f"cannot write {path}: the folder {path.parent} does not exist: create it or give another")
    return OutputError(f"cannot write {path}: {error.strerror or error}: give another output folder")
