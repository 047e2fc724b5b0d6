"""GGUF files for llama.cpp: a model, one tensor in memory at a time, and a LoRA adapter.

Names come from the gguf package.  The rows of q and k of Llama stand in another order there, since llama.cpp rotates neighbouring
entries where transformers rotates halves; `permuted` and `restored` go both ways.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lplr.errors import UnsupportedModel, choose
from lplr.hf.gguf_vocabulary import write_vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MODEL, ADAPTER = "model.gguf", "lora.gguf"
# name on the command line -> GGMLQuantizationType: those that the gguf package can quantize to
TYPES = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q5_1": "Q5_1", "q5_0": "Q5_0", "q4_1": "Q4_1", "q4_0": "Q4_0"}
# model_type of transformers -> (architecture of llama.cpp, whether q and k are permuted)
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}


@dataclass(frozen=True)
class _Target:
    """How tensors of one model are called and laid out in GGUF."""

    architecture: str
    names: Any  # gguf.TensorNameMap
    heads: Mapping[str, int]  # end of a module's name -> heads of which its rows are permuted

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Target:
        import gguf

        if config.model_type not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise UnsupportedModel(
                f"{config.model_type} cannot be written to GGUF here: choose one of {known}, or export --to dense"
            )
        architecture, permutes = _ARCHITECTURES[config.model_type]
        kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        queries = config.num_attention_heads
        heads = {"q_proj": queries, "k_proj": getattr(config, "num_key_value_heads", None) or queries} if permutes else {}
        return cls(architecture, gguf.get_tensor_name_map(kind, config.num_hidden_layers), heads)

    def name(self, tensor: str) -> str:
        found = self.names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModel(f"{tensor} has no place in a GGUF file of {self.architecture}: export --to dense instead")
        return found

    def heads_of(self, tensor: str) -> int:
        """Heads of which the rows of a tensor are permuted; 0 for none."""
        return self.heads.get(tensor.rpartition(".")[0].rpartition(".")[2], 0)


def permuted(W: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: entry i of the first half of a head beside entry i of the second."""
    return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(W.shape) if heads else W


def restored(W: Tensor, heads: int) -> Tensor:
    """Inverse of `permuted`."""
    return W.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(W.shape) if heads else W


def write_model(
    path: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    matrices: Collection[str],
    kind: str,
    half: torch.dtype = torch.float16,
) -> None:
    """Write a model: the weights of the linear layers `matrices` as `kind` of TYPES, other matrices as `half`, vectors as F32.

    tensors are asked for once each, in the order of `shapes`.  A matrix whose rows are no whole number of blocks is stored as
    `half`.  Raises UnsupportedModel for an architecture, a tensor, a tokenizer or a rotary embedding that cannot be told.
    """
    import gguf

    chosen = gguf.GGMLQuantizationType[choose(TYPES, kind, "type of a GGUF matrix")]
    other = gguf.GGMLQuantizationType["BF16" if half == torch.bfloat16 else "F16"]
    target = _Target.of(config)
    writer = gguf.GGUFWriter(path, target.architecture)
    _write_facts(writer, config)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{chosen.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_vocabulary(writer, tokenizer, shapes[_embedding(shapes)][0])

    def type_of(name: str) -> Any:
        if len(shapes[name]) == 1:
            return gguf.GGMLQuantizationType.F32
        block, _ = gguf.GGML_QUANT_SIZES[chosen]
        return chosen if name.removesuffix(".weight") in matrices and shapes[name][-1] % block == 0 else other

    factors = _rope_factors(config)
    plan = [(target.name(name), shapes[name], type_of(name), name) for name in shapes]
    if factors is not None:
        plan.insert(0, ("rope_freqs.weight", tuple(factors.shape), gguf.GGMLQuantizationType.F32, ""))

    def values() -> Iterator[Tensor]:
        for _, _, _, name in plan:
            yield permuted(tensors[name].float(), target.heads_of(name)) if name else factors  # type: ignore[misc]

    _write(writer, [entry[:3] for entry in plan], values())


def write_adapter(path: Path, config: PretrainedConfig, low_rank: Iterable[tuple[str, Tensor, Tensor]]) -> int:
    """Write (layer, B (n, r), A (r, d)) as a LoRA adapter in F16; how many there are.

    alpha 0 tells llama.cpp that the adapter's factor is one, whatever its ranks.
    """
    import gguf

    target = _Target.of(config)
    writer = gguf.GGUFWriter(path, target.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    pairs = list(low_rank)
    kind = gguf.GGMLQuantizationType.F16
    plan, values = [], []
    for layer, left, right in pairs:
        name = target.name(f"{layer}.weight")
        for suffix, factor in (("lora_a", right), ("lora_b", permuted(left, target.heads_of(f"{layer}.weight")))):
            plan.append((f"{name}.{suffix}", tuple(factor.shape), kind))
            values.append(factor)
    _write(writer, plan, iter(values))
    return len(pairs)


def read_adapter(path: Path, config: PretrainedConfig, layers: Collection[str]) -> dict[str, Tensor]:
    """layer -> B A (n, d) float32 of an adapter that `write_adapter` wrote, rows in the order of transformers."""
    import gguf

    target = _Target.of(config)
    held = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in gguf.GGUFReader(path).tensors}
    out = {}
    for layer in layers:
        name = target.name(f"{layer}.weight")
        if f"{name}.lora_a" in held:
            out[layer] = restored(held[f"{name}.lora_b"], target.heads_of(f"{layer}.weight")) @ held[f"{name}.lora_a"]
    return out


def _write(writer: Any, plan: Iterable[tuple[str, tuple[int, ...], Any]], values: Iterator[Tensor]) -> None:
    """Header, metadata and the table first, then one tensor at a time."""
    import gguf
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape, quantize

    entries = list(plan)
    for name, shape, kind in entries:
        plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        width = 4 if kind == gguf.GGMLQuantizationType.F32 else 2
        stored = shape if plain else quant_shape_to_byte_shape(shape, kind)
        count = int(np.prod(stored)) * (width if plain else 1)
        dtype = np.dtype(np.float32 if width == 4 else np.float16) if plain else np.dtype(np.uint8)
        writer.add_tensor_info(name, stored, dtype, count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (_, _, kind), tensor in zip(entries, values, strict=True):
        writer.write_tensor_data(quantize(tensor.float().contiguous().numpy(), kind))
    writer.close()


def _embedding(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return next(name for name in shapes if name.endswith("embed_tokens.weight"))


def _write_facts(writer: Any, config: PretrainedConfig) -> None:
    """Sizes and constants of the architecture."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    writer.add_context_length(min(context, window) if window else context)  # within the window there is none to be seen
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope_factors(config: PretrainedConfig) -> Tensor | None:
    """What llama.cpp divides each frequency by where they are scaled one by one, as Llama 3 does."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] in ("default", "linear"):
        return None
    if rope["rope_type"] != "llama3":
        raise UnsupportedModel(
            f"rotary embeddings of type {rope['rope_type']} cannot be written to GGUF here: export --to dense instead"
        )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    return plain / scaled
