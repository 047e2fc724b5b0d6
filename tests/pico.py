"""Models of a few thousand weights, made from configurations in code, and random compressed forms of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lplr.factor.factorization import Factorization
from lplr.quant.qtensor import QTensor

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 67, 24, 40, 3, 4, 2

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 6}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 1}

# architecture -> (model_type, settings that differ from _COMMON)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "qwen2": (
        "qwen2",
        {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_MOE, "num_experts": 5, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "num_experts": 5, "norm_topk_prob": True}),
    "gpt2": ("gpt2", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}),
    "opt": ("opt", {"ffn_dim": INNER, "word_embed_proj_dim": 16}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {"n_layer": LAYERS, "n_head": HEADS}),
    "gptj": ("gptj", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "rotary_dim": 4}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "sliding_window": 5}),
}
_OWN_SIZES = ("gpt2", "gptj", "bloom")  # whose configuration names sizes its own way


def config(architecture: str, **changes: Any) -> Any:
    """The configuration of a pico model."""
    from transformers import AutoConfig

    kind, settings = CONFIGS[architecture]
    names = ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")
    if kind in ("gpt2", "gptj"):
        names = tuple(name for name in names if name != "hidden_size")
    common = {name: _COMMON[name] for name in names} if kind in _OWN_SIZES else _COMMON
    return AutoConfig.for_model(kind, **{**common, **settings, **changes})


def model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random pico model in eval mode, float32; weights and biases are drawn from a generator, never zero."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        made = AutoModelForCausalLM.from_config(config(architecture, **changes), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.3 if parameter.dim() > 1 else parameter.data + 0.1 * noise
    return made


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    """Token ids (batch, length), without padding."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_qtensor(
    n: int, d: int, bits: int, generator: torch.Generator, *, row: int | None, col: int | None
) -> QTensor:
    """Random codes and positive scales; row and col are the scales' lengths, None for none."""
    codes = torch.randint(0, 1 << bits, (n, d), generator=generator, dtype=torch.uint8)

    def scale(length: int | None) -> Tensor | None:
        return None if length is None else (torch.rand(length, generator=generator) * 0.1 + 0.05).to(torch.bfloat16)

    return QTensor.from_codes(codes, bits, scale(row), scale(col))


def random_factorization(
    n: int, d: int, rank: int, generator: torch.Generator, bits: tuple[int, int, int] = (2, 3, 0)
) -> Factorization:
    """Random L, R and, where bits (of L, R, Q) ask for it, Q; rank 0 gives Q alone."""
    l_bits, r_bits, q_bits = bits
    q = random_qtensor(n, d, q_bits, generator, row=n, col=d) if q_bits else None
    if not rank:
        return Factorization(q=q)
    left = random_qtensor(n, rank, l_bits, generator, row=n, col=None)
    right = random_qtensor(rank, d, r_bits, generator, row=rank, col=d)
    return Factorization(left, right, q)


def compress(made: Any, seed: int = 3, skip: tuple[str, ...] = ("lm_head",)) -> tuple[Any, dict[str, Factorization]]:
    """Swap random factorizations into every linear layer of a model, in place; experts are split first."""
    from lplr.nn import defuse, linears, swap, weight_of

    defused = defuse(made)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for i, (name, module) in enumerate(linears(made, skip).items()):
        n, d = weight_of(module).shape
        factors[name] = random_factorization(
            n, d, (5, 3, 0)[i % 3], generator, ((2, 3, 0), (1, 4, 2), (0, 0, 3))[i % 3]
        )
    biases = {name: getattr(made.get_submodule(name), "bias", None) for name in factors}
    for name, module in swap(made, {name: f.format for name, f in factors.items()}).items():
        module.load_factorization(factors[name])
        if biases[name] is not None:
            module.bias.data = biases[name].detach().clone()
    made.lplr_defused = bool(defused)
    return made, factors


def densify(made: Any, factors: dict[str, Factorization]) -> Any:
    """Replace the weights of a dense model (its experts split) by dequantized factors, in place."""
    from lplr.nn import defuse, weight_of

    defuse(made)
    for name, f in factors.items():
        weight_of(made.get_submodule(name)).copy_(f.dequantize())
    return made


def write_compressed(made: Any, folder: Path, **extra: Any) -> Path:
    """Save a swapped model as a compressed folder: what the driver writes, in the plainest way."""
    from lplr.nn import LowRankLinear

    folder.mkdir(parents=True, exist_ok=True)
    tied = set(made.all_tied_weights_keys)
    save_file(
        {k: v.contiguous() for k, v in made.state_dict().items() if k not in tied},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    layers = {name: m.format.to_dict() for name, m in made.named_modules() if isinstance(m, LowRankLinear)}
    entry = made.config.to_dict()
    entry.update(architectures=[type(made).__name__], dtype="float32")
    entry["quantization_config"] = {
        "quant_method": "lplr",
        "format_version": 1,
        "layers": layers,
        "modules_to_not_convert": ["lm_head"],
        "defused": made.lplr_defused,
        **extra,
    }
    (folder / "config.json").write_text(json.dumps(entry, indent=1))
    return folder
