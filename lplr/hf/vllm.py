"""The only door to vLLM: an out-of-tree plugin that serves compressed folders.

vLLM calls `register` in each of its processes through the entry point `vllm.general_plugins`; from then on it knows the
quant_method `lplr` of a folder's config.json.  vLLM joins q, k, v and gate, up into one layer; their packed parts have formats
of their own, so such a layer holds one `LowRankLinear` for each and joins what they give.  One process serves a model: no
tensor parallelism, no experts.
"""

# vLLM is no dependency: it is there where it calls this file
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lplr.errors import CheckpointError, UnsupportedModel
from lplr.factor import Format
from lplr.hf.quantizer import QUANT_METHOD, LplrConfig
from lplr.nn import LowRankLinear

_SHARDS = {"q": 0, "k": 1, "v": 2}  # how vLLM calls the parts of a joined q, k, v; of others it counts


def register() -> None:
    """Make vLLM know the quant_method; may be called again."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(_config_class())


def part_names(prefix: str, packed: Mapping[str, list[str]]) -> list[str]:
    """The names in the folder of the layers that vLLM's layer `prefix` is made of, in its order."""
    parent, _, last = prefix.rpartition(".")
    return [f"{parent}.{name}" if parent else name for name in packed.get(last, [last])]


class Parts(nn.Module):
    """The layers that one layer of vLLM is made of: x (..., d) -> (..., sum of n); a format of None is a dense one."""

    def __init__(self, names: list[str], formats: list[Format | None], sizes: list[int], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.names, self.dtype = names, dtype
        self.layers = nn.ModuleList(
            nn.Linear(width, n, bias=False, device="meta", dtype=dtype)
            if fmt is None
            else LowRankLinear(fmt, device="meta", dtype=dtype)
            for fmt, n in zip(formats, sizes, strict=True)
        )
        self.missing = {(i, key) for i, layer in enumerate(self.layers) for key in layer.state_dict()}

    def tensor_names(self) -> list[str]:
        """What the folder's tensors of these layers are called behind their layer's name, each once."""
        return list(dict.fromkeys(key for layer in self.layers for key in layer.state_dict()))

    def take(self, index: int, key: str, value: Tensor) -> None:
        """Put a tensor of the folder where it belongs; CheckpointError for one of another shape or type."""
        layer = self.layers[index]
        wanted = layer.state_dict().get(key)
        packed = isinstance(layer, LowRankLinear)
        if wanted is None or wanted.shape != value.shape or (packed and wanted.dtype != value.dtype):
            raise CheckpointError(
                f"{self.names[index]}.{key} is {value.dtype} {tuple(value.shape)}: config.json tells another format"
            )
        if packed:
            setattr(layer, key, value)
        else:
            layer.weight = nn.Parameter(value.to(self.dtype), requires_grad=False)
        self.missing.discard((index, key))

    def forward(self, x: Tensor) -> Tensor:
        found = [layer(x) for layer in self.layers]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _config_class() -> type:
    """The class that vLLM makes of config.json's quantization_config."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    method = _method_class()

    class LplrVllmConfig(QuantizationConfig):
        def __init__(self, formats: dict[str, Format]) -> None:
            super().__init__()
            self.formats = formats

        def get_name(self) -> str:
            return QUANT_METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return -1  # any device: what has no fast kernel runs the reference

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []  # it stands in config.json

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> LplrVllmConfig:
            if config.get("defused"):
                raise UnsupportedModel(
                    "mixtures of experts cannot be served by vLLM here: use transformers, or export --to dense"
                )
            return cls(LplrConfig(**config).formats())

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if not isinstance(layer, LinearBase):
                return None
            names = part_names(prefix, self.packed_modules_mapping)
            formats = [self.formats.get(name) for name in names]
            return method(names, formats) if any(formats) else UnquantizedLinearMethod()

    return LplrVllmConfig


def _method_class() -> type:
    """The class that gives a linear layer of vLLM its weights and its product."""
    from vllm.model_executor.layers.linear import LinearMethodBase

    class LplrLinearMethod(LinearMethodBase):
        def __init__(self, names: list[str], formats: list[Format | None]) -> None:
            self.names, self.formats = names, formats

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **_: Any,
        ) -> None:
            """An empty parameter for each name, whose loader takes the tensor of a part as it is."""
            if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
                raise UnsupportedModel(f"{self.names[0]}: packed weights cannot be split: serve with tensor_parallel_size=1")
            if len(output_partition_sizes) != len(self.names):
                raise UnsupportedModel(
                    f"{self.names[0]}: vLLM joins {len(output_partition_sizes)} layers here, {self.names} are known"
                )
            parts = Parts(self.names, self.formats, output_partition_sizes, input_size, params_dtype)
            object.__setattr__(layer, "_lplr_parts", parts)  # no submodule yet: the loader of vLLM goes by parameters
            for key in parts.tensor_names():
                empty = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
                empty.weight_loader = _loader(parts, key)  # type: ignore[attr-defined]
                layer.register_parameter(key, empty)

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """Put the parts in the place of the empty parameters."""
            parts: Parts = layer._lplr_parts  # type: ignore[assignment]
            if parts.missing:
                index, key = min(parts.missing)
                raise CheckpointError(f"tensor {parts.names[index]}.{key} is missing from the files: copy the folder again")
            for key in parts.tensor_names():
                delattr(layer, key)
            layer.lplr_parts = parts

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            y = layer.lplr_parts(x)  # type: ignore[operator]
            return y if bias is None else y + bias

    return LplrLinearMethod


def _loader(parts: Parts, key: str) -> Any:
    """vLLM's weight_loader of one name: the part is an argument in older versions, an attribute of the tensor in newer ones."""

    def load(param: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        which = shard if shard is not None else getattr(loaded, "shard_id", None)
        index = _SHARDS.get(which, which) if which is not None else 0  # type: ignore[arg-type]
        parts.take(int(index), key, loaded.to(param.device, copy=True))  # type: ignore[arg-type]

    return load
