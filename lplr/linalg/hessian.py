"""Second moments of a layer's input, H = E[x x^T] (d x d), and their factors.

The output error of a layer with weight error E (n x d) is E ||E x||^2 = tr(E H E^T) = ||E C||_F^2 for H = C C^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal: GPTQ's `percdamp`


class Hessian:
    """Running mean of x x^T over all rows x that were added."""

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(d, d, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add inputs (..., d)."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_(x.T, x)
        self.rows += x.shape[0]

    def mean(self) -> Tensor | None:
        """H (d x d), or None when nothing was added or the inputs were not finite."""
        if not self.rows or not bool(torch.isfinite(self.total).all()):
            return None
        return self.total / self.rows


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
