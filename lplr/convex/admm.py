"""CRONOS repaired: the same splitting; exact u-steps, two balanced penalties, over-relaxation, warm starts, a certificate.

    min f(Z; Y) + g(v) + 1(s >= 0)   s.t.  v = u,  s_i = G_i u_i,  Z = sum_{s,i} (+-) D_i X u_{s,i} + 1 b^T

(gated: no s, one sign).  In scaled form, with alpha = 1.6 and u_hat = alpha u + (1 - alpha) v, likewise for G u:

    u, b  = argmin w/2 ||F u + 1 b^T - t||^2 + rho1/2 ||u - v + mu||^2 + rho2/2 ||G u - s + nu||^2
    v     = prox_{g / rho1}(u_hat + mu);       mu += u_hat - v
    s     = (G u_hat + nu)_+;                  nu += G u_hat - s

Squared loss: w = 1/n, t = Y, the loss sits in the u-step itself.  Others are split once more, z = F u + 1 b^T, with w = rho0 and
z = prox_{f / rho0}.  As (2 D_i - I)^2 = I, G_i^T G_i = X^T X for every gate, so the quadratic without the loss is one d x d block
M = rho1 I + rho2 X^T X, repeated, and by Woodbury, with r = rho1 (v - mu) + rho2 G^T (s - nu),

    u = M^{-1}(r - F^T tau),   S tau = F M^{-1} r - t + 1 b^T,   S = diag(1/w) + signs (X M^{-1} X^T) o (D D^T),

1^T tau = 0 gives b: one n x n Cholesky factor per change of a penalty, two products with X an iteration.  Beyond
`splitting.DENSE` samples the system is solved by conjugate gradients, preconditioned by the block M + (w/2) X^T X and started
from the last u.  The v that comes out is projected onto the cones, and where the problem is of moderate size its last digits are
semismooth Newton's (`cone_newton`), which takes over once the residuals are small: ADMM finds the active groups, Newton the
figures.
Source: Feng, Frangella, Pilanci, "CRONOS: Enhancing deep learning with scalable GPU accelerated convex neural networks", NeurIPS
2024 (the splitting); Boyd et al., "Distributed optimization and statistical learning via ADMM", 2011, sections 3.3, 3.4.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from lplr.convex import cones
from lplr.convex.cone_newton import State, polish
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Callback, Run, Solution
from lplr.convex.splitting import Iterate, Residuals, Splitting, rebalance, step

NEWTON_SIZE = 6000  # samples times outputs up to which Newton's method takes over
HANDOVER = 1e-2  # relative residuals at which it does
SIGMA = 10.0  # Newton's first proximal step, times n
CHECK = 25  # iterations between certificates
FIRST_BALANCE, RATE = 10, 1.5  # penalties are balanced at this iteration, then whenever the count has grown by this factor
MAX_ITER = 4000
FIT, FIRST = 0.25, 0.5  # first penalties: rho0 = FIT / n of the fit, rho1 = rho2 = FIRST / n of the other two


def admm(
    problem: Problem,
    penalty: Penalty,
    *,
    tol: float = 1e-6,
    max_iter: int | None = None,
    warm: Solution | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Minimise f(Z; Y) + penalty until the certified relative duality gap is at most tol, or max_iter steps (4000).

    `warm` is a Solution of a problem of the same shapes; a callback that returns True ends the run.  Steps counted are those of
    ADMM and of Newton's method together.  A result that is not "converged" is feasible and certified all the same.
    """
    run = Run(problem, penalty, tol, MAX_ITER if max_iter is None else max_iter, callback, time.perf_counter())
    wide = replace(problem, X=problem.X.double(), Y=problem.Y.double())
    split = Splitting(wide)
    at = begin(wide, split, warm)
    newton = split.relu and wide.Y.numel() <= NEWTON_SIZE
    _iterate(run, wide, split, at, HANDOVER if newton else 0.0)
    if newton and not run.over:
        _newton(run, wide, split, at)
    elif not run.reached:
        _certify(run, split, at)
    return run.finish("raise max_iter or tol")


def begin(problem: Problem, split: Splitting, warm: Solution | None) -> Iterate:
    """Zero, or the point of an earlier Solution with the multipliers that its dual vector implies."""
    n = len(problem.Y)
    split.set(FIRST / n, FIRST / n, (1.0 if problem.loss == "squared" else FIT) / n * torch.ones_like(problem.Y[:, :1]))
    u, b = split.backward(torch.zeros_like(problem.Y)), torch.zeros_like(problem.Y[0])
    if warm is not None:
        u = (warm.U if split.relu else warm.U[None]).to(u).clone()
        b = warm.b.to(b).clone() if problem.intercept else b
    at = Iterate(u, u.clone(), torch.zeros_like(u), b)
    if split.relu:
        at.s = split.margins(u).clamp_min(0)
        at.nu = torch.zeros_like(at.s)
    if warm is not None:  # stationarity in u at the warm point: rho1 mu + rho2 G^T nu = F^T theta
        pull = split.backward(warm.theta.to(u))
        at.mu = pull / split.rho1
        if split.relu:
            found = cones.projection(pull.mT, problem.X, split.sign.mT)
            at.mu, at.nu = found.point.mT / split.rho1, -found.multipliers.mT / split.rho2
    if problem.loss != "squared":
        at.z = split.forward(u) + at.b
        at.zeta = LOSSES[problem.loss].gradient(at.z, problem.Y) / split.w
    return at


def _iterate(run: Run, problem: Problem, split: Splitting, at: Iterate, goal: float) -> None:
    """ADMM until the relative residuals are at most goal; at goal 0, until the gap is small enough."""
    balance, check = FIRST_BALANCE, CHECK
    while not run.over:
        residuals = step(problem, run.penalty, split, at)
        run.count += 1
        if run.count == check and not goal:
            check += max(CHECK, check // 8)
            _certify(run, split, at)
        if run.count % CHECK == 0 or residuals.worst <= goal:
            _record(run, split, residuals)
        if residuals.worst <= goal:
            break
        if run.count == balance:
            balance = int(balance * RATE)
            rebalance(problem, split, at, residuals)


def _newton(run: Run, problem: Problem, split: Splitting, at: Iterate) -> None:
    """Semismooth Newton from the iterate; outputs that separate are solved one at a time, each to its share of the gap."""
    assert at.nu is not None
    C, n = problem.Y.shape[1], len(problem.Y)
    parts = list(torch.arange(C, device=at.v.device).split(1 if problem.loss == "squared" else C))
    V, b, theta = torch.zeros_like(at.v), torch.zeros_like(at.b), torch.zeros_like(problem.Y)
    for k, part in enumerate(parts):
        one = replace(problem, Y=problem.Y[:, part])
        start = cones.repair(at.v[..., part], problem.X, problem.D)
        dual = -LOSSES[problem.loss].gradient(one.fit(start, at.b[part]), one.Y)
        multipliers = (-split.rho2 * at.nu[..., part]).clamp_min(0).mT * (SIGMA * n)
        state, before = State(start, at.b[part], dual, multipliers), run.count

        def watch(state: State, before: int = before) -> bool:
            run.count = before + state.steps
            run.record(primal=state.primal, dual=state.dual)
            return run.stopped

        steps = max(1, (run.limit - run.count) // (len(parts) - k))
        polish(one, run.penalty, state, tol=run.tol / 2, max_steps=steps, sigma=SIGMA, watch=watch)
        V[..., part], b[part], theta[:, part] = state.best_V, state.best_b, state.best_theta
    run.certify(V, b, theta)


def _certify(run: Run, split: Splitting, at: Iterate) -> None:
    """The gap at v, projected onto the cones."""
    run.certify(cones.repair(at.v, split.problem.X, split.problem.D) if split.relu else at.v[0], at.b)


def _record(run: Run, split: Splitting, residuals: Residuals) -> None:
    values = {"primal": run.primal, "dual": run.dual} if run.U.numel() else {}
    run.record(**values, residual=residuals.worst, rho1=split.rho1, rho2=split.rho2, inner=split.inner)
