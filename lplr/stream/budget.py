"""A budget as people think of it, the size of a folder or the memory of a device, told as bits per compressed weight.

    size(bits)  =  dense tensors + compressed ones + headers + tokenizer + records
    fit(bits)   =  all tensors + keys and values of `context` tokens in 16 bits + work space

where the work space is the widest activations of `context` tokens going in and out, one row of logits in float32, and the largest
matrix unpacked, as `nn.LowRankLinear` without a fused kernel does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import floor, prod
from typing import Any

from lplr.errors import RecipeError, UnsupportedModel
from lplr.hf.export import tokenizer_files
from lplr.recipe import Recipe
from lplr.stream.checkpoint import Checkpoint, LayerPlan, plan_layers
from lplr.stream.estimate import weight_files

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
HALF = 2  # bytes of a number in 16 bits
LEAST, MOST = 0.1, 8.0  # bits per weight
GRAIN = 1000  # a budget is rounded down to whole thousandths of a bit
RECORD, FOLDER = 6 << 10, 64 << 10  # bytes of a matrix in run.jsonl, the index and config.json; of card and settings (allowances)


def parse_size(text: str) -> int:
    """Bytes of `2GiB`, `700 MB` or `123456`; RecipeError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].upper() if found else "?"
    if not found or unit not in UNITS or not float(found[1]) * UNITS[unit] >= 1:
        raise RecipeError(f"{text!r} is no size: write a number and a unit, such as 2GiB, 700MB or 1500000000")
    return int(float(found[1]) * UNITS[unit])


def bits_for_size(checkpoint: Checkpoint, recipe: Recipe, size: int) -> float:
    """The largest budget with which the folder takes at most `size` bytes.

    RecipeError when nothing does, and says what the least is.
    """
    files = sum(map(len, tokenizer_files(checkpoint.path).values())) + FOLDER

    def folder(plans: list[LayerPlan]) -> int:
        return sum(weight_files(checkpoint, plans).values()) + files + RECORD * len(plans)

    return _largest(checkpoint, recipe, size, folder, "a folder")


def bits_for_memory(checkpoint: Checkpoint, recipe: Recipe, memory: int, context: int) -> float:
    """The largest budget with which weights, cache and work space for `context` tokens take at most `memory` bytes.

    RecipeError when nothing does, UnsupportedModel when the configuration does not tell the size of the cache.
    """
    extra = cache_bytes(checkpoint.config.get_text_config(), context) + _work_bytes(checkpoint, recipe, context)
    return _largest(checkpoint, recipe, memory, lambda plans: sum(weight_files(checkpoint, plans).values()) + extra, "the device")


def cache_bytes(config: Any, context: int) -> int:
    """Keys and values of `context` tokens in all layers, 16 bits each."""
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not heads or not layers or not hidden:
        raise UnsupportedModel("the configuration does not tell heads, layers and hidden size: give --bits or --size, not --fit")
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or hidden // heads
    return 2 * layers * key_heads * width * context * HALF


def _work_bytes(checkpoint: Checkpoint, recipe: Recipe, context: int) -> int:
    shapes = [p.shape for p in plan_layers(checkpoint, recipe)]
    vocabulary = getattr(checkpoint.config.get_text_config(), "vocab_size", 0)
    return HALF * (context * max(map(sum, shapes)) + max(map(prod, shapes))) + 4 * vocabulary


def _largest(
    checkpoint: Checkpoint, recipe: Recipe, limit: int, total: Callable[[list[LayerPlan]], int], what: str
) -> float:
    """The largest budget, in GRAINs, whose total is within the limit: the total is nearly a line, so a few steps find it."""

    def at(bits: float) -> tuple[int, int]:
        plans = plan_layers(checkpoint, recipe.model_copy(update={"bits": bits}))
        kept = [(floor(bits * prod(p.shape)), p.format.stored_bits()) for p in plans if p.format]
        spare = sum(max(0, most - stored) for most, stored in kept)  # the allocation may use what these plans leave over
        return total(plans) + spare // 8, sum(prod(p.shape) for p in plans if p.format)

    taken, weights = at(MOST)
    if taken <= limit:
        return MOST
    bits = MOST
    while taken > limit:
        step = max((taken - limit) * 8 / weights, 1 / GRAIN)
        bits = floor((bits - step) * GRAIN) / GRAIN
        if bits < LEAST:
            least = at(LEAST)[0]
            raise RecipeError(f"{limit:,} bytes are too few for {what} at any width, {least:,} at {LEAST:g} bits: give more")
        taken, weights = at(bits)
    return bits
