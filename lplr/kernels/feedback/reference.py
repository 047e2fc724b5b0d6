"""Rounding with feedback along both sides of a matrix, and coordinate descent, in plain torch.

    Xhat_ij = Q( X_ij + sum_{i'<=i, j'<=j, not both equal} U_G[i',i] E_i'j' U_H[j',j] ),      E = X - Xhat

Q rounds to the nearest point of the grid.  An entry waits for all entries above and to the left of it, so the entries of one
antidiagonal i + j = a are independent: r + d - 1 steps of batched dot products.  Without U_G the entries of a column are
independent: d steps.

Descent on tr(Xhat^T G Xhat H) - 2 tr(T^T Xhat): with the others fixed the best value of an entry is
Xhat_ij + (T - G Xhat H)_ij / (G_ii H_jj), and on the grid the point nearest to it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def feedback_round(
    X: Tensor, bits: int, row: Tensor, col: Tensor, U_H: Tensor, U_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `lplr.kernels.feedback.feedback_round`."""
    r, d = X.shape
    E, codes = torch.zeros_like(X), torch.zeros(r, d, dtype=torch.uint8, device=X.device)
    if U_G is None:
        for j in range(d):
            wanted = torch.addmv(X[:, j], E[:, :j], U_H[:j, j])
            codes[:, j], E[:, j] = _nearest(wanted, X[:, j], bits, row, col[j])
        return codes, E
    # with columns reversed an antidiagonal is a diagonal: entry i of it stands in column i + shift
    H_rows = U_H.T.flip(0).contiguous()  # (d, d): row i + shift holds column d - 1 - i - shift of U_H
    G_rows = U_G.T.contiguous()
    carried = X.new_zeros(d, r)  # (E U_H)^T with its rows reversed, as far as E is known
    X_flip, col_flip = X.flip(1), col.flip(0)
    for a in range(r + d - 1):
        shift = d - 1 - a
        rows = torch.arange(max(0, -shift), min(r, a + 1), device=X.device)
        low, high = int(rows[0]), int(rows[-1]) + 1
        places = slice(low + shift, high + shift)
        from_left = torch.linalg.vecdot(E[low:high], H_rows[places])
        from_above = torch.linalg.vecdot(G_rows[low:high], carried[places])
        x = X_flip.diagonal(shift)
        code, error = _nearest(x + from_left + from_above, x, bits, row[low:high], col_flip[places])
        codes[rows, a - rows], E[rows, a - rows] = code, error
        carried[rows + shift, rows] = error + from_left
    return codes, E


def _nearest(wanted: Tensor, x: Tensor, bits: int, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the points nearest to `wanted`, and x minus those points."""
    top = (1 << bits) - 1
    scale = row * col
    half_inverse = torch.where(scale == 0, torch.zeros_like(scale), 0.5 / scale)
    code = torch.addcmul(x.new_full((), top / 2), wanted, half_inverse).round_().clamp_(0, top)
    return code.to(torch.uint8), x - (2 * code - top) * scale


def descend(codes: Tensor, T: Tensor, bits: int, row: Tensor, col: Tensor, H: Tensor, G: Tensor | None = None) -> Tensor:
    """See `lplr.kernels.feedback.descend`.  With G a step goes from one entry of a column that changes to the next."""
    top = (1 << bits) - 1
    codes = codes.clone()
    X = (2 * codes.to(T.dtype) - top) * row[:, None] * col
    for j in range(T.shape[1]):
        slope = T[:, j] - (X @ H[:, j] if G is None else G @ (X @ H[:, j]))
        step = 2 * row * col[j]
        curvature = H[j, j] if G is None else G.diagonal() * H[j, j]
        inverse = torch.where(step == 0, torch.zeros_like(step), 1 / (curvature * step))
        old = codes[:, j].to(T.dtype)
        first = 0
        while True:
            new = torch.addcmul(old, slope, inverse).round_().clamp_(0, top)
            changed = (new != old).nonzero().flatten()
            changed = changed[changed >= first]
            if not len(changed):
                break
            if G is None:
                old = new
                break
            i = int(changed[0])
            slope = slope - G[:, i] * (H[j, j] * (new[i] - old[i]) * step[i])
            old[i] = new[i]
            first = i + 1
        codes[:, j] = old.to(torch.uint8)
        X[:, j] = (2 * old - top) * row * col[j]
    return codes
