"""The steps of the repaired splitting: the exact u-step, the proximal operators of the losses, balanced penalties.

The formulas are in `admm`'s docstring; this file holds what one iteration computes, `admm` when to stop and what to report.
Layout: weights (signs, P, d, C), margins G u (signs, P, n, C), fits (n, C); signs = 2 with the ReLU's cones, 1 gated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lplr.convex import cones
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem

ALPHA = 1.6  # over-relaxation
DENSE = 6000  # samples up to which the n x n system is factored
INNER = 200  # conjugate-gradient steps at most
FLOOR = 1e-4  # of n times the weight of a sample's fit
SCALE = 5.0  # the most by which a penalty changes at once


class Splitting:
    """The u-step: factors of one problem at given penalties, shared by all iterations between two changes of them."""

    def __init__(self, problem: Problem) -> None:
        self.problem, X = problem, problem.X
        self.relu = problem.activation == "relu"
        self.signs = 2 if self.relu else 1
        self.sign = cones.signs(problem.D, X.dtype)[:, :, None]  # (P, n, 1)
        self.dense = len(X) <= DENSE
        self.spectrum = torch.linalg.eigh(X.T @ X) if self.relu or not self.dense else None
        D = problem.D.to(X.dtype)
        self.same = self.signs * (D @ D.T) if self.dense else X[:0]
        self.none = torch.zeros_like(problem.Y[0])
        self.inner = 0  # conjugate-gradient steps so far

    def forward(self, u: Tensor) -> Tensor:
        """F u (n, C) of u (signs, P, d, C)."""
        return self.problem.fit(u if self.relu else u[0], self.none)

    def backward(self, T: Tensor) -> Tensor:
        """F^T T."""
        found = self.problem.adjoint(T)
        return cones.both_signs(found) if self.relu else found[None]

    def margins(self, u: Tensor) -> Tensor:
        """G u (2, P, n, C)."""
        return (self.problem.X @ u) * self.sign

    def lift(self, s: Tensor) -> Tensor:
        """G^T s."""
        return self.problem.X.T @ (s * self.sign)

    def set(self, rho1: float, rho2: float, w: Tensor) -> None:
        """Factors for new penalties; w (n, 1) is the weight of every sample's fit."""
        self.rho1, self.rho2, self.w, self.extra = rho1, rho2, w, w.mean().item() / 2
        if not self.dense:
            return
        X = self.problem.X
        H = X @ self.block(X.T) if self.relu else (X @ X.T) / rho1
        S = H * self.same
        S.diagonal().add_(1 / w[:, 0])
        self.factor = torch.linalg.cholesky(S)
        ones = torch.ones_like(X[:, :1])
        self.ones = torch.cholesky_solve(ones, self.factor)

    def block(self, r: Tensor, extra: float = 0.0) -> Tensor:
        """(rho1 I + (rho2 + extra) X^T X)^{-1} r, r (..., d, k)."""
        if self.spectrum is None:
            return r / self.rho1
        values, basis = self.spectrum
        curvature = (self.rho2 if self.relu else 0.0) + extra
        return basis @ ((basis.T @ r) / (self.rho1 + curvature * values)[:, None])

    def solve(self, r: Tensor, t: Tensor, u: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """u, b minimising w/2 ||F u + 1 b^T - t||^2 + 1/2 <u, M u> - <r, u>; u is where conjugate gradients begin."""
        if not self.dense:
            return self._iterate(r, t, u, tol)
        first = self.block(r)
        tau = torch.cholesky_solve(self.forward(first) - t, self.factor)
        b = self.none
        if self.problem.intercept:
            b = -tau.sum(0) / self.ones.sum()
            tau = tau + self.ones * b
        return first - self.block(self.backward(tau)), b

    def _iterate(self, r: Tensor, t: Tensor, u: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """Preconditioned conjugate gradients to a relative residual `tol`; the intercept is eliminated by centring."""

        def centred(T: Tensor) -> Tensor:
            return T - (self.w * T).sum(0) / self.w.sum() if self.problem.intercept else T

        def apply(x: Tensor) -> Tensor:
            curved = self.problem.X.T @ (self.problem.X @ x) * self.rho2 if self.relu else 0.0
            return self.backward(self.w * centred(self.forward(x))) + self.rho1 * x + curved

        right = r + self.backward(self.w * centred(t))
        left = right - apply(u)
        goal, z = tol * right.norm(), self.block(left, self.extra)
        p, rz = z, (left * z).sum()
        for _ in range(INNER):
            if left.norm() <= goal:
                break
            Ap = apply(p)
            step = rz / (p * Ap).sum()
            u, left = u + step * p, left - step * Ap
            z = self.block(left, self.extra)
            rz, old = (left * z).sum(), rz
            p = z + (rz / old) * p
            self.inner += 1
        b = (self.w * (t - self.forward(u))).sum(0) / self.w.sum() if self.problem.intercept else self.none
        return u, b


@dataclass
class Iterate:
    """u, v (signs, P, d, C), b (C,); s (signs, P, n, C); z (n, C); mu, nu, zeta: scaled multipliers of the three splits."""

    u: Tensor
    v: Tensor
    mu: Tensor
    b: Tensor
    s: Tensor | None = None
    nu: Tensor | None = None
    z: Tensor | None = None
    zeta: Tensor | None = None


@dataclass(frozen=True)
class Residuals:
    """Relative primal and dual residuals of the splits u = v, G u = s, F u + b = z; 0 where a split is absent."""

    weights: tuple[float, float]
    cones: tuple[float, float] = (0.0, 0.0)
    fit: tuple[float, float] = (0.0, 0.0)

    @property
    def worst(self) -> float:
        return max(*self.weights, *self.cones, *self.fit)


def step(problem: Problem, penalty: Penalty, split: Splitting, at: Iterate, accuracy: float = 1e-8) -> Residuals:
    """One iteration of ADMM in place; residuals of its splits."""
    r = split.rho1 * (at.v - at.mu)
    if at.s is not None and at.nu is not None:
        r = r + split.rho2 * split.lift(at.s - at.nu)
    t = problem.Y if at.z is None or at.zeta is None else at.z - at.zeta
    at.u, at.b = split.solve(r, t, at.u, accuracy)
    relaxed, old = ALPHA * at.u + (1 - ALPHA) * at.v, at.v
    at.v = _prox(penalty, split, relaxed + at.mu)
    at.mu = at.mu + relaxed - at.v
    weights = _relative(at.u, at.v, at.v - old, at.mu)
    cone, fit = (0.0, 0.0), (0.0, 0.0)
    if at.s is not None and at.nu is not None:
        margins, old = split.margins(at.u), at.s
        relaxed = ALPHA * margins + (1 - ALPHA) * at.s
        pushed = relaxed + at.nu
        at.s = pushed.clamp_min(0)
        at.nu = pushed - at.s
        cone = _relative(margins, at.s, at.s - old, at.nu)
    if at.z is not None and at.zeta is not None:
        Z, old = split.forward(at.u) + at.b, at.z
        pushed = ALPHA * Z + (1 - ALPHA) * at.z + at.zeta
        at.z = PROX[problem.loss](pushed, problem.Y, split.w * len(problem.X))
        at.zeta = pushed - at.z
        fit = _relative(Z, at.z, at.z - old, at.zeta)
    return Residuals(weights, cone, fit)


def rebalance(problem: Problem, split: Splitting, at: Iterate, residuals: Residuals) -> None:
    """Every penalty moves towards equal primal and dual residuals of its own split; scaled multipliers follow."""
    change1, change2, w = _change(*residuals.weights), _change(*residuals.cones), split.w
    if at.z is not None and at.zeta is not None:
        w = CURVATURE[problem.loss](at.z, problem.Y).clamp_min(FLOOR) / len(at.z)
        at.zeta = at.zeta * split.w / w
    elif max(abs(math.log(change1)), abs(math.log(change2))) < math.log(1.2):
        return
    split.set(split.rho1 * change1, split.rho2 * change2, w)
    at.mu = at.mu / change1
    at.nu = None if at.nu is None else at.nu / change2


def _change(primal: float, dual: float) -> float:
    if primal <= 0 or dual <= 0:
        return 1.0
    return min(max(math.sqrt(primal / dual), 1 / SCALE), SCALE)


def _relative(left: Tensor, right: Tensor, moved: Tensor, multiplier: Tensor) -> tuple[float, float]:
    """||left - right|| and the move of right, relative to the sizes of the vectors and of the scaled multiplier."""
    tiny = 1e-300
    size = max(left.norm().item(), right.norm().item(), tiny)
    return (left - right).norm().item() / size, moved.norm().item() / max(multiplier.norm().item(), tiny)


def _prox(penalty: Penalty, split: Splitting, z: Tensor) -> Tensor:
    """prox of g / rho1; the cone is the other split's."""
    return cones.shrink(z, penalty.lam / split.rho1) if split.relu else penalty.prox(z[0], 1 / split.rho1)[None]


def curvature_logistic(z: Tensor, Y: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    return p * (1 - p)


def curvature_softmax(z: Tensor, Y: Tensor) -> Tensor:
    p = torch.softmax(z, 1)
    return (p * (1 - p)).amax(1, keepdim=True)


def prox_logistic(x: Tensor, Y: Tensor, weight: Tensor) -> Tensor:
    """argmin_z log(1 + exp(-y z)) + weight/2 (z - x)^2 of every entry: Newton kept inside a shrinking bracket."""
    low = Y * x  # in m = y z the derivative weight (m - low) - sigmoid(-m) rises from below zero at low
    high, start, last = low + 1 / weight, low, torch.full_like(low, math.inf)
    m = low
    for _ in range(100):
        slope = torch.sigmoid(-m)
        value = weight * (m - start) - slope
        low, high = torch.where(value <= 0, m, low), torch.where(value >= 0, m, high)
        move = -value / (weight + slope * (1 - slope))
        halved = (m + move < low) | (m + move > high) | (move.abs() > last / 2)  # Newton's steps may cycle: bisect
        halved &= move.abs() > 1e-15 * (1 + m.abs())
        move = torch.where(halved, (low + high) / 2 - m, move)
        m, last = m + move, torch.where(halved, (high - low), move.abs())
        if (move.abs() <= 1e-14 * (1 + m.abs())).all():
            break
    return Y * m


def prox_softmax(x: Tensor, Y: Tensor, weight: Tensor) -> Tensor:
    """argmin_z logsumexp(z) - <y, z> + weight/2 ||z - x||^2 of every row: damped Newton, Sherman and Morrison's inverse."""
    z = x.clone()

    def value(z: Tensor) -> Tensor:
        return torch.logsumexp(z, 1) - (Y * z).sum(1) + weight[:, 0] / 2 * (z - x).square().sum(1)

    for _ in range(50):
        p = torch.softmax(z, 1)
        g = p - Y + weight * (z - x)
        scaled, along = g / (weight + p), p / (weight + p)  # (diag(p) + weight I - p p^T)^{-1} g
        delta = scaled + along * ((p * scaled).sum(1) / (1 - (p * along).sum(1)))[:, None]
        length, start, slope = torch.ones_like(z[:, 0]), value(z), (g * delta).sum(1)
        for _ in range(30):
            bad = value(z - length[:, None] * delta) > start - 1e-4 * length * slope + 1e-14 * (1 + start.abs())
            if not bad.any():
                break
            length = torch.where(bad, length / 2, length)
        z = z - length[:, None] * delta
        if delta.abs().max() <= 1e-13 * (1 + z.abs().max()):
            break
    return z


CURVATURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"logistic": curvature_logistic, "softmax": curvature_softmax}
PROX: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"logistic": prox_logistic, "softmax": prox_softmax}
