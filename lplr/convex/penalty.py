"""The penalties lam * sum_i ||U_i||: which norm of a gate's weights U_i (d, C) decides what a neuron is.

    group     ||U_i||_F              all outputs of a gate live or die together
    columns   sum_c ||U_ic||_2       one-vs-all: every output has its own neurons; one ReLU neuron a column
    nuclear   ||U_i||_*              neurons shared by the outputs, U_i = sum_k w_k a_k^T: weight decay on both layers

The same for C = 1.  prox_{step * penalty}(U) shrinks lengths, or singular values; the dual norm is the largest of them:

    prox = argmin_V 1/2 ||V - U||^2 + step * lam ||V||,     ||T||_* = max { <T, V> : ||V|| <= 1 }.

Source: Sahiner, Ergen, Pauly, Pilanci, "Vector-output ReLU neural network problems are copositive programs", ICLR 2021 (nuclear).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lplr.errors import RecipeError

NORMS = ("group", "columns", "nuclear")


@dataclass(frozen=True)
class Penalty:
    """lam > 0 and a norm of NORMS; weights are (..., d, C).  Raises RecipeError for another lam or norm."""

    lam: float
    norm: str = "group"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lam) and self.lam > 0):
            raise RecipeError(f"lam is {self.lam}: give a positive number, e.g. a hundredth of lambda_max(problem, norm)")
        if self.norm not in NORMS:
            raise RecipeError(f"unknown norm {self.norm!r}: choose one of {', '.join(NORMS)}")

    def lengths(self, U: Tensor) -> Tensor:
        """What is shrunk: ||U_i||_F (..., 1), ||U_ic|| (..., C) or the singular values (..., min(d, C))."""
        if self.norm == "columns" or U.shape[-1] == 1:
            return U.norm(dim=-2)
        if self.norm == "group":
            return U.norm(dim=(-2, -1))[..., None]
        return torch.linalg.svdvals(U)

    def value(self, U: Tensor) -> float:
        return self.lam * self.lengths(U).double().sum().item()

    def prox(self, U: Tensor, step: float) -> Tensor:
        """argmin_V 1/2 ||V - U||^2 + step * value(V)."""
        if self.norm == "nuclear" and U.shape[-1] > 1:
            left, sizes, right = torch.linalg.svd(U, full_matrices=False)
            return (left * (sizes - step * self.lam).clamp_min(0)[..., None, :]) @ right
        sizes = self.lengths(U)[..., None, :]
        return U * (1 - step * self.lam / sizes.clamp_min(torch.finfo(U.dtype).tiny)).clamp_min(0)

    def dual_norm(self, T: Tensor) -> Tensor:
        """||T_i||_* (...) of T (..., d, C): feasible where it is at most lam."""
        if self.norm == "nuclear" and T.shape[-1] > 1:
            return torch.linalg.eigvalsh(T.mT @ T)[..., -1].clamp_min(0).sqrt()
        return self.lengths(T).amax(-1)
