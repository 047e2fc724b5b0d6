"""y = x X^T for one packed matrix X: row scales times points of a grid times column scales; an operator of torch.

    lplr::matmul, with the shape of its result for `torch.compile` and its derivatives with respect to x and the scales:

    u = (x * col) C^T,  y = u * row:     dx = ((dy * row) C) * col,     drow = sum dy * u,     dcol = sum ((dy * row) C) * x
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.backend import direct, form
from lplr.kernels.matmul import reference

__all__ = ["matmul"]


def matmul(
    x: Tensor,
    codes: Tensor,
    n: int,
    grid: tuple[str, float],
    row: Tensor | None = None,
    col: Tensor | None = None,
    narrow_codes: Tensor | None = None,
    narrow: int = 0,
) -> Tensor:
    """y (..., n) = ((x * col) C^T) * row of x (..., d), C (n, d) the points of `kernels.levels` that the codes stand for.

    grid is (name, width).  The first `narrow` columns are of the grid's next lower width and its step, or zero without
    narrow_codes; codes are of the others, packed as `kernels.levels.packed_shape` says.  row: (n,) or (1,), col: (d,) or (1,); a
    missing scale is one.  The result has x's type and any leading sizes, zero included.

    The torch form computes in x's type.  On a GPU sums are float32 and the result is rounded once; x is float32, bfloat16 or
    float16 (float64 takes the torch form, which is the only one that is so exact).  Tensor cores multiply bfloat16; float16 and
    float32 are taken as sums of two and three such numbers, and with them NormalFloat levels as sums of two (from 64 tokens on
    such products are float32 ones).
    """
    if direct(x, row, col):
        return form("matmul", reference, x).matmul(x, codes, n, (grid[0], float(grid[1])), row, col, narrow_codes, narrow)
    return _matmul(x, codes, n, grid[0], float(grid[1]), row, col, narrow_codes, narrow)


@torch.library.custom_op("lplr::matmul", mutates_args=())
def _matmul(
    x: Tensor, codes: Tensor, n: int, grid: str, bits: float,
    row: Tensor | None, col: Tensor | None, narrow_codes: Tensor | None, narrow: int,
) -> Tensor:  # fmt: skip
    return form("matmul", reference, x).matmul(x, codes, n, (grid, bits), row, col, narrow_codes, narrow)


@_matmul.register_fake
def _(x, codes, n, grid, bits, row, col, narrow_codes, narrow):
    return x.new_empty(*x.shape[:-1], n)


def _keep(ctx, inputs, output):
    x, codes, n, grid, bits, row, col, narrow_codes, narrow = inputs
    ctx.save_for_backward(x, codes, row, col, narrow_codes)
    ctx.of = (n, grid, bits, narrow)


def _derivatives(ctx, dy):
    x, codes, row, col, narrow_codes = ctx.saved_tensors
    n, grid, bits, narrow = ctx.of
    points = reference.points(codes, (n, x.shape[-1]), (grid, bits), narrow_codes, narrow, dy.dtype)
    dz = (dy if row is None else dy * row.to(dy.dtype)) @ points  # (..., d)
    dx = drow = dcol = None
    if ctx.needs_input_grad[0]:
        dx = dz if col is None else dz * col.to(dz.dtype)
    if ctx.needs_input_grad[5]:
        drow = _summed(dy * ((x if col is None else x * col.to(x.dtype)) @ points.T), row)
    if ctx.needs_input_grad[6]:
        dcol = _summed(dz * x, col)
    return dx, None, None, None, None, drow, dcol, None, None


def _summed(t: Tensor, scale: Tensor | None) -> Tensor | None:
    """The derivative with respect to a scale along the last axis, or to one for all."""
    if scale is None:
        return None
    total = t.sum_to_size(t.shape[-1]) if t.dim() > 1 else t
    return (total.sum().view(1) if scale.numel() == 1 else total).to(scale.dtype)


_matmul.register_autograd(_derivatives, setup_context=_keep)
