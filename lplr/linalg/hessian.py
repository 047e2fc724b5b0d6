"""Second moments of a layer's input, H = E[x x^T] (d x d), and their factors.

The output error of a layer with weight error E (n x d) is E ||E x||^2 = tr(E H E^T) = ||E C||_F^2 for H = C C^T.  Rows may
have weights: H = E[w x x^T] / E[w].
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal: GPTQ's `percdamp`
BAND = 192  # rows of x x^T that are computed at once: of each band only what is not below the diagonal


class Hessian:
    """Running mean of x x^T over all rows x that were added, weighted where weights are given."""

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.upper = torch.zeros(d, d, dtype=torch.float32, device=device)  # the sum; what is below the diagonal does not count
        self.rows = 0
        self.weight = 0.0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs (..., d), with one weight of at least zero for each (...)."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.rows += x.shape[0]
        left = x
        if weights is None:
            self.weight += x.shape[0]
        else:
            w = weights.reshape(-1).to(x.device, x.dtype)
            left = x * w[:, None]
            self.weight += float(w.double().sum())
        for a in range(0, x.shape[1], BAND):
            self.upper[a : a + BAND, a:].addmm_(left[:, a : a + BAND].T, x[:, a:])

    def merge(self, other: Hessian) -> None:
        """Add the rows that another one has."""
        self.upper += other.upper
        self.rows += other.rows
        self.weight += other.weight

    def mean(self) -> Tensor | None:
        """H (d x d), or None when nothing of any weight was added or the inputs were not finite."""
        if not self.weight > 0:
            return None
        upper = self.upper.triu() / self.weight
        return upper + upper.triu(1).T if bool(torch.isfinite(upper).all()) else None


def shrunk(H: Tensor, rows: int) -> Tensor:
    """H of `rows` vectors, with fewer of them than entries in one drawn towards its mean diagonal.

    t H + (1 - t) mean(diag H) I with t = rows / d where rows < d: such an H has no full rank, and what it says of directions that
    hardly a vector had is chance.  The form is that of Ledoit, Wolf, J. Multivariate Analysis 2004; t is a plain rule, not their
    estimate, which needs fourth moments.
    """
    d = H.shape[0]
    if rows >= d:
        return H
    t = rows / d
    return t * H + (1 - t) * H.diagonal().mean() * torch.eye(d, dtype=H.dtype, device=H.device)


def damped(H: Tensor, damping: float = DAMPING) -> Tensor:
    """H + damping * mean(diag H) * I: positive definite unless H is zero, in which case the identity."""
    mean = H.diagonal().mean()
    if not float(mean) > 0:
        return torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    return H + damping * mean * torch.eye(H.shape[0], dtype=H.dtype, device=H.device)


def cholesky_factor(H: Tensor) -> Tensor:
    """Lower C (d x d) with C C^T = H; more damping, ten times at a time, where rounding made H indefinite."""
    extra = 0.0
    while True:
        factor, info = torch.linalg.cholesky_ex(damped(H, extra) if extra else H)
        if not int(info):
            return factor
        extra = max(1e-6, 10 * extra)
