"""Factors of few bits by the alternating direction method of multipliers (ADMM); two sign matrices at one bit each.

In the metric H = C C^T minimise ||(A - L R) C||_F for L = diag(u) B_L diag(s), R = B_R diag(v), B the levels of the grid, which
at one bit are signs.  With the inputs scaled to H_jj = 1 (and v scaled back at the end), for factors Z on the grid and duals Y,

    L   <- (A H R^T + rho (Z_L - Y_L)) (R H R^T + (rho + reg) I)^-1          ridge regression
    R   <- the solution of  L^T L R H + (rho + reg) R = L^T A H + rho (Z_R - Y_R)       in the eigenbases of L^T L and of H
    Z   <- the grid point near L + Y: signs times the best magnitude of rank one;     Y <- Y + L - Z

for each factor, where rho and reg are multiples of the mean diagonal of R H R^T and L^T L and rho rises linearly.  What comes out
is improved in place by descent (`factor.feedback.improved`).  With the full H in both solves the squared error came out a quarter
to a half below the one with its diagonal only (three matrices of SmolLM2-135M, 1 bit a weight, 40 iterations, before descent).
Source: Boza, Macko, "Addition is almost all you need: double binary factorization", 2025 (the ADMM, diagonal weights);
"NanoQuant", 2026 (ridge, rising rho, magnitude of rank one); the full metric, wider grids and the descent are our own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.errors import RecipeError
from lplr.factor.factorization import Factorization
from lplr.factor.feedback import Problem, improved, svd_start
from lplr.linalg.hessian import cholesky_factor
from lplr.quant.binary import rank_one
from lplr.quant.qtensor import QTensor, round_scale
from lplr.quant.uniform import NORMAL_SCALE
from lplr.recipe import FactorSpec

RIDGE, LAST_RHO = 0.03, 0.6  # of the mean diagonal (measured, SmolLM2-135M; the descent gains from a rho that stays soft)
ITERATIONS = 10  # of the ADMM for each alternation that the spec asks for
POWER_ITERATIONS = 2


def double_binary(A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> Factorization:
    """A (n x d) ~ L R with a row scale, a rank scale and a column scale; the error never exceeds ||A C||_F.

    10 max(1, spec.alternations) iterations of O(r d (n + d) + r^3), then spec.alternations turns of descent.  Any width of
    the factors; raises RecipeError on other ranges than `row` for L and `both` for R.
    """
    assert spec.l is not None and spec.r is not None and spec.rank
    if spec.l.ranges != "row" or spec.r.ranges != "both":
        raise RecipeError(
            f"double_binary got ranges {spec.l.ranges!r} for L and {spec.r.ranges!r} for R: "
            "set l.ranges to 'row' and r.ranges to 'both'"
        )
    problem = Problem.of(A, C)
    size = float(torch.linalg.vector_norm(problem.AC))
    zl, zr = _start(A / (size or 1.0), spec, C, generator)
    l = QTensor.from_codes(zl.codes.to(torch.uint8), zl.bits, round_scale(zl.u))
    r = QTensor.from_codes(zr.codes.to(torch.uint8), zr.bits, round_scale(zl.v * zr.u * size), round_scale(zr.v))
    if not size > 0:
        return Factorization(l, r)
    l, r, error = improved(problem, l, r, spec.alternations)
    return Factorization(l, r if error <= size else r.zeroed())


def _start(A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> tuple[_OnGrid, _OnGrid]:
    """Factors on the grid for A with ||A C||_F about one, found with the inputs scaled to H_jj = 1."""
    assert spec.l is not None and spec.r is not None and spec.rank
    bits, iterations = (int(spec.l.bits), int(spec.r.bits)), ITERATIONS * max(1, spec.alternations)
    if not A.any():
        zeros = A.new_zeros(A.shape[0], spec.rank), A.new_zeros(spec.rank, A.shape[1])
        return _OnGrid.zero(zeros[0], bits[0]), _OnGrid.zero(zeros[1], bits[1])
    if C is None:
        return _admm(Problem.of(A, None), spec.rank, bits, iterations, generator)
    D = _input_scale(C)
    zl, zr = _admm(Problem.of(A * D, C / D[:, None]), spec.rank, bits, iterations, generator)
    return zl, replace(zr, v=zr.v / D)


def _input_scale(C: Tensor) -> Tensor:
    """sqrt(H_jj) (d,), at least a thousandth of their root mean square, which becomes one."""
    norms = torch.linalg.vector_norm(C, dim=1)
    norms = norms / (torch.linalg.vector_norm(norms) * len(norms) ** -0.5)
    return norms.clamp(min=1e-3)


@dataclass(frozen=True)
class _OnGrid:
    """diag(u) levels diag(v) for codes (rows, columns) of the uniform grid, held as floats."""

    codes: Tensor
    u: Tensor
    v: Tensor
    bits: int

    @classmethod
    def near(cls, X: Tensor, bits: int) -> _OnGrid:
        """At one bit the best signs and nearly the best magnitudes; else rows and columns by their rms and Max's step."""
        if bits == 1:
            return cls((X >= 0).to(X.dtype), *rank_one(X.abs(), POWER_ITERATIONS), bits)
        tiny = torch.finfo(X.dtype).tiny ** 0.5
        v = (torch.linalg.vector_norm(X, dim=0) * X.shape[0] ** -0.5).clamp(min=tiny)
        u = (torch.linalg.vector_norm(X / v, dim=1) * X.shape[1] ** -0.5 * NORMAL_SCALE[bits]).clamp(min=tiny)
        top = (1 << bits) - 1
        codes = ((X / v / u[:, None] + top) / 2).round_().clamp_(0, top)
        return cls(codes, u, v, bits)

    @classmethod
    def zero(cls, like: Tensor, bits: int) -> _OnGrid:
        return cls(like, like[:, 0], like[0], bits)

    def value(self) -> Tensor:
        return (2 * self.codes - ((1 << self.bits) - 1)) * self.u[:, None] * self.v


def _admm(
    problem: Problem, rank: int, bits: tuple[int, int], iterations: int, generator: torch.Generator
) -> tuple[_OnGrid, _OnGrid]:
    """The grid points of the last iteration, from the rotated leading subspace of A C."""
    L, R = svd_start(problem, rank, generator)
    h, Q = (None, None) if problem.C is None else torch.linalg.eigh(problem.H)
    h = None if h is None else h.clamp(min=0)

    def in_basis(X: Tensor) -> Tensor:
        return X if Q is None else X @ Q

    AHQ = in_basis(problem.AH)
    RQ = in_basis(R)
    zl, zr = _OnGrid.near(L, bits[0]), _OnGrid.near(R, bits[1])
    Z_L, Z_R = zl.value(), zr.value()
    Y_L, Y_R = torch.zeros_like(L), torch.zeros_like(R)
    for t in range(iterations):
        soft = LAST_RHO * (t + 1) / iterations
        K = (RQ if h is None else RQ * h) @ RQ.T
        mean = K.diagonal().mean()
        L = _ridge(K, AHQ @ RQ.T + soft * mean * (Z_L - Y_L), (soft + RIDGE) * mean)
        X = L + Y_L
        zl = _OnGrid.near(X, bits[0])
        Z_L = zl.value()
        Y_L = X - Z_L
        K = L.T @ L
        mean = K.diagonal().mean()
        right = L.T @ AHQ + soft * mean * in_basis(Z_R - Y_R)
        if h is None or Q is None:
            R = RQ = _ridge(K, right.T, (soft + RIDGE) * mean).T
        else:
            k, P = torch.linalg.eigh(K)
            denominator = torch.addcmul((soft + RIDGE) * mean, k.clamp(min=0)[:, None], h)
            RQ = P @ ((P.T @ right) / denominator)
            R = RQ @ Q.T
        X = R + Y_R
        zr = _OnGrid.near(X, bits[1])
        Z_R = zr.value()
        Y_R = X - Z_R
    return zl, zr


def _ridge(K: Tensor, right: Tensor, ridge: Tensor) -> Tensor:
    """right (K + ridge I)^-1."""
    return torch.cholesky_solve(right.T, cholesky_factor(K + ridge * torch.eye(len(K), dtype=K.dtype, device=K.device))).T
