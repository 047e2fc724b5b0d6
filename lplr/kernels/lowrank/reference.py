"""y = x W^T for W = P (Q + L R) O^T, from packed codes and scales, without forming W.

    y = (((x O * col) C_R^T) * rank) C_L^T * row  +  ((x O * q_col) C_Q^T) * q_row,  times P^T

where P and O are the rotations of the outputs and inputs in which the weight stands, if it does.  C are the points of
`kernels.levels`, exact in bfloat16 and wider but for normal_float.  float16 is computed in float32: a sum of levels times
activations passes 65504 long before the row scale brings it back into range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.hadamard import rotate
from lplr.kernels.matmul import matmul

_COMPUTE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}


def lowrank_linear(
    x: Tensor,
    *,
    n: int = 0,
    rank: int = 0,
    l_grid: tuple[str, float] = ("uniform", 0),
    r_grid: tuple[str, float] = ("uniform", 0),
    q_grid: tuple[str, float] = ("uniform", 0),
    q_narrow: int = 0,
    signs: Tensor | None = None,
    out_signs: Tensor | None = None,
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

    A grid is (name, width).  l_codes, r_codes, q_codes and q_narrow_codes are packed as `kernels.levels.packed_shape` says for
    matrices (n, rank), (rank, d), (n, d - q_narrow) and (n, q_narrow); a scale is a vector along its side, of its full length
    or 1, and a missing one is one.  signs (2, d) rotate x first, out_signs (2, n) rotate the result back
    (`kernels.hadamard.rotate`).  The result has x's dtype and any leading sizes, zero included.
    Raises ValueError when neither L and R nor Q is given, or when x does not fit the packed width.
    """
    inner = x.to(_COMPUTE.get(x.dtype, torch.float32))
    if signs is not None:
        inner = rotate(inner, signs)
    y: Tensor | None = None
    if l_codes is not None and r_codes is not None:
        z = matmul(inner, r_codes, rank, r_grid, rank_scale, col_scale)  # (..., r)
        y = matmul(z, l_codes, n, l_grid, row_scale)  # (..., n)
    if q_codes is not None:
        backbone = matmul(inner, q_codes, n, q_grid, q_row_scale, q_col_scale, q_narrow_codes, q_narrow)
        y = backbone if y is None else y + backbone
    if y is None:
        raise ValueError("no codes are given: pass l_codes and r_codes, or q_codes, or all three")
    return (y if out_signs is None else rotate(y, out_signs, inverse=True)).to(x.dtype)
