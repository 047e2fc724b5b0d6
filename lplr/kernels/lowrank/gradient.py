"""Gradients of `reference.lowrank_linear` with respect to x and the scales.

For one product y = ((x * col) C^T) * row and g = dL/dy, with u = (x * col) C^T and g' = g * row:

    dL/dx = (g' C) * col,    dL/dcol = sum_t x * (g' C),    dL/drow = sum_t g * u,

a scale of length one receives the sum of its entries' gradients; a rotation is orthogonal, so its gradient is its inverse.
Nothing but x is kept from the forward pass: C is decoded again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.hadamard import rotate
from lplr.kernels.levels import levels
from lplr.kernels.matmul.reference import points

Grid = tuple[str, float]


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _summed(grad: Tensor, scale: Tensor | None) -> Tensor:
    """The gradient (t, k) of x * scale with respect to scale (k,) or (1,), in its dtype; empty for no scale."""
    if scale is None:
        return grad.new_empty(0)
    total = grad.sum(0)
    return (total if scale.numel() > 1 or len(total) == 1 else total.sum(0, keepdim=True)).to(scale.dtype)


def _product(x: Tensor, g: Tensor, C: Tensor, row: Tensor | None, col: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dx, dL/drow, dL/dcol) of one product; x (t, d), g (t, n), C (n, d)."""
    scaled = x if col is None else x * col.to(x.dtype)
    inner = (g if row is None else g * row.to(g.dtype)) @ C
    d_row = _summed(g * (scaled @ C.T), row) if row is not None else g.new_empty(0)
    d_col = _summed(x * inner, col)
    return (inner if col is None else inner * col.to(x.dtype)), d_row, d_col


def gradient(
    g: Tensor,
    x: Tensor,
    *,
    n: int,
    rank: int,
    l_grid: Grid,
    r_grid: Grid,
    q_grid: Grid,
    q_narrow: int,
    signs: Tensor | None,
    out_signs: Tensor | None,
    l_codes: Tensor | None,
    r_codes: Tensor | None,
    q_codes: Tensor | None,
    q_narrow_codes: Tensor | None,
    row_scale: Tensor | None,
    rank_scale: Tensor | None,
    col_scale: Tensor | None,
    q_row_scale: Tensor | None,
    q_col_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dL/d(x, row_scale, rank_scale, col_scale, q_row_scale, q_col_scale) from g = dL/dy; empty for a scale that is missing.

    Arguments as in `reference.lowrank_linear`; computed in float32, or float64 if x is.
    """
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    inner, out = _flat(x).to(dtype), _flat(g).to(dtype)
    if signs is not None:
        inner = rotate(inner, signs)
    if out_signs is not None:
        out = rotate(out, out_signs)  # y = v P^T
    d = inner.shape[1]
    total = torch.zeros_like(inner)
    d_row, d_rank, d_col, d_q_row, d_q_col = (inner.new_empty(0) for _ in range(5))  # an op may not return one tensor twice
    if l_codes is not None and r_codes is not None:
        R = levels(r_codes, (rank, d), *r_grid, dtype)
        L = levels(l_codes, (n, rank), *l_grid, dtype)
        z = (inner if col_scale is None else inner * col_scale.to(dtype)) @ R.T
        if rank_scale is not None:
            z = z * rank_scale.to(dtype)
        d_z, d_row, _ = _product(z, out, L, row_scale, None)
        d_x, d_rank, d_col = _product(inner, d_z, R, rank_scale, col_scale)
        total = total + d_x
    if q_codes is not None:
        Q = points(q_codes, (n, d), q_grid, q_narrow_codes, q_narrow, dtype)
        d_x, d_q_row, d_q_col = _product(inner, out, Q, q_row_scale, q_col_scale)
        total = total + d_x
    if signs is not None:
        total = rotate(total, signs, inverse=True)
    return total.to(x.dtype).view(x.shape), d_row, d_rank, d_col, d_q_row, d_q_col
