"""A compressed folder as engines without packing read it: dense tensors by the model's names, each made when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.factor import Factorization, Format
from lplr.hf.quantizer import QUANT_METHOD, LplrConfig
from lplr.hf.skeleton import load_config, skeleton
from lplr.nn.swap import is_conv1d
from lplr.stream.shards import Layout
from lplr.stream.source import open_source

if TYPE_CHECKING:
    from lplr.hf.skeleton import PretrainedConfig


class Unpacked(Mapping[str, Tensor]):
    """Name -> tensor of the dense model that a compressed folder stands for; tied tensors once.

    Floating types become `dtype`.  config is that of the model, without its quantization.  Experts that were split are one tensor
    again.  Raises CheckpointError for a folder that holds no compressed model or lacks a tensor.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder, self.dtype = folder, dtype
        self.config: PretrainedConfig = load_config(folder)
        fields: Any = getattr(self.config, "quantization_config", None) or {}
        if fields.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"{folder} holds no model that lplr compressed: give a folder that `lplr compress` wrote")
        self.formats: dict[str, Format] = LplrConfig(**fields).formats()
        delattr(self.config, "quantization_config")
        self.source = open_source(folder)
        self._held = frozenset(self.source.names())
        net = skeleton(self.config)
        tied = {name for name in getattr(net, "all_tied_weights_keys", None) or {} if name not in self._held}
        self._shapes = {name: tuple(t.shape) for name, t in net.state_dict().items() if name not in tied}
        self.transposed = {name for name in self.formats if self._is_conv1d(net, name)}

    @staticmethod
    def _is_conv1d(net: torch.nn.Module, name: str) -> bool:
        try:
            return is_conv1d(net.get_submodule(name))
        except AttributeError:  # an expert, which the model holds in one tensor with the others
            return False

    @property
    def layout(self) -> Layout:
        """Name -> (shape, type) of every tensor, without making one."""
        return {name: (shape, self._type(name)) for name, shape in self._shapes.items()}

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type in which the folder holds a tensor that is not compressed; float32 for one that is."""
        return self.source.dtype(name) if name in self._held else torch.float32

    def factorization(self, layer: str) -> Factorization:
        """The packed value of one matrix."""
        fmt = self.formats[layer]
        return Factorization.from_tensors(fmt, {part: self.source.get(f"{layer}.{part}") for part in fmt.layout()})

    def matrix(self, layer: str) -> Tensor:
        """What stands in the place of one compressed matrix (n, d), float32."""
        return self.factorization(layer).dequantize()

    def __getitem__(self, name: str) -> Tensor:
        found = self._plain(name)
        if tuple(found.shape) != self._shapes[name]:
            raise CheckpointError(f"{name} is {tuple(found.shape)}, {self._shapes[name]} expected: copy the folder again")
        return found.to(self._type(name)) if found.is_floating_point() else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _type(self, name: str) -> torch.dtype:
        held = self.source.dtype(name) if name in self._held else self.dtype
        return self.dtype if held.is_floating_point else held

    def _plain(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer in self.formats:
            W = self.matrix(layer)
            return W.T.contiguous() if layer in self.transposed else W
        if name in self._held:
            return self.source.get(name)
        experts, _, leaf = name.rpartition(".")
        count = self._shapes[name][0] if self._shapes[name] else 0
        first = f"{experts}.0.{leaf}"
        if first not in self.formats and f"{first}.weight" not in self._held:
            raise CheckpointError(f"{self.folder} holds no tensor {name}: copy the folder again, or compress the model again")
        # one expert at a time, so that the float32 forms never stand side by side
        return torch.stack([self._plain(f"{experts}.{e}.{leaf}.weight").to(self.dtype) for e in range(count)])


class Backbone(Unpacked):
    """The same with Q alone in the place of each compressed matrix, in the bases of the model; zero where there is no Q."""

    def matrix(self, layer: str) -> Tensor:
        """P Q O^T (n, d), float32."""
        q, _, _ = self.factorization(layer).plain_parts()
        return torch.zeros(self.formats[layer].shape) if q is None else q

    def low_rank(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer, P L (n, r), R O^T (r, d)), float32, of every matrix that has them."""
        for layer, fmt in self.formats.items():
            if fmt.rank:
                _, left, right = self.factorization(layer).plain_parts()
                assert left is not None and right is not None
                yield layer, left, right
