"""CRONOS as published: ADMM on the convex ReLU programme, its linear systems by Nystroem-preconditioned conjugate gradients.

    min 1/2 ||F u - y||^2 + beta sum ||v||_2 + 1(s >= 0)   s.t.  u = v,  G u = s        (sum scaling: beta = n lam)

    u  <- (I + F^T F / rho + G^T G)^{-1} (F^T y / rho + v - mu + G^T (s - nu))     to ||r||_2 <= 1 / (1 + k)^1.2, from zero
    v  <- shrink_{beta / rho}(u + mu), group by group;   s <- (G u + nu)_+
    mu <- mu + gamma (u - v);   nu <- nu + gamma (G u - s)

u = (u_0, u_1) in R^{2 x P x d}, F u = sum_i D_i X (u_{0,i} - u_{1,i}), G_i = (2 D_i - I) X.  The preconditioner is built once:
Omega = QR of a Gaussian N x r, Y = A Omega, shift = sqrt(r) eps ||Y||, Cholesky C C^T = Omega^T (Y + shift Omega), SVD of
(Y + shift Omega) C^{-T} = U Sigma W^T, S = max(Sigma^2 - shift, 0), P^{-1} g = (S_r + rho) U (U^T g / (S + rho)) + g - U U^T g.

No repairs are made: one rho for both splits, no over-relaxation, cold starts, no stopping rule but a fixed number of iterations,
squared loss, no intercept (`admm` is the repaired form).  Several outputs are independent programmes on the same gates.

Where the authors' code departs from the paper, and what this file does:
- it returns and evaluates u, dense and outside the cones: here v is returned, projected onto them and certified;
- its "best" iterate is chosen on validation accuracy compared with the previous value: here the last one is returned;
- its shift is sqrt(r) 1e-16 ||Y||, below the precision of float32: here eps is that of the type (the same in float64);
- the copy used by CRONOS-AM has the inner tolerance 1e-6 at every iteration: here the paper's schedule;
- its residual test has transposed norms and is never used: residuals are recorded here, and decide nothing;
- its sum loss with beta = 1e-3 means lam = 1e-3 / n, no regularisation to speak of: here lam is the caller's.
Kept as coded: the preconditioner adds rho to the spectrum of A although A holds the identity already.
Source: Feng, Frangella, Pilanci, "CRONOS: Enhancing deep learning with scalable GPU accelerated convex neural networks", NeurIPS
2024, algorithms 1 and 2; Frangella, Tropp, Udell, "Randomized Nystroem preconditioning", SIAM J. Matrix Anal. Appl. 2023.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lplr.convex import cones
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Callback, Run, Solution
from lplr.errors import RecipeError, choose

ITERATIONS, INNER, RANK = 10, 25, 10
POWER = 1.2  # of the inner tolerance's decay
PRECONDITIONERS = ("nystroem", "none", "exact")  # exact: one dense factorisation instead of conjugate gradients, N = 2 P d

Operator = Callable[[Tensor], Tensor]


def cronos(
    problem: Problem,
    penalty: Penalty,
    *,
    tol: float = 1e-6,
    max_iter: int | None = None,
    warm: Solution | None = None,
    callback: Callback | None = None,
    rho: float = 1.0,
    gamma: float = 1.0,
    inner: str = "nystroem",
    inner_steps: int = INNER,
    rank: int = RANK,
    generator: torch.Generator | None = None,
) -> Solution:
    """max_iter (10) iterations as published; tol only words the status.  `warm` gives the first v; the callback sees every line.

    Raises RecipeError for another loss than the squared one, for an intercept, for penalties that couple outputs, and for an
    unknown `inner` (nystroem, none, exact).
    """
    _check(problem, penalty, inner)
    run = Run(problem, penalty, tol, ITERATIONS if max_iter is None else max_iter, callback, time.perf_counter())
    relu, beta, y = problem.activation == "relu", len(problem.X) * penalty.lam, problem.Y
    F, Ft, G, Gt = operators(problem)
    v = torch.zeros_like(Ft(y)) if warm is None else (warm.U if relu else warm.U[None]).to(y.dtype)
    mu, s = torch.zeros_like(v), G(v).clamp_min(0)
    nu = torch.zeros_like(s)

    def system(x: Tensor) -> Tensor:
        return x + Ft(F(x)) / rho + Gt(G(x))

    precondition = preconditioner(system, v, rho, rank, generator) if inner == "nystroem" else (lambda g: g)
    direct = _dense_inverse(system, v) if inner == "exact" else None
    while not run.over:
        run.count += 1
        right = Ft(y) / rho + v - mu + Gt(s - nu)
        if direct is not None:
            u, steps = direct(right), 0
        else:
            u, steps = conjugate_gradients(system, right, precondition, (1 + run.count) ** -POWER, inner_steps)
        v = cones.shrink(u + mu, beta / rho)
        margins = G(u)
        s = (margins + nu).clamp_min(0)
        mu, nu = mu + gamma * (u - v), nu + gamma * (margins - s)
        run.record(inner=steps, **_look(v, u, margins, F, G, y, beta))
    run.certify(cones.repair(v, problem.X, problem.D) if relu else v[0], torch.zeros_like(y[0]))
    return run.finish("CRONOS stops after a fixed number; raise max_iter, or use method='admm', its repaired form")


def conjugate_gradients(apply: Operator, right: Tensor, precondition: Operator, tol: float, limit: int) -> tuple[Tensor, int]:
    """x with ||right - A x||_2 <= tol for every output (the last dimension), from x = 0, and the steps taken (at most limit)."""
    x, r = torch.zeros_like(right), right
    z = precondition(r)
    p, rz = z, _dot(r, z)
    for steps in range(limit):
        going = _dot(r, r).sqrt() > tol
        if not going.any():
            return x, steps
        Ap = apply(p)
        step = torch.where(going, rz / _dot(p, Ap).clamp_min(1e-300), torch.zeros_like(rz))
        x, r = x + step * p, r - step * Ap
        z = precondition(r)
        new = _dot(r, z)
        p, rz = z + torch.where(going, new / rz.clamp_min(1e-300), torch.zeros_like(rz)) * p, new
    return x, limit


def nystroem(apply: Operator, like: Tensor, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """U (N, r) and S (r,), descending, of the rank-r approximation U diag(S) U^T of a positive semidefinite operator.

    `like` (signs, P, d, C) gives the shape of what the operator takes; one output of it is sketched: N = signs P d.
    """
    shape, N = like.shape[:-1], like[..., 0].numel()
    rank = min(rank, N)
    Omega = torch.randn(N, rank, dtype=torch.float64, generator=generator).to(like)
    Omega = torch.linalg.qr(Omega).Q
    Y = apply(Omega.reshape(*shape, rank)).reshape(N, rank)
    shift = math.sqrt(rank) * torch.finfo(Y.dtype).eps * torch.linalg.matrix_norm(Y, 2)
    Y = Y + shift * Omega
    C = torch.linalg.cholesky(Omega.T @ Y)
    U, sigma, _ = torch.linalg.svd(torch.linalg.solve_triangular(C, Y.T, upper=False).T, full_matrices=False)
    return U, (sigma.square() - shift).clamp_min(0)


def preconditioner(apply: Operator, like: Tensor, rho: float, rank: int, generator: torch.Generator | None) -> Operator:
    """P^{-1} of the Nystroem approximation, as coded by the authors."""
    U, S = nystroem(apply, like, rank, generator)

    def precondition(g: Tensor) -> Tensor:
        flat = g.reshape(len(U), -1)
        along = U.T @ flat
        return (flat + U @ ((S[-1] + rho) * along / (S + rho)[:, None] - along)).reshape(g.shape)

    return precondition


def _dense_inverse(apply: Operator, like: Tensor) -> Operator:
    """The exact u-step: the operator's matrix (N x N) is formed and factored."""
    shape, N = like.shape[:-1], like[..., 0].numel()
    eye = torch.eye(N, dtype=like.dtype, device=like.device)
    factor = torch.linalg.cholesky(apply(eye.reshape(*shape, N)).reshape(N, N))
    return lambda g: torch.cholesky_solve(g.reshape(N, -1), factor).reshape(g.shape)


def operators(problem: Problem) -> tuple[Operator, Operator, Operator, Operator]:
    """F, F^T, G, G^T on (signs, P, d, k); gated problems have one sign and no G."""
    X, relu, sign = problem.X, problem.activation == "relu", cones.signs(problem.D, problem.X.dtype)[:, :, None]

    def F(u: Tensor) -> Tensor:
        return problem.fit(u if relu else u[0], torch.zeros_like(u[0, 0, 0]))

    def Ft(T: Tensor) -> Tensor:
        found = problem.adjoint(T)
        return cones.both_signs(found) if relu else found[None]

    if not relu:
        return F, Ft, lambda u: u[:0], lambda s: torch.zeros(())
    return F, Ft, lambda u: sign * (X @ u), lambda s: X.T @ (sign * s)


def _look(v: Tensor, u: Tensor, margins: Tensor, F: Operator, G: Operator, y: Tensor, beta: float) -> dict[str, float]:
    """Objective of v (mean scaling), how far u and v are from the cones, and from each other."""
    n = len(y)
    objective = (0.5 * (F(v) - y).square().sum() + beta * v.norm(dim=-2).sum()) / n
    return {
        "objective": objective.item(),
        "infeasibility": (-margins).clamp_min(0).norm().item(),
        "infeasibility_v": (-G(v)).clamp_min(0).norm().item(),
        "split": (u - v).norm().item(),
    }


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of every output: (C,)."""
    return (a * b).sum(dim=(0, 1, 2))


def _check(problem: Problem, penalty: Penalty, inner: str) -> None:
    choose(dict.fromkeys(PRECONDITIONERS), inner, "inner solver of CRONOS")
    if problem.loss != "squared":
        raise RecipeError(f"CRONOS as published takes the squared loss, not {problem.loss!r}: use method='admm' or 'auto'")
    if problem.intercept:
        raise RecipeError("CRONOS as published has no intercept: append a column of ones to X, or use method='admm'")
    if penalty.norm != "columns" and problem.Y.shape[1] > 1:
        raise RecipeError(f"CRONOS as published is one-vs-all: norm='columns' is wanted, not {penalty.norm!r}")
