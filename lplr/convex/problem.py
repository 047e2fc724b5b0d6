"""The convex programmes: a loss of a sum of gated linear maps, plus a penalty that is kept apart (`penalty`).

    minimise  f(Z; Y) + penalty(U)   over   Z = sum_i A_i U_i + 1 b^T,   A_i = diag(D_i) X

X (n, d) samples, D (n, P) the 0/1 patterns of P gates, Y (n, C) targets; b (C,) is unpenalised with `intercept`, else zero.
"gated": U (P, d, C) is free, and D may hold other numbers: X = 1 (n, 1) and features for D make the Lasso on them (`lasso`).
"relu": U = V_0 - V_1 with V (2, P, d, C) in the cones (2 D_i - I) X V_{s,i,c} >= 0 (`cones`).
A gate whose pattern is all ones is the linear block: with it the gated programme contains the linear model ("relu": the linear
functions that keep their sign on all samples).

Both products are two matrix products and a mask, never the (n, P d) matrix: Z = ((X W) o D) summed over gates, W (d, P C), and
A^T T = X^T (D o T).  They run over blocks of rows, so X may be larger than memory (a memory-mapped array under a tensor), or on
another device than Y and D, which say where the work is done.  The type of the argument is the type of the product: float64
weights on float32 samples give float64 figures.
Source: Pilanci, Ergen, "Neural networks are convex regularizers", ICML 2020; Mishkin, Sahiner, Pilanci, "Fast convex optimization
for two-layer ReLU networks", ICML 2022 (gated ReLU).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lplr.errors import RecipeError

ACTIVATIONS = ("gated", "relu")
ENTRIES = 1 << 22  # of a block's fits, rows * P * C: bounds the temporaries of a product
CONSTANT = 4.0  # roundings by which entries of a constant column may differ
KEPT = 1 << 27  # entries of D up to which its copy in the type of X is kept


@dataclass(frozen=True)
class Problem:
    """Samples, targets, patterns and what is fitted; shapes are checked here, values by `check`.

    loss: "squared" 1/(2n) ||Z - Y||_F^2 | "logistic" 1/n sum log(1 + exp(-y z)), y = +-1, C = 1 | "softmax" 1/n sum of cross
    entropies, Y one-hot.  Raises RecipeError for shapes, types and names that do not fit together.
    """

    X: Tensor
    Y: Tensor
    D: Tensor
    loss: str = "squared"
    activation: str = "gated"
    intercept: bool = False

    def __post_init__(self) -> None:
        X, Y, D = self.X, self.Y, self.D
        if X.ndim != 2 or Y.ndim != 2 or D.ndim != 2 or not len(X) == len(Y) == len(D):
            shapes = f"X {tuple(X.shape)}, Y {tuple(Y.shape)}, D {tuple(D.shape)}"
            raise RecipeError(f"X (n, d), Y (n, C) and D (n, P) need the same n; these are {shapes}: reshape them")
        if 0 in X.shape or 0 in Y.shape or 0 in D.shape:
            what = "samples" if not len(X) else "features" if not X.shape[1] else "outputs" if not Y.shape[1] else "gates"
            raise RecipeError(f"no {what}: X {tuple(X.shape)}, Y {tuple(Y.shape)}, D {tuple(D.shape)}; give at least one")
        if X.dtype not in (torch.float32, torch.float64) or Y.dtype != X.dtype:
            raise RecipeError(f"X is {X.dtype}, Y is {Y.dtype}: cast both to float32 or both to float64")
        if D.dtype != torch.bool and (D.dtype != X.dtype or self.activation == "relu"):
            raise RecipeError(f"D is {D.dtype}: give the patterns as bool, e.g. gates.patterns(X, G)")
        if self.activation not in ACTIVATIONS:
            raise RecipeError(f"unknown activation {self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, d, C), that of gated weights."""
        return self.D.shape[1], self.X.shape[1], self.Y.shape[1]

    @cached_property
    def mask(self) -> Tensor | None:
        """D in the type of X, kept for the products; None where it would be large."""
        return self.D.to(self.X.dtype) if self.D.numel() <= KEPT else None

    def fit(self, U: Tensor, b: Tensor) -> Tensor:
        """Z (n, C) of weights U (P, d, C), or (2, P, d, C) for "relu", and b (C,)."""
        if self.activation == "relu":
            U = U[0] - U[1]
        P, d, C = U.shape
        W = U.permute(1, 0, 2).reshape(d, P * C)
        out = torch.empty(len(self.X), C, dtype=U.dtype, device=self.Y.device)
        for rows in self.blocks():
            products, D = self.rows(rows, U.dtype) @ W, self.patterns(rows, U.dtype)
            if C == 1:
                torch.sum(products.mul_(D), dim=1, keepdim=True, out=out[rows])
            else:
                torch.sum(products.view(-1, P, C).mul_(D[:, :, None]), dim=1, out=out[rows])
        return out.add_(b.to(out.dtype))

    def adjoint(self, T: Tensor) -> Tensor:
        """A_i^T T (P, d, C) of all gates, T (n, C); sums over blocks of rows are kept in float64."""
        P, d, C = self.shape[0], self.shape[1], T.shape[1]
        total: Tensor | None = None
        blocks = list(self.blocks())
        for rows in blocks:
            gated = (self.patterns(rows, T.dtype)[:, :, None] * T[rows, None, :]).reshape(-1, P * C)
            part = self.rows(rows, T.dtype).T @ gated
            if len(blocks) > 1:
                part = part.double()
            total = part if total is None else total.add_(part)
        assert total is not None  # n > 0
        return total.to(T.dtype).view(d, P, C).transpose(0, 1).contiguous()

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """A block of X where the work is done."""
        return self.X[rows].to(device=self.Y.device, dtype=dtype)

    def patterns(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """A block of D as numbers."""
        return (self.D if self.mask is None else self.mask)[rows].to(dtype)

    def blocks(self) -> Iterator[slice]:
        """Slices of rows whose products hold at most ENTRIES entries, and as much of X."""
        size = max(1, ENTRIES // max(self.D.shape[1] * self.Y.shape[1], self.X.shape[1]))
        return (slice(a, min(a + size, len(self.X))) for a in range(0, len(self.X), size))


def centred_targets(problem: Problem) -> tuple[Tensor, Tensor]:
    """Y (n, C) float64 less its column means (C,), and these, which b takes up: squared loss with an intercept; else Y and 0.

    The same programme, free of the cancellation that a large or constant Y brings; a column that is constant but for rounding
    becomes zero.
    """
    Y = problem.Y.double()
    if problem.loss != "squared" or not problem.intercept:
        return Y, torch.zeros_like(Y[0])
    means = Y.mean(0)
    centred = Y - means
    constant = centred.abs().amax(0) <= CONSTANT * torch.finfo(problem.Y.dtype).eps * Y.abs().amax(0)
    return torch.where(constant, torch.zeros_like(Y), centred), means


def check(problem: Problem) -> None:
    """RecipeError where a value cannot be fitted: NaN or Inf, targets outside the loss's domain, a class without samples."""
    for rows in problem.blocks():
        if not torch.isfinite(problem.X[rows]).all():
            raise RecipeError("X holds NaN or Inf: impute or drop these rows or columns")
    if problem.D.is_floating_point() and not torch.isfinite(problem.D).all():
        raise RecipeError("D holds NaN or Inf: drop these features")
    Y = problem.Y
    if not torch.isfinite(Y).all():
        raise RecipeError("Y holds NaN or Inf: drop these samples")
    if problem.loss == "logistic":
        if Y.shape[1] != 1 or bool((Y.abs() != 1).any()):
            raise RecipeError(f"the logistic loss needs Y (n, 1) of -1 and +1, this is {tuple(Y.shape)}: encode two classes so")
        if problem.intercept and (Y[0] == Y).all():
            raise RecipeError("one class with an intercept has no optimum (b is unbounded): give samples of both classes")
    if problem.loss == "softmax":
        if bool(((Y != 0) & (Y != 1)).any()) or bool((Y.sum(1) != 1).any()):
            raise RecipeError("the softmax loss needs Y (n, C) with one 1 a row and 0 elsewhere: encode the classes one-hot")
        if problem.intercept and not Y.any(0).all():
            absent = (~Y.any(0)).nonzero()[:, 0].tolist()
            raise RecipeError(f"classes {absent} have no sample, so their intercept is unbounded: drop these columns of Y")
