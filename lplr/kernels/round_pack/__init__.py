"""From a matrix to packed codes of the uniform grid in one pass."""

from __future__ import annotations

from torch import Tensor

from lplr.kernels.backend import form
from lplr.kernels.round_pack import reference

__all__ = ["round_and_pack"]


def round_and_pack(X: Tensor, bits: int, row: Tensor, col: Tensor, seed: int | None = None) -> Tensor:
    """Packed codes (n, packed_width(d, bits)) of c = floor(x row_i col_j + (2^bits - 1) / 2 + u) within [0, 2^bits - 1].

    X (n, d) float32; row (n,) and col (d,), float32, are the inverses of scales, 1/2 being in one of them: a code stands for
    (2c - (2^bits - 1)) times the scales.  u is 1/2 without a seed (the nearest point), else the upper 24 bits of the word
    (i, j) of `kernels.philox` (stochastic).  Every form rounds each operation alone, so all have the same codes, bit for bit.
    """
    return form("round_pack", reference, X).round_and_pack(X, bits, row, col, seed)
