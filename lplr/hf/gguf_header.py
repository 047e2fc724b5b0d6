"""The header of a GGUF file, read with every length checked against the file."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from lplr.errors import CheckpointError
from lplr.hf.weight_file import Stamp, reading, stamp_of

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_DIMS = 4  # GGML_MAX_DIMS
# value type of the metadata -> its struct format; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """One tensor of the file: its shape in torch order, its ggml type, and where its bytes lie."""

    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    row_bytes: int
    offset: int  # from the start of the file

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Header:
    """The metadata scalars and strings of a GGUF file (arrays are skipped), and its tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    data_start: int
    stamp: Stamp  # of the file when its header was read

    @property
    def architecture(self) -> str:
        """general.architecture."""
        return self.metadata["general.architecture"]


class _Cursor:
    """Reads forward through the header; never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size, self.at = file, path, size, 0

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF header ({why}): download the file again")

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise CheckpointError(f"{self.path}: truncated, its header ends after {self.size} bytes: download it again")
        self.at += count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            self.take(count)
        self.at += count
        self.file.seek(self.at)

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def string(self) -> str:
        (length,) = self.numbers("Q")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("a name is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """One metadata value; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged(f"unknown value type {kind}")
        element, count = self.numbers("IQ")
        if element in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                self.skip(self.numbers("Q")[0])
        else:
            raise self.damaged(f"array of type {element}")
        return None


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; CheckpointError when it is damaged, truncated or split over files."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: check the path of the GGUF file")
    with reading(path) as raw:
        stamp = stamp_of(raw)
        cursor = _Cursor(BufferedReader(raw), path, stamp[0])
        if cursor.file.read(4) != MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file (no GGUF magic): give a .gguf file or a safetensors folder")
        cursor.at = 4
        version, tensor_count, metadata_count = cursor.numbers("IQQ")
        if version not in VERSIONS:
            raise CheckpointError(f"{path}: GGUF version {version}, expected 2 or 3: convert it with a recent llama.cpp")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = cursor.string()
            if key in metadata:
                raise cursor.damaged(f"{key} stands twice")
            metadata[key] = cursor.value(*cursor.numbers("I"))
        table: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensor_count):
            name = cursor.string()
            (dims,) = cursor.numbers("I")
            if dims > MAX_DIMS:
                raise cursor.damaged(f"{name} has {dims} dimensions")
            shape = cursor.numbers(f"{dims}Q")[::-1]  # ggml counts the fastest dimension first
            table.append((name, shape, *cursor.numbers("IQ")))
    if not isinstance(metadata.get("general.architecture"), str):
        raise cursor.damaged("no general.architecture")
    if metadata.get("split.count") not in (None, 0, 1):
        raise CheckpointError(f"{path}: one part of a split GGUF: merge the parts with `llama-gguf-split --merge` first")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise cursor.damaged(f"alignment {alignment}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            raise cursor.damaged(f"{name} stands twice")
        tensors[name] = _stored(cursor, name, shape, kind, start + offset)
    _check_apart(cursor, tensors)
    return Header(metadata, tensors, start, stamp)


def _check_apart(cursor: _Cursor, tensors: dict[str, Stored]) -> None:
    """CheckpointError when two tensors share bytes."""
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (first, a), (second, b) in pairwise(ordered):
        if a.offset + a.nbytes > b.offset:
            raise cursor.damaged(f"{first} and {second} overlap")


def _stored(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
    """Check one line of the tensor table against the file."""
    from gguf import constants

    try:
        ggml_type = constants.GGMLQuantizationType(kind)
        block, block_bytes = constants.GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise CheckpointError(f"{cursor.path}: {name} has the unknown type {kind}: pip install -U gguf") from None
    if not shape or not all(shape) or shape[-1] % block:
        raise cursor.damaged(f"{name} has shape {shape}, blocks of {block}")
    stored = Stored(shape, ggml_type, shape[-1] // block * block_bytes, offset)
    if offset + stored.nbytes > cursor.size:
        need = offset + stored.nbytes
        raise CheckpointError(
            f"{cursor.path}: truncated: {name} ends at byte {need}, the file has {cursor.size}: download it again"
        )
    return stored
