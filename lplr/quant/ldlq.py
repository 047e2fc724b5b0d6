"""Rounding with feedback: LDLQ.

Minimise tr(E H E^T), E = X - Xhat, over the grid.  With H = U D U^T, U unit upper triangular, columns are visited
first to last and column j of X is rounded after adding the errors already made, carried over by U:

    Xhat_j = Q( X_j + sum_{i<j} (X_i - Xhat_i) U_ij )   =>   tr(E H E^T) = sum_j D_jj ||rho_j||^2,

rho_j = the rounding residual of column j: exact, whatever Q is.  tr D <= tr H, so feedback can only help on average.
Source: Chee, Cai, Kuleshov, De Sa, "QuIP", NeurIPS 2023, section 3 (LDLQ; GPTQ is the same rounding, Theorem 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lplr.kernels.lowrank import NARROW_RATIO
from lplr.quant.qtensor import QTensor
from lplr.quant.uniform import Axis, scales

ONE_BIT = 1.1  # feedback widens what is rounded; at one bit a wider step than the row's own pays (measured, SmolLM2-135M)
BLOCK = 128  # columns whose feedback is applied at once to the columns after them


def unit_upper(H: Tensor) -> Tensor:
    """U (d x d), unit upper triangular, with H = U D U^T; H positive definite."""
    flipped = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # H = T T^T, T upper triangular
    return flipped / flipped.diagonal()


def ldlq(X: Tensor, bits: int, H: Tensor, *, axis: Axis = "row", narrow: int = 0) -> QTensor:
    """Quantize X (n x d) to nearest with feedback in the metric H (d x d, positive definite); O(n d^2).

    The first `narrow` columns, whose errors all later columns still absorb, get one bit less.
    """
    d = X.shape[1]
    row, col = scales(X * ONE_BIT if bits == 1 else X, bits, axis=axis, clip="mse")
    row_f = torch.ones(1, dtype=X.dtype, device=X.device) if row is None else row.to(X.dtype)
    col_f = torch.ones(d, dtype=X.dtype, device=X.device) if col is None else col.to(X.dtype)
    grids = [_Grid.of(row_f * NARROW_RATIO[bits], bits - 1), _Grid.of(row_f, bits)]
    U = unit_upper(H)
    target = X.T.contiguous()  # (d, n): a column of X is a contiguous row here
    error = torch.zeros_like(target)
    codes = torch.empty(target.shape, dtype=torch.uint8, device=X.device)
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        # target already holds X plus the feedback of all earlier blocks
        for j in range(start, stop):
            wanted = target[j]
            if j > start:
                wanted = torch.addmv(wanted, error[start:j].T, U[start:j, j])
            code, value = grids[j >= narrow].round(wanted / col_f[j] if col is not None else wanted)
            codes[j] = code
            error[j] = X[:, j] - value * col_f[j]
        if stop < d:
            target[stop:].addmm_(U[start:stop, stop:].T, error[start:stop])
    return QTensor.from_codes(codes.T.contiguous(), bits, row, col, narrow=narrow)


@dataclass(frozen=True)
class _Grid:
    """2^bits points (2c - top) scale for one column, scale (n,) or (1,)."""

    top: int
    scale: Tensor
    half_inverse: Tensor  # 1 / (2 scale), zero where the scale is

    @classmethod
    def of(cls, scale: Tensor, bits: int) -> _Grid:
        inverse = torch.where(scale == 0, torch.zeros_like(scale), 0.5 / scale)
        return cls((1 << bits) - 1, scale, inverse)

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, values) of the points nearest to x (n,)."""
        code = torch.addcmul(x.new_full((), self.top / 2), x, self.half_inverse).round_().clamp_(0, self.top)
        return code.to(torch.uint8), (2 * code - self.top) * self.scale
