# a compile-time constant is an int where it is passed and a `constexpr` where it is used:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""Rounding with feedback along the rows by Triton, a block of columns at a time.

The columns of a block are visited in the kernel, with the block's part of the matrix in registers; a matrix product carries its
errors to the blocks behind it.

Errors that go down the columns too, and coordinate descent, are left to the torch form.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from lplr.kernels.feedback import reference
from lplr.kernels.feedback.reference import descend

__all__ = ["descend", "feedback_round"]

BLOCK = 64
CONSTANTS = {"ROWS": 16, "BLOCK": BLOCK}


@triton.jit
def round_columns(
    X, carried, row, col, U, codes, E, r, d, first, width, top, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Codes and errors of columns first .. first + width - 1 of X (r, d), ROWS rows a program; U (d, d) unit upper triangular,
    carried (r, d): what errors before these columns add to them.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)
    seen = (i < r)[:, None] & (j < width)[None, :]
    place = i.to(tl.int64)[:, None] * d + (first + j)[None, :]
    x = tl.load(X + place, mask=seen, other=0)
    wanted = x + tl.load(carried + place, mask=seen, other=0)
    scales = tl.load(row + i, mask=i < r, other=0)[:, None] * tl.load(col + first + j, mask=j < width, other=0)[None, :]
    error = tl.zeros([ROWS, BLOCK], x.dtype)
    code = tl.zeros([ROWS, BLOCK], tl.int32)
    for k in range(width):
        here = (j == k)[None, :]
        scale = tl.sum(tl.where(here, scales, 0), 1)
        half_inverse = tl.where(scale == 0, tl.zeros_like(scale), 0.5 / tl.where(scale == 0, 1.0, scale))
        level = tl.sum(tl.where(here, wanted, 0), 1) * half_inverse + top / 2
        level = tl.minimum(tl.maximum(level, 0.0), top * 1.0)
        whole = tl.floor(level)
        rest = level - whole  # to nearest, ties to even
        even = whole - 2 * tl.floor(whole / 2) == 0
        whole += tl.where((rest > 0.5) | ((rest == 0.5) & (even == 0)), 1.0, 0.0)
        e = tl.sum(tl.where(here, x, 0), 1) - (2 * whole - top) * scale
        error = tl.where(here, e[:, None], error)
        code = tl.where(here, whole.to(tl.int32)[:, None], code)
        after = tl.load(U + (first + k).to(tl.int64) * d + first + j, mask=(j > k) & (j < width), other=0)
        wanted += e[:, None] * after[None, :]
    tl.store(E + place, error, mask=seen)
    tl.store(codes + place, code.to(tl.uint8), mask=seen)


def feedback_round(
    X: Tensor, bits: int, row: Tensor, col: Tensor, U_H: Tensor, U_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `lplr.kernels.feedback.feedback_round`."""
    if U_G is not None:
        return reference.feedback_round(X, bits, row, col, U_H, U_G)
    X, row, col, U_H = (t.contiguous() for t in (X, row, col, U_H))
    r, d = X.shape
    E, carried = torch.zeros_like(X), torch.zeros_like(X)
    codes = torch.zeros(r, d, dtype=torch.uint8, device=X.device)
    kernel = cast(Any, round_columns)[(triton.cdiv(r, CONSTANTS["ROWS"]),)]
    with torch.cuda.device_of(X):
        for first in range(0, d, BLOCK) if r else ():
            last = min(first + BLOCK, d)
            kernel(X, carried, row, col, U_H, codes, E, r, d, first, last - first, (1 << bits) - 1, **CONSTANTS)
            if last < d:
                carried[:, last:].addmm_(E[:, first:last], U_H[first:last, last:])
    return codes, E
