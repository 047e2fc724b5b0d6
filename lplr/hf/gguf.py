"""GGUF files as a source of tensors: one tensor at a time, under its transformers name and in its transformers layout.

Names and the undoing of llama.cpp's layout
(the q/k permutation of Llama, norms stored as w + 1, experts stored apart) are those of transformers itself:
`modeling_gguf_pytorch_utils`, or `integrations.gguf` for the architectures that transformers moved there.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lplr.errors import CheckpointError, UnsupportedModel
from lplr.hf.gguf_header import Header, Stored, read_header
from lplr.hf.hostile import FAULTS, check_counts, first_line
from lplr.hf.weight_file import file_identity, reading

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CHUNK_WEIGHTS = 1 << 22  # weights unpacked at once: 16 MiB of float32 beside the result
# values of tokenizer.ggml.pre whose vocabularies were learned with every digit apart (llama.cpp splits on \p{N} first)
_DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# widths of experts that transformers leaves at the default of the config class
_EXPERT_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}

Finish = Callable[[str, dict[str, Tensor]], Tensor]  # (transformers name, {GGUF name: values}) -> the tensor


def gguf_config(path: str | Path) -> PretrainedConfig:
    """The transformers config that the metadata of a GGUF file describes."""
    path = Path(path)
    status = path.stat() if path.is_file() else None
    return deepcopy(_config(path, status.st_size if status else 0, status.st_mtime_ns if status else 0))


@lru_cache(maxsize=4)  # transformers walks the whole vocabulary for it, which takes seconds
def _config(path: Path, size: int, changed: int) -> PretrainedConfig:
    header = read_header(path)
    from transformers import AutoConfig

    experts = header.metadata.get(f"{header.architecture}.expert_count")
    if header.architecture == "llama" and experts:  # transformers would read Mixtral as a Llama without experts
        raise UnsupportedModel(f"{path}: a Mixtral GGUF ({experts} experts): give its safetensors checkpoint instead")
    check_counts(path, header.metadata)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (*FAULTS, OSError) as error:
        raise UnsupportedModel(
            f"{path}: transformers cannot read the GGUF architecture {header.architecture!r}: "
            "give its safetensors checkpoint instead"
        ) from error
    for key, field in _EXPERT_WIDTHS.items():
        width = header.metadata.get(f"{header.architecture}.{key}")
        if width and hasattr(config, field):
            setattr(config, field, width)
    return config


def gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the metadata of a GGUF file describes.

    transformers forgets that some vocabularies were learned with every digit apart (tokenizer.ggml.pre = smollm and
    its like): the step is put back before the byte-level one.
    """
    path = Path(path)
    pre = read_header(path).metadata.get("tokenizer.ggml.pre")
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (*FAULTS, OSError) as error:
        reason = first_line(error)
        raise UnsupportedModel(f"{path}: transformers cannot read the tokenizer of this GGUF file: {reason}") from error
    backend = tokenizer.backend_tokenizer
    if pre in _DIGIT_SPLITTING and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


class GgufSource:
    """Tensors of a GGUF file under their transformers names; each is unpacked when it is asked for.

    A tensor stored in blocks is reported and returned as float32, a matrix stored in half precision in its own type.
    Memory: the tensor, its unpermuted copy where the layout differs, and 16 MiB.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.header = read_header(self.path)
        config = gguf_config(self.path)
        model = _skeleton(config, self.path)
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        groups, self._finish = _mapping(self.header, config, model)
        self._groups = {name: parts for name, parts in groups.items() if name in self._shapes}

    def names(self) -> tuple[str, ...]:
        """Every tensor of the file that the model has a place for, sorted."""
        return tuple(sorted(self._groups))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the transformers layout."""
        self._parts(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """float16 or bfloat16 for a matrix stored so, float32 for all else."""
        kinds = {(part.type.name, len(part.shape) > 1) for part in self._parts(name).values()}
        half = {("F16", True): torch.float16, ("BF16", True): torch.bfloat16}
        return half.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor that `get` returns."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def get(self, name: str) -> Tensor:
        """Read and unpack one tensor."""
        parts = self._parts(name)
        return self._finished(name, {key: self._values(part) for key, part in parts.items()}, self._shapes[name])

    def part(self, name: str, index: int) -> Tensor:
        """Entry `index` along the first dimension; of stacked experts only that entry is read."""
        parts = self._parts(name)
        if not 0 <= index < self._shapes[name][0]:
            raise IndexError(f"{name} has no entry {index}")
        if any(len(part.shape) != 3 for part in parts.values()):
            return self.get(name)[index].clone()
        one = {key: self._values(_entry(part, index)) for key, part in parts.items()}
        return self._finished(name, one, (1, *self._shapes[name][1:]))[0]

    def identity(self) -> dict[str, Any]:
        """File name -> `file_identity`."""
        return {self.path.name: file_identity(self.path, self.header.data_start)}

    def _parts(self, name: str) -> dict[str, Stored]:
        if name not in self._groups:
            raise CheckpointError(f"{self.path}: holds no tensor {name}: is it a GGUF file of this model?")
        return {key: self.header.tensors[key] for key in self._groups[name]}

    def _finished(self, name: str, values: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        out = self._finish(name, values).to(self.dtype(name)).contiguous()
        if tuple(out.shape) != shape:
            raise CheckpointError(
                f"{self.path}: {name} has shape {tuple(out.shape)}, its metadata says {shape}: download the file again"
            )
        return out

    def _values(self, stored: Stored) -> Tensor:
        """The float32 values of one stored tensor, unpacked a slab of rows at a time."""
        from gguf.quants import dequantize

        if not _unpackable(stored.type):
            raise CheckpointError(f"{self.path}: the gguf package cannot unpack {stored.type.name}: give another quantization")
        out = torch.empty(stored.rows, stored.shape[-1])
        target = out.numpy()
        step = max(1, CHUNK_WEIGHTS // max(1, stored.shape[-1]))
        with reading(self.path, self.header.stamp) as file:
            file.seek(stored.offset)
            for row in range(0, stored.rows, step):
                rows = min(step, stored.rows - row)
                blob = np.frombuffer(file.read(rows * stored.row_bytes), dtype=np.uint8)
                if blob.size != rows * stored.row_bytes:
                    raise CheckpointError(f"{self.path}: shrank while it was read: download the file again")
                target[row : row + rows] = dequantize(blob.reshape(rows, stored.row_bytes), stored.type)
        return out.reshape(stored.shape)


@lru_cache
def _unpackable(kind: Any) -> bool:
    """Whether the gguf package unpacks a type, tried on one block of zeros: it has no list to ask."""
    from gguf import constants
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, constants.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _entry(stored: Stored, index: int) -> Stored:
    """Entry `index` along the first dimension, kept as a dimension of one."""
    size = stored.nbytes // stored.shape[0]
    return Stored((1, *stored.shape[1:]), stored.type, stored.row_bytes, stored.offset + index * size)


def _skeleton(config: PretrainedConfig, path: Path) -> PreTrainedModel:
    """The model of the config on meta: names and shapes, no memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except FAULTS as error:
        raise UnsupportedModel(f"{path}: {config.model_type} is not a causal language model: {first_line(error)}") from error


@dataclass(frozen=True)
class _Outline:
    """The parts of a model that `get_gguf_hf_weights_map` looks at, two levels deep.

    It would go down into every module and build the table of all names for each: minutes for a deep model, and the
    leaves add nothing.
    """

    config: PretrainedConfig
    tensors: dict[str, Tensor]
    children: tuple[tuple[str, _Outline], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Outline:
        inner = tuple((name, cls(model.config, child.state_dict())) for name, child in model.named_children())
        return cls(model.config, model.state_dict(), inner)

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def named_children(self) -> tuple[tuple[str, _Outline], ...]:
        return self.children


def _mapping(header: Header, config: PretrainedConfig, model: PreTrainedModel) -> tuple[dict[str, list[str]], Finish]:
    """Transformers name -> the GGUF tensors it is made of, and the function that makes it."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    if is_gguf_arch_supported(header.architecture):
        return _conversion_mapping(header, config)
    return _processor_mapping(header, config, model)


def _processor_mapping(header: Header, config: PretrainedConfig, model: PreTrainedModel) -> tuple[dict[str, list[str]], Finish]:
    """By the tensor processors of `modeling_gguf_pytorch_utils`."""
    from transformers import modeling_gguf_pytorch_utils as tools

    processor = tools.TENSOR_PROCESSORS.get(header.architecture, tools.TensorProcessor)(config=config.to_dict())
    try:
        table = tools.get_gguf_hf_weights_map(_Outline.of(model), processor)
    except NotImplementedError as error:
        if "model_type" not in str(error):  # what transformers says of a name that gguf does not know; anything else is a fault
            raise
        raise UnsupportedModel(f"gguf knows no tensor names of {config.model_type}: {error}") from error
    groups: dict[str, list[str]] = {}
    for key in header.tensors:
        name = table.get(key) or table.get(key.removesuffix(".weight"))  # stacked experts have no suffix in the table
        if name is not None:
            groups.setdefault(name, []).append(key)

    def finish(name: str, values: dict[str, Tensor]) -> Tensor:
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}  # where a processor leaves a tensor made of several
        for key, value in values.items():
            done = processor.process(weights=value.numpy(), name=key, tensor_key_mapping=table, parsed_parameters=parsed)
            if done.name is not None:
                return torch.from_numpy(done.weights)
        return parsed["tensors"][name]

    return groups, finish


def _conversion_mapping(header: Header, config: PretrainedConfig) -> tuple[dict[str, list[str]], Finish]:
    """By the weight conversions of `integrations.gguf`, the newer of transformers' two ways."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.gguf.utils import get_gguf_conversion_mapping

    transforms = get_gguf_conversion_mapping(header.architecture, config)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    owner = {pattern: t for t in converters for pattern in t.source_patterns}
    seen = deepcopy(transforms)  # asking for a name changes the state of a transform
    groups: dict[str, list[str]] = {}
    pattern_of: dict[str, str | None] = {}
    for key in header.tensors:
        name, pattern_of[key] = rename_source_key(
            key,
            [t for t in seen if isinstance(t, WeightRenaming)],
            [t for t in seen if isinstance(t, WeightConverter)],
        )
        groups.setdefault(name, []).append(key)

    def finish(name: str, values: dict[str, Tensor]) -> Tensor:
        found = {pattern_of[key]: value for key, value in values.items()}
        first = next(iter(found))
        if first is None:
            return found[None]
        converter = owner[first]
        work: Any = {p: [found[p]] for p in converter.source_patterns if p in found}
        for operation in converter.operations:
            work = operation.convert(
                work,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                config=config,
            )
        (value,) = work.values()
        return value[0] if isinstance(value, list) else value

    return groups, finish
