"""Orthonormal bases and least squares without an explicit pseudo-inverse.

Cholesky of the Gram matrix where it is accurate enough, else QR, else SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _cholesky(gram: Tensor, limit: float) -> Tensor | None:
    """Lower Cholesky factor, or None when it fails or its pivots span more than `limit`."""
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    # the ratio of the pivots is a lower estimate of the condition number of L
    if int(info) or not float(pivots.min()) * limit > float(pivots.max()):
        return None
    return factor


def orth(Y: Tensor) -> Tensor:
    """Orthonormal basis (n, min(n, m)) whose span contains the columns of Y (n x m).

    Cholesky QR twice (as stable as Householder while cond(Y) < eps^-1/2), else Householder QR.
    Source: Fukaya, Nakatsukasa, Yanagisawa, Yamamoto, ScalA 2014.
    """
    if Y.shape[1] > Y.shape[0]:
        return torch.linalg.qr(Y).Q
    Q = Y
    for _ in range(2):
        factor = _cholesky(Q.T @ Q, limit=torch.finfo(Y.dtype).eps ** -0.5 / 10)
        if factor is None:
            return torch.linalg.qr(Y).Q
        Q = torch.linalg.solve_triangular(factor, Q.T, upper=False).T
    return Q


def least_squares(L: Tensor, A: Tensor) -> Tensor:
    """argmin_X ||L X - A||_F of least norm: L (n x m), A (n x d) -> X (m x d).

    Normal equations cost cond(L)^2, so they serve while the pivots stay within eps^-1/2 / 30 (a relative error of
    X of about 1e-3 in float32 at the worst, far below one quantization step); QR to eps^-1 / 1000; then SVD with
    singular values below eps max(n, m) sigma_1 dropped.
    """
    n, m = L.shape
    eps = torch.finfo(L.dtype).eps
    if m <= n:
        factor = _cholesky(L.T @ L, limit=eps**-0.5 / 30)
        if factor is not None:
            return torch.cholesky_solve(L.T @ A, factor)
        Q, upper = torch.linalg.qr(L)
        pivots = upper.diagonal().abs()
        if float(pivots.min()) > 1000 * eps * float(pivots.max()):
            return torch.linalg.solve_triangular(upper, Q.T @ A, upper=True)
    U, s, Vh = torch.linalg.svd(L, full_matrices=False)
    keep = s > eps * max(n, m) * s[0]
    inverse = torch.where(keep, 1 / s.where(keep, torch.ones_like(s)), torch.zeros_like(s))
    return Vh.T @ (inverse[:, None] * (U.T @ A))
