"""Safetensors shards and their index, written whole or not at all (`lplr.files`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lplr.files import replacing, write_text_atomic

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
    with replacing(path, size) as file:
        file.write(header)
        for name in order:
            for piece in pieces(tensors[name]):
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


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a sharded checkpoint: tensor name -> file name, and the bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def pieces(tensor: Tensor) -> Iterable[memoryview]:
    """The bytes of a tensor in row-major order, 16 MiB at a time."""
    if tensor.numel() == 0:
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK]
