"""Newton's method on the lengths of the weights: the default for moderate n, quadratically convergent, independent of d and P d.

    lam ||u|| = min_{eta >= 0} lam/2 (||u||^2 / eta + eta)   turns the programme, the loss replaced by its quadratic model at Z
    m(Z') = f(Z) + <g, Z' - Z> + 1/2 <Z' - Z, H (Z' - Z)>,   into   min_{eta >= 0} F(eta),   F convex in P variables:

    F(eta) = min_{U, b} m(A U + 1 b^T) + lam/2 sum (||U_i||^2 / eta_i + eta_i)
    (H^{-1} + G) theta + 1 b^T = Z - H^{-1} g,  1^T theta = 0,   U_i = eta_i A_i^T theta / lam
    G = (X X^T) o (D diag(eta) D^T) / lam
    dF/d eta_i = (lam^2 - ||A_i^T theta||^2) / (2 lam),   F'' = W^T B W / lam^2,   W_i = A_i A_i^T theta,   B = (H^{-1} + G)^{-1},

B restricted to 1^T theta = 0 with an intercept.  A step solves a quadratic programme over eta >= 0 (P unknowns) and searches
along it: Newton's step for the equations 1 / ||A_i^T theta|| = 1 / lam, which are nearly linear in eta (exactly so for one
gate of rank one), and has the matrix F'' and the right side lam r^2 (1 - r), r_i = ||A_i^T theta|| / lam, or else Newton's
own, lam/2 (1 - r^2).  Squared loss: m = f, nothing else is needed; theta is the dual point.  Otherwise f is modelled anew
after each step, at a point between the old weights and the new.  It is a descent method: with eta_i = ||U_i||, m(U_new) <=
F(eta_new) <= F(eta) <= m(U).

One step costs C Cholesky factors of n x n (one, where all outputs share H and eta), whatever d is.  Softmax: H = diag(h) - n
h h^T for each sample, h = p / n, and with E_c = (diag(h_c)^{-1} + G_c)^{-1}: B = E - E R (R^T E R)^{-1} R^T E, R = stacked
identities.  Norms "group" (eta_i for a gate) and "columns" (eta_ic for a gate and output).
Source: the variational form: Micchelli, Pontil, JMLR 2005; Bach et al., "Optimization with sparsity-inducing penalties",
2012, section 5; B for softmax:
Rasmussen, Williams, "Gaussian processes for machine learning", 2006, section 3.5; the secular form: More, Sorensen,
"Computing a trust region step", 1983, for one eta.  Newton on F: here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.convex.certificate import dual_point
from lplr.convex.fista import State
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Callback, Run, Solution
from lplr.errors import RecipeError

FIRST = 20  # steps of FISTA that find the scale of the lengths
MAX_ITER = 100
HALVINGS, SECULAR = 30, 3  # trials of a length along Newton's step, along the secular one
NEAR = 1e-3  # gates within this of the dual's boundary may enter
ROUNDING = 1e-11  # of F: what its values may be off by
RIDGE = 1e-10  # of the mean of the diagonal of F''


def newton(
    problem: Problem,
    penalty: Penalty,
    *,
    tol: float = 1e-6,
    max_iter: int | None = None,
    warm: Solution | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Minimise f + penalty to a relative duality gap `tol` in float64, in at most max_iter (100) Newton steps.

    Memory: about 4 + 2 C matrices n x n (softmax), 5 otherwise.  Raises RecipeError for "relu" and for the nuclear norm.
    """
    if problem.activation == "relu" or (penalty.norm == "nuclear" and problem.Y.shape[1] > 1):
        raise RecipeError(
            "newton takes gated programmes with norm group or columns: use method='admm' for relu, 'fista' for nuclear"
        )
    run = Run(problem, penalty, tol, MAX_ITER if max_iter is None else max_iter, callback, time.perf_counter())
    wide = replace(problem, X=problem.X.to(problem.Y.device, torch.float64), Y=problem.Y.double())
    state = State(wide, penalty, warm)
    if warm is None or not warm.U.any():
        for _ in range(FIRST):
            state.step()
    state.gap()
    if problem.loss == "squared" and penalty.norm == "columns" and problem.Y.shape[1] > 1:
        return _separately(run, wide, penalty, state)
    _descend(run, wide, penalty, state.U, state.b)
    return run.finish("raise max_iter or tol")


def _descend(run: Run, problem: Problem, penalty: Penalty, U: Tensor, b: Tensor) -> None:
    """Newton steps from U, b until the run is over."""
    K = problem.X @ problem.X.T
    at = _Point(problem, penalty, U, b)
    _look(run, at, None)
    system = None
    while not run.over:
        try:
            if system is None or problem.loss != "squared":
                system = System(problem, penalty, K, Model(problem, at.Z), penalty.lengths(at.U))
            system = step(system)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]  # lam is nothing in this precision
            system = None
        if system is None:
            run.stalled = True
            break
        run.count += 1
        new = _Point(problem, penalty, system.U, system.b)
        if problem.loss != "squared":
            new = _between(at, new, system.value)
        run.stalled = new is None
        at = new or at
        _look(run, at, system.theta)
    if not run.reached:
        run.certify(at.U, at.b, None if system is None else system.theta)


def _look(run: Run, at: _Point, theta: Tensor | None) -> None:
    """Gap at a point, by the better of theta and the residual's dual point; a certificate where it is small enough."""
    problem = at.problem
    found = [] if theta is None else [(dual_point(problem, at.penalty, theta)[1], theta)]
    if theta is None or problem.loss != "squared":  # theta is the residual of the squared loss
        residual = -LOSSES[problem.loss].gradient(at.Z, problem.Y)
        found.append((dual_point(problem, at.penalty, residual)[1], residual))
    dual, theta = max(found, key=lambda pair: pair[0])
    run.record(primal=at.value, dual=dual, active=int((at.penalty.lengths(at.U) > 0).sum()))
    if at.value - dual <= run.tol * abs(at.value):
        run.certify(at.U, at.b, theta)


def _separately(run: Run, problem: Problem, penalty: Penalty, state: State) -> Solution:
    """Squared loss, one-vs-all: every output is a programme of its own, to its share of the gap, in at most max_iter steps."""
    parts = []
    for c in range(problem.Y.shape[1]):
        one = replace(problem, Y=problem.Y[:, c : c + 1])
        part = Run(one, penalty, run.tol, run.limit, run.callback, run.start)
        U, b = state.U[..., c : c + 1], state.b[c : c + 1]
        if run.stopped:
            part.certify(U, b)
        else:
            _descend(part, one, penalty, U, b)
        parts.append(part)
        run.count += part.count
        run.history += part.history
        run.stopped, run.stalled = run.stopped or part.stopped, run.stalled or part.stalled
    run.limit *= problem.Y.shape[1]
    run.certify(torch.cat([p.U for p in parts], -1), torch.cat([p.b for p in parts]), torch.cat([p.theta for p in parts], 1))
    return run.finish("raise max_iter or tol")


class _Point:
    """Weights, intercept, fit and objective."""

    def __init__(self, problem: Problem, penalty: Penalty, U: Tensor, b: Tensor, Z: Tensor | None = None) -> None:
        self.problem, self.penalty, self.U, self.b = problem, penalty, U, b
        self.Z = problem.fit(U, b) if Z is None else Z
        self.value = LOSSES[problem.loss].value(self.Z, problem.Y) + penalty.value(U)


def _between(old: _Point, new: _Point, goal: float) -> _Point | None:
    """The first point from new towards old that decreases the objective enough; None where there is none."""
    gain = old.value - goal
    for halvings in range(HALVINGS):
        s = 0.5**halvings
        mixed = [torch.lerp(a, z, s) for a, z in ((old.U, new.U), (old.b, new.b), (old.Z, new.Z))]
        trial = new if s == 1 else _Point(old.problem, old.penalty, *mixed)
        if trial.value <= old.value - 1e-4 * s * gain and trial.value < old.value:
            return trial
    return None


@dataclass
class Model:
    """The quadratic model of the loss at Z: gradient g, H = diag(h), or for softmax diag(h) - n h h^T of every sample."""

    problem: Problem
    Z: Tensor

    def __post_init__(self) -> None:
        problem, Z, n = self.problem, self.Z, len(self.Z)
        self.f, self.g = LOSSES[problem.loss].value(Z, problem.Y), LOSSES[problem.loss].gradient(Z, problem.Y)
        self.coupled = problem.loss == "softmax"
        if problem.loss == "squared":
            self.h = torch.full_like(Z, 1 / n)
        elif self.coupled:
            self.h = torch.softmax(Z, 1) / n
        else:
            self.h = torch.sigmoid(Z) * torch.sigmoid(-Z) / n

    def apply(self, v: Tensor) -> Tensor:
        """H v (n, C)."""
        return self.h * (v - len(v) * (self.h * v).sum(1, keepdim=True)) if self.coupled else self.h * v


class System:
    """theta, U, b and F at eta (P, 1) or (P, C), with the factors that give B."""

    def __init__(self, problem: Problem, penalty: Penalty, K: Tensor, model: Model, eta: Tensor) -> None:
        self.problem, self.penalty, self.K, self.model, self.eta = problem, penalty, K, model, eta
        self._factor()
        start = model.apply(model.Z) - model.g
        theta = start - self._inverse(self._fit(problem.adjoint(start))[:, :, None])[:, :, 0]  # B H^{-1} start
        self.b = torch.zeros_like(theta[0])
        if problem.intercept:
            self.b = self.centre @ theta.sum(0)
            theta = theta - self.ones @ self.b
        self.theta, self.pulled = theta, problem.adjoint(theta)
        self.U = eta[:, None, :] / penalty.lam * self.pulled
        smooth = self._fit(self.pulled)
        moved = smooth + self.b - model.Z
        self.value = model.f + (0.5 * moved * (model.g - theta) + 0.5 * theta * smooth).sum().item()
        self.value += penalty.lam / 2 * eta.sum().item()

    def _fit(self, pulled: Tensor) -> Tensor:
        """G T from A^T T."""
        return self.problem.fit(self.eta[:, None, :] / self.penalty.lam * pulled, torch.zeros_like(pulled[0, 0]))

    def _factor(self) -> None:
        """Cholesky factors of I + h^{1/2} G h^{1/2}, shared by all outputs where h and eta are; softmax: E_c and R^T E R."""
        problem, model, (n, C) = self.problem, self.model, self.model.Z.shape
        self.roots = model.h.sqrt()
        shared = problem.loss == "squared" and self.eta.shape[1] == 1
        self.factors = []
        similarity = None
        for c in range(1 if shared else C):
            if similarity is None or self.eta.shape[1] > 1:
                similarity = self._similarity(self.eta[:, min(c, self.eta.shape[1] - 1)])
            S = similarity * self.roots[:, c]
            S *= self.roots[:, c, None]
            S.diagonal().add_(1)
            self.factors.append(torch.linalg.cholesky(S))
        if model.coupled:
            self.E = [torch.cholesky_inverse(L) * self.roots[:, c] * self.roots[:, c, None] for c, L in enumerate(self.factors)]
            self.factors = []
            self.sum = torch.linalg.cholesky(torch.stack(self.E).sum(0) if C < 3 else sum(self.E[1:], self.E[0]))
        if problem.intercept:
            self.ones = self._inverse(torch.eye(C, dtype=S.dtype, device=S.device).expand(n, C, C))  # (n, C, C)
            self.centre = torch.linalg.pinv(self.ones.sum(0), rtol=1e-10, hermitian=True)

    def _similarity(self, eta: Tensor) -> Tensor:
        """G (n, n)."""
        kept = eta > 0
        D = self.problem.D[:, kept].to(self.K.dtype)
        S = (D * (eta[kept] / self.penalty.lam)) @ D.T
        return S.mul_(self.K)

    def _inverse(self, R: Tensor) -> Tensor:
        """B R (n, C, k) without the intercept's constraint."""
        n, C, k = R.shape
        if self.model.coupled:
            out = torch.stack([E @ R[:, c] for c, E in enumerate(self.E)], 1)
            tau = torch.cholesky_solve(out.sum(1), self.sum)
            return out - torch.stack([E @ tau for E in self.E], 1)
        scaled = R * self.roots[:, :, None]
        if len(self.factors) == 1:
            out = torch.cholesky_solve(scaled.reshape(n, C * k), self.factors[0]).view(n, C, k)
        else:
            out = torch.stack([torch.cholesky_solve(scaled[:, c], L) for c, L in enumerate(self.factors)], 1)
        return out * self.roots[:, :, None]

    def curvature(self, free: Tensor) -> Tensor:
        """lam^2 F'' of the variables free (K, 2): gate and column of eta."""
        W = self._directions(free)
        if len(getattr(self, "factors", ())) == 1:  # one factor: half the work
            V = torch.linalg.solve_triangular(self.factors[0], (W * self.roots[:, :, None]).flatten(1), upper=False).view_as(W)
            M = torch.einsum("nck,ncl->kl", V, V) if W.shape[1] > 1 else V[:, 0].T @ V[:, 0]
        else:
            V = self._inverse(W)
            M = W.flatten(0, 1).T @ V.flatten(0, 1)
        if self.problem.intercept:
            along = torch.einsum("ncj,nck->jk", self.ones, W)
            M = M - along.T @ (self.centre @ along)
        return (M + M.T) / 2

    def _directions(self, free: Tensor) -> Tensor:
        """W (n, C, K)."""
        problem = self.problem
        gates, columns = free[:, 0], free[:, 1]
        D = problem.D[:, gates].to(self.K.dtype)
        if self.eta.shape[1] == 1:
            return torch.stack([(problem.X @ self.pulled[gates, :, c].T) * D for c in range(self.theta.shape[1])], 1)
        W = torch.zeros(len(D), self.eta.shape[1], len(free), dtype=D.dtype, device=D.device)
        W[:, columns, torch.arange(len(free), device=D.device)] = (problem.X @ self.pulled[gates, :, columns].T) * D
        return W


def step(system: System) -> System | None:
    """The system at the next eta: the secular step where it decreases F enough, else Newton's on F; None where neither does."""
    lam, eta = system.penalty.lam, system.eta
    ratios = system.penalty.lengths(system.pulled) / lam
    free = ((eta > 0) | (ratios > 1 - NEAR)).nonzero()
    if not len(free):
        return None
    at = (free[:, 0], free[:, 1])
    r = ratios[at]
    M = system.curvature(free) / lam**2
    M.diagonal().add_(RIDGE * M.diagonal().mean())
    gradient = lam / 2 * (1 - r.square())
    for right, trials in ((lam * r.square() * (1 - r), SECULAR), (gradient, HALVINGS)):
        goal = minimise(M, right, eta[at])
        slope = (gradient @ (goal - eta[at])).item()
        for halvings in range(trials if slope <= 0 else 0):
            trial = eta.clone()
            trial[at] = torch.lerp(eta[at], goal, 0.5**halvings)
            found = System(system.problem, system.penalty, system.K, system.model, trial)
            if found.value <= system.value + 1e-4 * 0.5**halvings * slope + ROUNDING * abs(system.value):
                return found
    return None


def minimise(H: Tensor, g: Tensor, x: Tensor, rounds: int = 30) -> Tensor:
    """argmin_{z >= 0} <g, z - x> + 1/2 (z - x)^T H (z - x), H positive definite, from x >= 0.

    Projected Newton steps, exact on all variables but those that are at zero, or close to it and falling; the arc is searched.
    They change many bounds at once, and mostly end it; where they jam, as with H nearly singular, an active-set method goes on.
    Source: Bertsekas, SIAM J. Control Optim. 1982; Lawson, Hanson, "Solving least squares problems", 1974, chapter 23.
    """
    z, value, diagonal = x, 0.0, H.diagonal().clamp_min(torch.finfo(H.dtype).tiny)
    for _ in range(rounds):
        gradient = g + H @ (z - x)
        wanted = (z - gradient / diagonal).clamp_min(0) - z
        worst = wanted.abs().max().item()
        if worst <= 1e-12 * z.max().item():
            return z
        free = ~((z <= min(worst, 1e-3 * z.max().item())) & (gradient > 0))
        delta = wanted.clone()
        delta[free] = -torch.linalg.solve(H[free][:, free], gradient[free])
        for halvings in range(HALVINGS):
            trial = (z + 0.5**halvings * delta).clamp_min(0)
            new = _quadratic(H, g, trial - x)
            if new < value:
                break
        else:
            break
        z, value = trial, new
    return _active_set(H, g, x, z)


def _active_set(H: Tensor, g: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """The same from z: one variable is set free, or bounded, at a time."""
    diagonal = H.diagonal().clamp_min(torch.finfo(H.dtype).tiny)
    free = z > 0
    for _ in range(3 * len(z)):
        delta = torch.zeros_like(z)
        at = free.nonzero()[:, 0]
        if len(at):
            gradient = (g + H @ (z - x))[at]
            delta[at] = -torch.linalg.solve(H[at][:, at], gradient)
        blocked = free & (z + delta <= 0)
        if blocked.any():
            length = (z[blocked] / -delta[blocked].clamp_max(-torch.finfo(z.dtype).tiny)).min()
            free = free & ~(blocked & (z + length * delta <= 1e-14 * z.max()))
            z = torch.where(free, z + length * delta, torch.zeros_like(z))
            continue
        z = z + delta
        wanted = torch.where(free, torch.zeros_like(z), -(g + H @ (z - x)) / diagonal)
        if wanted.max().item() <= 1e-12 * z.max().item():
            break
        free[wanted.argmax()] = True
    return z


def _quadratic(H: Tensor, g: Tensor, moved: Tensor) -> float:
    return (g @ moved + moved @ (H @ moved) / 2).item()
