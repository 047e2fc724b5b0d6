"""Rounding with feedback: LDLQ.

Minimise tr(E H E^T), E = X - Xhat, over the grid.  With H = U D U^T, U unit upper triangular, columns are visited
first to last and column j of X is rounded after adding the errors already made, carried over by U:

    Xhat_j = Q( X_j + sum_{i<j} (X_i - Xhat_i) U_ij )   =>   tr(E H E^T) = sum_j D_jj ||rho_j||^2,

rho_j = the rounding residual of column j: exact, whatever Q is.  tr D <= tr H, so feedback can only help on average.
Source: Chee, Cai, Kuleshov, De Sa, "QuIP", NeurIPS 2023, section 3 (LDLQ; GPTQ is the same rounding, Theorem 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.quant.qtensor import QTensor
from lplr.quant.uniform import Axis, scales

BLOCK = 128  # columns whose feedback is applied at once to the columns after them


def unit_upper(H: Tensor) -> Tensor:
    """U (d x d), unit upper triangular, with H = U D U^T; H positive definite."""
    flipped = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # H = T T^T, T upper triangular
    return flipped / flipped.diagonal()


def ldlq(X: Tensor, bits: int, H: Tensor, *, axis: Axis = "row") -> QTensor:
    """Quantize X (n x d) to nearest with feedback in the metric H (d x d, positive definite); O(n d^2)."""
    row, col = scales(X, bits, axis=axis, clip="mse")
    top = (1 << bits) - 1
    row_f = torch.ones(1, dtype=X.dtype, device=X.device) if row is None else row.to(X.dtype)
    col_f = torch.ones(X.shape[1], dtype=X.dtype, device=X.device) if col is None else col.to(X.dtype)
    inverse_row = torch.where(row_f == 0, torch.zeros_like(row_f), 1 / row_f)
    inverse_col = torch.where(col_f == 0, torch.zeros_like(col_f), 1 / col_f)
    U = unit_upper(H)
    target = X.T.contiguous()  # (d, n): a column of X is a contiguous row here
    error = torch.zeros_like(target)
    codes = torch.empty(target.shape, dtype=torch.uint8, device=X.device)
    d = X.shape[1]
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        # target already holds X plus the feedback of all earlier blocks
        for j in range(start, stop):
            wanted = target[j]
            if j > start:
                wanted = wanted + U[start:j, j] @ error[start:j]
            code = (wanted * inverse_row * inverse_col[j]).add_(top).mul_(0.5).round_().clamp_(0, top)
            codes[j] = code.to(torch.uint8)
            error[j] = X[:, j] - (2 * code - top) * row_f * col_f[j]
        if stop < d:
            target[stop:].addmm_(U[start:stop, stop:].T, error[start:stop])
    return QTensor.from_codes(codes.T.contiguous(), bits, row, col)
