"""Restarted FISTA in matrix-product form: for every loss and penalty, for large n, for GPUs.

    V = U + beta (U - U_old);   U_new = prox_{penalty / L}(V - grad h(V) / L),   h(U) = min_b f(A U + 1 b^T; Y)

beta = (t_old - 1) / t, t = (1 + sqrt(1 + 4 t_old^2)) / 2.  h, the loss with the intercept minimised out, is convex and as
smooth as f in U, grad h = A^T grad f(A U + 1 b*^T).  Fits are linear, A V = A U + beta A (U - U_old), so an iteration costs
one product A U and one A^T T.  L starts at curvature / n * ||A||_2^2 and then follows what the steps see, which costs
nothing either: with

    kappa = <grad f(A U_new) - grad f(A V), A U_new - A V> / ||U_new - V||^2

a step with kappa > L is taken again with a larger L, and kappa < L / 2 lowers it.  Momentum restarts when the gradient mapping
opposes it: <V - U_new, U_new - U> > 0.  Every 20 iterations the duality gap is measured; it alone ends the run.
With the ReLU's cones the prox is shrink o Pi_K (`cones`), affordable for small problems.
Source: Beck, Teboulle, SIAM J. Imaging Sci. 2009; O'Donoghue, Candes, "Adaptive restart for accelerated gradient schemes", 2015;
Scheinberg, Goldfarb, Bai, "Fast first-order methods for composite convex optimization with
backtracking", 2014 (L in both directions).
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lplr.convex import cones
from lplr.convex.certificate import dual_point
from lplr.convex.losses import LOSSES, smoothness
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Callback, Run, Solution
from lplr.errors import RecipeError

CHECK = 20  # iterations between gap tests
POWER, MARGIN = 20, 1.05  # power iterations for the first L
GROWTH, LOOSE, SHRINK = 1.3, 0.5, 0.9
MAX_ITER = 20_000
STALL = 100  # gap tests without a better gap
CONES = 2_000_000  # entries of X times gates and outputs up to which cones are projected onto at every step


def fista(
    problem: Problem,
    penalty: Penalty,
    *,
    tol: float = 1e-6,
    max_iter: int | None = None,
    warm: Solution | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Minimise f + penalty to a relative duality gap `tol`, in the precision of X; max_iter is 20,000 unless given.

    Raises RecipeError for "relu" on a problem whose projections would not be affordable.
    """
    if problem.activation == "relu" and problem.X.numel() * problem.D.shape[1] * problem.Y.shape[1] > CONES:
        raise RecipeError("FISTA projects onto every cone at every step, too slow at this size: use method='admm' for relu")
    run = Run(problem, penalty, tol, MAX_ITER if max_iter is None else max_iter, callback, time.perf_counter())
    state = State(problem, penalty, warm)
    run.certify(state.U, state.b)
    tests = 0
    best = float("inf")
    while not run.over:
        for _ in range(min(CHECK, run.limit - run.count)):
            state.step()
            run.count += 1
        primal, dual = state.gap()
        run.record(primal=primal, dual=dual, lipschitz=state.L)
        tests = 0 if primal - dual < best else tests + 1
        best = min(best, primal - dual)
        if primal - dual <= tol * abs(primal) or tests >= STALL:
            run.stalled = not run.certify(state.U, state.b) and tests >= STALL
    if not run.reached:
        run.certify(state.U, state.b)
    return run.finish("raise max_iter or tol")


class State:
    """The iterate: weights U, their fit Z = A U without the intercept b, the step before, the momentum t and the constant L."""

    def __init__(self, problem: Problem, penalty: Penalty, warm: Solution | None = None) -> None:
        self.problem, self.penalty, self.loss = problem, penalty, LOSSES[problem.loss]
        P, d, C = problem.shape
        self.relu = problem.activation == "relu"
        like = problem.Y
        self.U = torch.zeros(*((2,) if self.relu else ()), P, d, C, dtype=like.dtype, device=like.device)
        self.none = torch.zeros_like(like[0])
        self.b = self.none
        self.Z = torch.zeros_like(like)
        if warm is not None:
            self.U, self.b = warm.U.to(self.U).clone(), warm.b.to(self.b).clone()
            if self.relu:
                self.U = cones.repair(self.U, problem.X, problem.D)
            self.Z = problem.fit(self.U, self.none)
        self.b = self.intercept(self.Z)
        self.t, self.old, self.old_fit = 1.0, self.U, self.Z
        self.smooth = smoothness(self.loss, len(like))
        self.L = MARGIN * self.smooth * squared_norm(problem) * (2 if self.relu else 1)
        self.L = max(self.L, torch.finfo(like.dtype).tiny ** 0.5)

    def intercept(self, Z: Tensor) -> Tensor:
        return self.loss.intercept(Z, self.problem.Y, self.b) if self.problem.intercept else self.none

    def pull(self, T: Tensor) -> Tensor:
        found = self.problem.adjoint(T)
        return cones.both_signs(found) if self.relu else found

    def prox(self, V: Tensor) -> Tensor:
        if self.relu:
            return cones.prox(V, self.problem.X, self.problem.D, self.penalty.lam / self.L)
        return self.penalty.prox(V, 1 / self.L)

    def step(self) -> None:
        """One iteration; a step that disproves L is taken again with a larger one."""
        t = (1 + (1 + 4 * self.t**2) ** 0.5) / 2
        beta = (self.t - 1) / t
        V = torch.add(self.U, self.U - self.old, alpha=beta) if beta else self.U
        fit = torch.add(self.Z, self.Z - self.old_fit, alpha=beta) if beta else self.Z
        b = self.intercept(fit)
        residual = self.loss.gradient(fit + b, self.problem.Y)
        gradient = self.pull(residual)
        while True:
            U = self.prox(torch.sub(V, gradient, alpha=1 / self.L))
            Z = self.problem.fit(U, self.none)
            moved, curved = (U - V).square().sum(), ((self.loss.gradient(Z + b, self.problem.Y) - residual) * (Z - fit)).sum()
            if not self._disproved(curved, moved, Z):
                break
            self.L *= GROWTH
        if curved < LOOSE * self.L * moved:
            self.L *= SHRINK
        self.t = t if ((V - U) * (U - self.U)).sum() <= 0 else 1.0
        self.old, self.old_fit, self.U, self.Z = self.U, self.Z, U, Z

    def _disproved(self, curved: Tensor, moved: Tensor, Z: Tensor) -> bool:
        """curved > L moved, beyond what rounding of the fits explains."""
        noise = self.smooth * (100 * torch.finfo(Z.dtype).eps) ** 2 * Z.square().sum()
        return bool(curved > self.L * moved * (1 + 1e-5) + noise)

    def gap(self) -> tuple[float, float]:
        """Primal and dual values at U, in the working precision; sets b."""
        self.b = self.intercept(self.Z)
        Z = self.Z + self.b
        primal = self.loss.value(Z, self.problem.Y) + self.penalty.value(self.U)
        return primal, dual_point(self.problem, self.penalty, -self.loss.gradient(Z, self.problem.Y))[1]


def squared_norm(problem: Problem, steps: int = POWER) -> float:
    """||A||_2^2 from below, A = (A_1 ... A_P): power iterations on A A^T from the fit of constant weights."""
    one = Problem(problem.X, problem.Y[:, :1], problem.D)
    v = 1 + torch.rand(len(problem.Y), 1, dtype=problem.Y.dtype, generator=torch.Generator().manual_seed(0)).to(problem.Y.device)
    size = 0.0
    for _ in range(steps):
        v = v / v.norm()
        w = one.fit(one.adjoint(v), torch.zeros_like(v[0]))
        size, old = w.norm().item(), size
        if size == 0 or abs(size - old) <= 1e-3 * size:
            break
        v = w
    return size
