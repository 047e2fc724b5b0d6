"""Pickled weights of a folder, for those who say that they trust it: read by torch's restricted unpickler alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.hf.hostile import FAULTS, first_line
from lplr.hf.weight_file import file_identity

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PickleSource:
    """pytorch_model.bin, or the files of its index, as a `TensorSource`.

    `torch.load(weights_only=True)`: tensors and plain containers, no code.  The files are mapped: tensors are read when they are
    asked for.  Raises CheckpointError for a file that holds anything else.
    """

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self._files = folder, files
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            self._tensors.update(_unpickled(folder / file))

    def names(self) -> tuple[str, ...]:
        """Every tensor, sorted."""
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape."""
        return tuple(self._held(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type."""
        return self._held(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of what `get` returns."""
        return self._held(name).numel() * self.dtype(name).itemsize

    def get(self, name: str) -> Tensor:
        """A copy of one tensor."""
        return self._held(name).clone(memory_format=torch.contiguous_format)

    def part(self, name: str, index: int) -> Tensor:
        """A copy of entry `index` along the first dimension."""
        return self._held(name)[index].clone(memory_format=torch.contiguous_format)

    def identity(self) -> dict[str, Any]:
        """File name -> `file_identity`."""
        return {file: file_identity(self.folder / file, 0) for file in self._files}

    def _held(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: holds no tensor {name}: is it a checkpoint of this model?")
        return self._tensors[name]


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*FAULTS, OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: is no file of plain tensors ({first_line(error)}): convert it to safetensors where it can be trusted"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()):
        raise CheckpointError(f"{path}: holds more than named tensors: convert it to safetensors (save_pretrained)")
    if any(t.layout != torch.strided or t.is_meta for t in found.values()):
        raise CheckpointError(f"{path}: holds tensors that are not dense: convert it to safetensors (save_pretrained)")
    return found
