"""y = x W^T for W = Q + L R, from packed codes and scales, without forming W.

    y = (((x * col) C_R^T) * rank) C_L^T * row  +  ((x * q_col) C_Q^T) * q_row

where x is rotated first if the weight stands in a rotated basis.  C are the odd integer levels 2 c - (2^B - 1), at most
255 in magnitude, so they are exact in bfloat16 and wider.  float16 is computed in float32: a sum of levels times
activations passes 65504 long before the row scale brings it back into range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.hadamard import rotate
from lplr.kernels.levels import levels, narrower

_COMPUTE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype)


def _product(x: Tensor, codes: Tensor, bits: int, scales: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """((x * col) C^T) * row for one packed factor, scales = (row, col)."""
    row, col = scales
    points = levels(codes, (codes.shape[0], x.shape[-1]), "uniform", bits, x.dtype)
    return _scaled(torch.matmul(_scaled(x, col), points.T), row)


def _backbone(x: Tensor, bits: int, codes: Tensor, narrow_codes: Tensor | None, narrow: int) -> Tensor:
    """x C_Q^T without scales: `narrow` columns of bits - 1 bits and a longer step, then columns of `bits` bits."""
    n, wide = codes.shape[0], x.shape[-1] - narrow
    y = torch.matmul(x[..., narrow:], levels(codes, (n, wide), "uniform", bits, x.dtype).T)
    if narrow_codes is not None:
        lower, ratio = narrower("uniform", bits)
        more = torch.matmul(x[..., :narrow], levels(narrow_codes, (n, narrow), "uniform", lower, x.dtype).T)
        y = y + more * ratio
    return y


def lowrank_linear(
    x: Tensor,
    *,
    l_bits: int = 0,
    r_bits: int = 0,
    q_bits: int = 0,
    q_narrow: int = 0,
    signs: Tensor | None = None,
    l_codes: Tensor | None = None,
    r_codes: Tensor | None = None,
    q_codes: Tensor | None = None,
    q_narrow_codes: Tensor | None = None,
    row_scale: Tensor | None = None,
    rank_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    q_row_scale: Tensor | None = None,
    q_col_scale: Tensor | None = None,
) -> Tensor:
    """y (..., n) of x (..., d); the names are those of `factor.Format.layout`.

    l_codes: (n, packed r), r_codes: (r, packed d), q_codes: (n, packed d - q_narrow), q_narrow_codes: (n, packed q_narrow),
    uint8; a scale is a vector along its side, of its full length or 1, and a missing one is one.  signs (2, d) rotate x
    first (`kernels.hadamard.rotate`).  The result has x's dtype and any leading sizes, zero included.
    Raises ValueError when neither L and R nor Q is given, or when x does not fit the packed width.
    """
    inner = x.to(_COMPUTE.get(x.dtype, torch.float32))
    if signs is not None:
        inner = rotate(inner, signs)
    y: Tensor | None = None
    if l_codes is not None and r_codes is not None:
        z = _product(inner, r_codes, r_bits, (rank_scale, col_scale))  # (..., r)
        y = _product(z, l_codes, l_bits, (row_scale, None))  # (..., n)
    if q_codes is not None:
        backbone = _backbone(_scaled(inner, q_col_scale), q_bits, q_codes, q_narrow_codes, q_narrow)
        backbone = _scaled(backbone, q_row_scale)
        y = backbone if y is None else y + backbone
    if y is None:
        raise ValueError("no codes are given: pass l_codes and r_codes, or q_codes, or all three")
    return y.to(x.dtype)
