# a compile-time constant is an int where it is passed and a `constexpr` where it is used:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""A random sign sketch by Triton: the signs of a tile come from a counter, 32 a word, and are multiplied from registers."""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 numbers that an entry is taken as a sum of
CONSTANTS = {"ROWS": 64, "COLUMNS": 64, "INPUTS": 32}


@triton.jit
def sketch_tile(
    A, out, seed, n, d, m, scale, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr
):
    """A tile (ROWS, COLUMNS) of A S."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    word = tl.program_id(1) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, d, INPUTS):
        at = first + tl.arange(0, INPUTS)
        place = row.to(tl.int64)[:, None] * d + at[None, :]
        rest = tl.load(A + place, mask=(row < n)[:, None] & (at < d)[None, :], other=0).to(tl.float32)
        c0 = tl.broadcast_to(word[None, :], [INPUTS, COLUMNS // 32])
        c1 = tl.broadcast_to(at[:, None], [INPUTS, COLUMNS // 32])
        zero = tl.zeros([INPUTS, COLUMNS // 32], tl.int32)
        bits, _, _, _ = tl.philox(seed, c0, c1, zero, zero)
        signs = ((bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1).to(tl.int32)
        signs = tl.reshape(1 - 2 * signs, [INPUTS, COLUMNS]).to(tl.float32).to(tl.bfloat16)
        for _ in tl.static_range(PIECES):
            piece = rest.to(tl.bfloat16)
            sums = tl.dot(piece, signs, sums)
            rest -= piece.to(tl.float32)
    place = row.to(tl.int64)[:, None] * m + column[None, :]
    tl.store(out + place, (sums * scale).to(out.dtype.element_ty), mask=(row < n)[:, None] & (column < m)[None, :])


def sign_sketch(A: Tensor, m: int, seed: int) -> Tensor:
    """See `lplr.kernels.sketch.sign_sketch`."""
    n, d = A.shape
    out = torch.empty(n, m, dtype=A.dtype, device=A.device)
    if out.numel():
        grid = (triton.cdiv(n, CONSTANTS["ROWS"]), triton.cdiv(m, CONSTANTS["COLUMNS"]))
        kernel = cast(Any, sketch_tile)[grid]
        with torch.cuda.device_of(A):
            kernel(A.contiguous(), out, seed, n, d, m, m**-0.5, PIECES=PIECES[A.dtype], **CONSTANTS)
    return out
