"""Singular values of a matrix, and the least error that any matrix of a given rank can have."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 256  # smaller side up to which the singular values themselves are computed
_BLOCK = 1 << 22  # entries widened to float64 at once


def spectrum(W: Tensor) -> Tensor:
    """Singular values of W (n x d), descending, float64, min(n, d) of them.

    Up to a smaller side of EXACT_UP_TO: svdvals, absolute error about 1e-16 sigma_1 times a small power of the size.  Above:
    roots of the eigenvalues of the smaller Gram matrix, 3 times cheaper and without a float64 copy of W; each *square* has
    an error of about 1e-16 sigma_1^2 min(n, d), so values below 1e-7 sigma_1 are noise there.
    """
    if min(W.shape) <= EXACT_UP_TO:
        return torch.linalg.svdvals(W.double())
    tall = W if W.shape[0] >= W.shape[1] else W.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=W.device)
    for rows in tall.split(max(1, _BLOCK // tall.shape[1])):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).sqrt_()


def optimal_error(singular_values: Tensor, rank: int) -> float:
    """min ||W - X||_F over rank(X) <= rank: the root of the sum of the other squares (Eckart, Young, Psychometrika 1936)."""
    return float(torch.linalg.vector_norm(singular_values[rank:].double()))
