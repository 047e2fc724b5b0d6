"""Rounding with feedback along both sides.

Minimise tr(E^T G E H), E = X - Xhat (r x d), over a uniform grid: the quadratic form H (x) G of vec E.  With G = U_G D_G U_G^T
and H = U_H D_H U_H^T, U unit upper triangular (the convention of `quant.ldlq`), entries are visited first to last on both sides:

    Xhat_ij = Q( X_ij + sum_{i'<=i, j'<=j, not both equal} U_G[i',i] E_i'j' U_H[j',j] )
    rho = U_G^T E U_H is the rounding residual   =>   tr(E^T G E H) = sum_ij D_G,i D_H,j rho_ij^2,

exact, whatever Q is.  With G = I it is LDLQ.  A factor R of A ~ L R is rounded so with G = L^T L, a factor L with the metric
M = R H R^T on its columns.
Source: our own extension of Chee, Cai, Kuleshov, De Sa, "QuIP", NeurIPS 2023, section 3, to two sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.feedback import feedback_round
from lplr.linalg.hessian import DAMPING, damped
from lplr.quant.ldlq import unit_upper
from lplr.quant.qtensor import QTensor


def two_sided(
    X: Tensor,
    bits: int,
    G: Tensor | None,
    H: Tensor | None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    *,
    damping: float = DAMPING,
) -> QTensor:
    """Quantize X (r x d) to the grid of the given storable scales, (r,) or (1,) and (d,) or (1,), a missing one being 1.

    G (r x r) and H (d x d) are symmetric positive semidefinite, the identity where None; each is damped, and the error identity
    holds for the damped form.  Undamped, the feedback of an ill-conditioned one drives what is rounded out of the grid.
    O(r d (r + d)).
    """
    H = torch.eye(X.shape[1], dtype=X.dtype, device=X.device) if H is None else damped(H, damping)
    U_G = None if G is None else unit_upper(damped(G, damping))
    return rounded(X, bits, U_G, unit_upper(H), row_scale, col_scale)


def rounded(X: Tensor, bits: int, U_G: Tensor | None, U_H: Tensor, row_scale: Tensor | None, col_scale: Tensor | None) -> QTensor:
    """`two_sided` for metrics that are factored already (`unit_upper`)."""
    row, col = full_scale(row_scale, X.shape[0], X), full_scale(col_scale, X.shape[1], X)
    codes, _ = feedback_round(X, bits, row, col, U_H, U_G)
    return QTensor.from_codes(codes, bits, row_scale, col_scale)


def full_scale(scale: Tensor | None, length: int, like: Tensor) -> Tensor:
    """The scale as a vector (length,) in the dtype of `like`, ones where it is missing."""
    if scale is None:
        return torch.ones(length, dtype=like.dtype, device=like.device)
    return scale.to(like.dtype).expand(length).contiguous()
