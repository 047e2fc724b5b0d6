# a compile-time constant is an int where it is passed and a `constexpr` where it is used:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""Rounding to the uniform grid and packing by Triton: a matrix is read once, and what is written is its codes."""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from lplr.kernels.pack import packed_width

CONSTANTS = {"ROWS": 4, "GROUPS": 16}


@triton.jit
def round_tile(
    X, row, col, out, seed, n, d, width, BITS: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """ROWS rows by GROUPS groups of 32 codes, BITS words each."""
    top: tl.constexpr = (1 << BITS) - 1
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    j = tl.program_id(1) * (GROUPS * 32) + tl.arange(0, GROUPS * 32)
    seen = (i < n)[:, None] & (j < d)[None, :]
    x = tl.load(X + (i.to(tl.int64)[:, None] * d + j[None, :]), mask=seen, other=0)
    x = x * tl.load(row + i, mask=i < n, other=0)[:, None] * tl.load(col + j, mask=j < d, other=0)[None, :] + top / 2
    if STOCHASTIC:
        zero = tl.zeros([ROWS, GROUPS * 32], tl.int32)
        bits, _, _, _ = tl.philox(seed, zero + j[None, :], zero + i[:, None], zero, zero)
        x += (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    else:
        x += 0.5
    code = tl.where(seen, tl.minimum(tl.maximum(tl.floor(x), 0.0), top * 1.0), 0.0).to(tl.int32).to(tl.uint32, bitcast=True)
    code = tl.reshape(code, [ROWS, GROUPS, 32])
    bit = tl.arange(0, 32)[None, None, :] * BITS
    for b in tl.static_range(BITS):
        up = bit - 32 * b  # where a code begins in this word; before it where negative
        begins = tl.where((up >= 0) & (up < 32), code << tl.maximum(tl.minimum(up, 31), 0).to(tl.uint32), 0)
        ends = tl.where((up < 0) & (up > -BITS), code >> tl.minimum(tl.maximum(-up, 0), 31).to(tl.uint32), 0)
        word = tl.sum(begins | ends, 2)  # no two have a bit in common: the sum is their union
        for byte in tl.static_range(4):
            at = (group * BITS + b) * 4 + byte
            inside = (i < n)[:, None] & (at < width)[None, :]
            place = i.to(tl.int64)[:, None] * width + at[None, :]
            tl.store(out + place, ((word >> (8 * byte)) & 255).to(tl.uint8), mask=inside)


def round_and_pack(X: Tensor, bits: int, row: Tensor, col: Tensor, seed: int | None) -> Tensor:
    """See `lplr.kernels.round_pack.round_and_pack`."""
    n, d = X.shape
    out = torch.empty(n, packed_width(d, bits), dtype=torch.uint8, device=X.device)
    if out.numel():
        grid = (triton.cdiv(n, CONSTANTS["ROWS"]), triton.cdiv(d, 32 * CONSTANTS["GROUPS"]))
        kernel = cast(Any, round_tile)[grid]
        constants = CONSTANTS | {"BITS": bits, "STOCHASTIC": seed is not None}
        # a fused multiplication and addition would round once where the reference rounds twice
        with torch.cuda.device_of(X):
            kernel(X.contiguous(), row, col, out, seed or 0, n, d, out.shape[1], **constants, enable_fp_fusion=False)
    return out
