"""The ReLU programme to a small duality gap: semismooth Newton on the dual, with exact projections onto the cones.

    min_{V, b} f(Z; Y) + g(V),   Z = sum_{s,i} (+-) D_i X V_{s,i} + 1 b^T,   g = lam sum ||V_{s,i,c}|| + 1_K

Proximal point (= method of multipliers on the dual): V+ = prox_{sigma g}(V + sigma A^T theta), b+ = b + sigma 1^T theta, where

    theta = argmin phi(theta) = f*(-theta) + [||prox_{sigma g}(V + sigma A^T theta)||^2 + ||b + sigma 1^T theta||^2] / (2 sigma)

for g positively homogeneous.  prox = shrink o Pi_K, and with J the rows of G with a positive multiplier, N an orthonormal basis
of the null space of X_J, z_hat = Pi_K(z) / ||Pi_K(z)|| and a = 1 - sigma lam / ||Pi_K(z)|| > 0, an element of its Jacobian is

    M = N (a I + (1 - a) (N^T z_hat)(N^T z_hat)^T) N^T = R R^T,   R = N (sqrt(a) I + (1 - sqrt(a)) (N^T z_hat)(N^T z_hat)^T),

so that phi'' = f*'' + sigma sum (D_i X R)(D_i X R)^T + sigma 1 1^T is solved by Woodbury in as many unknowns as the active groups
have free directions.  The multipliers rho of Pi_K(z) give the certificate for nothing: A^T theta + G^T rho / sigma
= (Pi_K(z) - V) / sigma bounds the dual norm, and tends to the norm lam of the dual vector as V settles.
Source: Li, Sun, Toh, "A highly efficient semismooth Newton augmented Lagrangian method for solving Lasso problems", SIAM Journal
on Optimization 2018, for the method; the Jacobian of shrink o Pi_K and the free certificate: derived here, held by tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lplr.convex import cones
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem

NEWTON, HALVINGS = 25, 25
SIGMA, GROWTH, SIGMA_MAX = 1.0, 3.0, 3e7  # times n
FLAT = 1e-10  # eigenvalues of X_J^T X_J below this, of the largest, span the null space
ROUNDING = 1e-15  # of phi: steps that gain less end a round
STALLS = 10  # proximal steps in a row that leave nine tenths of the gap
INSIDE = 0.95  # of the way to the edge of the conjugate's domain


@dataclass
class State:
    """V (2, P, d, C) feasible, b (C,), theta (n, C); multipliers (2, P, C, n) of the last projection; best values so far."""

    V: Tensor
    b: Tensor
    theta: Tensor
    multipliers: Tensor | None = None
    primal: float = float("inf")
    dual: float = -float("inf")
    steps: int = 0
    best_V: Tensor = field(init=False)
    best_b: Tensor = field(init=False)
    best_theta: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.best_V, self.best_b, self.best_theta = self.V, self.b, self.theta

    @property
    def gap(self) -> float:
        return self.primal - self.dual


@dataclass(frozen=True)
class _Point:
    """phi, its gradient and what the Hessian needs at one theta."""

    theta: Tensor
    value: float
    gradient: Tensor
    V: Tensor  # prox
    b: Tensor
    projected: Tensor  # Pi_K(z)
    multipliers: Tensor
    fit: Tensor


def polish(
    problem: Problem,
    penalty: Penalty,
    state: State,
    *,
    tol: float,
    max_steps: int,
    sigma: float = SIGMA,
    watch: Callable[[State], bool] | None = None,
) -> State:
    """Newton until primal - dual <= tol |primal| or max_steps linear systems; state is updated in place and returned.

    sigma (times n) is the first proximal step: large where V is near the optimum already.  watch sees the state after every
    proximal step; True ends the run.
    """
    n = len(problem.X)
    sigma, slow = sigma * n, 0
    while state.steps < max_steps:
        before = state.gap
        point, error = _round(problem, penalty, state, sigma, tol, max_steps, 0.1 ** (2 + 2 * slow))
        lost = error > state.gap and state.steps < max_steps  # nothing like the minimiser: a shorter step is easier
        if not lost:
            state.theta, state.V, state.b, state.multipliers = point.theta, point.V, point.b, point.multipliers
        ended = watch is not None and watch(state)
        slow = slow + 1 if state.gap > 0.9 * before else 0
        if ended or slow == STALLS or state.gap <= tol * abs(state.primal):
            break
        growth = 1 / GROWTH**3 if lost else min(GROWTH, SIGMA_MAX * n / sigma)
        sigma *= growth
        if state.multipliers is not None:
            state.multipliers = state.multipliers * growth  # those of A^T theta scale with sigma
    return state


def _round(
    problem: Problem, penalty: Penalty, state: State, sigma: float, tol: float, max_steps: int, share: float
) -> tuple[_Point, float]:
    """One proximal step: phi minimised until the error ||phi'||^2 / 2n is at most `share` of the gap; the point and its error."""
    point = _evaluate(problem, penalty, state.theta, state, sigma)
    for left in reversed(range(NEWTON)):
        _certify(problem, penalty, point, state, sigma)
        error = point.gradient.square().sum().item() / (2 * len(problem.X))
        if state.gap <= tol * abs(state.primal) or error <= share * state.gap or not left or state.steps >= max_steps:
            break
        state.steps += 1
        moved = _step(problem, penalty, point, state, sigma)
        if moved is None or moved.value >= point.value - ROUNDING * abs(point.value):
            break
        point = moved
    return point, error


def _evaluate(problem: Problem, penalty: Penalty, theta: Tensor, state: State, sigma: float) -> _Point:
    """phi at theta with centre state.V, state.b; projections start from the last multipliers."""
    z = state.V + sigma * cones.both_signs(problem.adjoint(theta))
    found = cones.project_weights(z, problem.X, problem.D, state.multipliers, sigma * penalty.lam)
    V = cones.shrink(found.point, sigma * penalty.lam)
    b = state.b + sigma * theta.sum(0) if problem.intercept else state.b
    value = -LOSSES[problem.loss].dual_value(theta, problem.Y) + V.square().sum().item() / (2 * sigma)
    if problem.intercept:
        value += b.square().sum().item() / (2 * sigma)
    fit = problem.fit(V, b)
    gradient = CONJUGATES[problem.loss].gradient(theta, problem.Y, fit)
    return _Point(theta, value, gradient, V, b, found.point, found.multipliers, fit)


def _certify(problem: Problem, penalty: Penalty, point: _Point, state: State, sigma: float) -> None:
    """Keep the best primal value (V is feasible) and the best dual one, of theta centred and shrunk into the dual's set."""
    loss = LOSSES[problem.loss]
    primal = loss.value(point.fit, problem.Y) + penalty.lam * point.V.norm(dim=2).sum().item()
    if primal < state.primal:
        state.primal, state.best_V, state.best_b = primal, point.V, point.b
    theta, pulled = point.theta, (point.projected - state.V) / sigma  # (+-) A^T theta + G^T rho / sigma
    if problem.intercept:
        theta = loss.centred(theta, problem.Y)
        pulled = pulled - cones.both_signs(problem.adjoint(point.theta - theta))
    theta = theta * min(1.0, penalty.lam / max(pulled.norm(dim=2).max().item(), 1e-300))
    dual = loss.dual_value(theta, problem.Y)
    if dual > state.dual:
        state.dual, state.best_theta = dual, theta


def _step(problem: Problem, penalty: Penalty, point: _Point, state: State, sigma: float) -> _Point | None:
    """One Newton step with Armijo's rule, inside the conjugate's domain; None where nothing decreases phi."""
    conjugate = CONJUGATES[problem.loss]
    directions, column = _directions(problem, point, sigma * penalty.lam)
    if problem.intercept:
        C = problem.Y.shape[1]
        ones = torch.ones(len(problem.X), C, dtype=problem.X.dtype, device=problem.X.device)
        directions, column = torch.cat([directions, ones], 1), torch.cat([column, torch.arange(C, device=column.device)])
    delta = -conjugate.solve(point.theta, problem.Y, directions * sigma**0.5, column, point.gradient)
    slope = (delta * point.gradient).sum().item()
    length = min(1.0, INSIDE * conjugate.room(point.theta, delta, problem.Y))
    start = State(state.V, state.b, point.theta, point.multipliers)
    for _ in range(HALVINGS):
        trial = _evaluate(problem, penalty, point.theta + length * delta, start, sigma)
        if trial.value <= point.value + 1e-4 * length * slope + 1e-13 * abs(point.value):
            return trial
        length /= 2
    return None


def _directions(problem: Problem, point: _Point, threshold: float) -> tuple[Tensor, Tensor]:
    """Columns D_i X R (n, K) of all active groups and the output (K,) each belongs to."""
    X, D, squares = problem.X, problem.D, problem.X.square().sum(1)
    active = (point.V.norm(dim=2) > 0).nonzero()  # (groups, 3): sign, gate, output
    blocks, columns = [torch.zeros(len(X), 0, dtype=X.dtype, device=X.device)], []
    for s, i, c in active.tolist():
        w = point.projected[s, i, :, c]
        margins = torch.where(D[:, i], X @ w, -(X @ w))
        rows = X[
            point.multipliers[s, i, c] * squares > margins.clamp_min(0)
        ]  # of a complementary pair the larger one is not zero
        shrunk = 1 - threshold / w.norm().item()
        N = _null_space(rows)
        along = N.T @ (w / w.norm())
        R = shrunk**0.5 * N + (1 - shrunk**0.5) * torch.outer(N @ along, along)
        blocks.append(D[:, i, None] * (X @ R))
        columns += [c] * R.shape[1]
    return torch.cat(blocks, 1), torch.tensor(columns, dtype=torch.long, device=X.device)


def _null_space(rows: Tensor) -> Tensor:
    """Orthonormal basis (d, k) of {w: rows w = 0}, rows (m, d)."""
    d = rows.shape[1]
    if not len(rows):
        return torch.eye(d, dtype=rows.dtype, device=rows.device)
    rows = rows / rows.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors[:, values <= FLAT * values[-1]]


class _Squared:
    """f*(-theta) = n/2 ||theta||^2 - <y, theta>."""

    @staticmethod
    def gradient(theta: Tensor, Y: Tensor, fit: Tensor) -> Tensor:
        """Of f*(-theta) + <fit, theta>."""
        return len(Y) * theta - Y + fit

    @staticmethod
    def weights(theta: Tensor, Y: Tensor) -> Tensor:
        return torch.ones_like(Y) / len(Y)

    @staticmethod
    def room(theta: Tensor, delta: Tensor, Y: Tensor) -> float:
        return float("inf")

    @classmethod
    def solve(cls, theta: Tensor, Y: Tensor, B: Tensor, column: Tensor, g: Tensor) -> Tensor:
        """(W^{-1} + sum_k b_k b_k^T)^{-1} g, W = 1 / f*'' diagonal (n, C), b_k = B[:, k] in output column[k]."""
        W = cls.weights(theta, Y)
        chosen = W[:, column]
        same = (column[:, None] == column[None, :]).to(B.dtype)
        gram = (B.T @ (chosen * B)) * same
        return _woodbury(gram, W * g, (B * (W * g)[:, column]).sum(0), lambda t: W * _scatter(B * t, column, W))


class _Logistic(_Squared):
    """f*(-theta) = (1/n) sum [q ln q + (1 - q) ln(1 - q)], q = n y theta in [0, 1]."""

    @staticmethod
    def gradient(theta: Tensor, Y: Tensor, fit: Tensor) -> Tensor:
        q = len(Y) * Y * theta
        return Y * (q.log() - (-q).log1p()) + fit

    @staticmethod
    def weights(theta: Tensor, Y: Tensor) -> Tensor:
        q = len(Y) * Y * theta
        return q * (1 - q) / len(Y)

    @staticmethod
    def room(theta: Tensor, delta: Tensor, Y: Tensor) -> float:
        q, step = len(Y) * Y * theta, len(Y) * Y * delta
        return (torch.where(step > 0, 1 - q, q) / step.abs().clamp_min(1e-300)).min().item()


class _Softmax:
    """f*(-theta) = (1/n) sum Q ln Q, Q = Y - n theta with rows of the simplex."""

    @staticmethod
    def gradient(theta: Tensor, Y: Tensor, fit: Tensor) -> Tensor:
        moved = fit - (Y - len(Y) * theta).log()
        return moved - moved.mean(1, keepdim=True)  # rows of theta sum to zero: only this part of the gradient moves it

    @staticmethod
    def room(theta: Tensor, delta: Tensor, Y: Tensor) -> float:
        Q, step = Y - len(Y) * theta, len(Y) * delta
        return torch.where(step > 0, Q / step.clamp_min(1e-300), torch.inf).min().item()

    @staticmethod
    def solve(theta: Tensor, Y: Tensor, B: Tensor, column: Tensor, g: Tensor) -> Tensor:
        """As above on the subspace of rows that sum to zero, where the inverse of f*'' is W = (diag Q - Q Q^T) / n a row."""
        n = len(Y)
        Q = Y - n * theta

        def weigh(T: Tensor) -> Tensor:
            return Q * (T - (Q * T).sum(1, keepdim=True)) / n

        part = B * Q[:, column]
        same = (column[:, None] == column[None, :]).to(B.dtype)
        gram = ((B.T @ part) * same - part.T @ part) / n
        first = weigh(g)
        return _woodbury(gram, first, (B * first[:, column]).sum(0), lambda t: weigh(_scatter(B * t, column, g)))


CONJUGATES: dict[str, Any] = {"squared": _Squared, "logistic": _Logistic, "softmax": _Softmax}


def _scatter(columns: Tensor, column: Tensor, like: Tensor) -> Tensor:
    """Sum of columns (n, K) into the outputs (n, C) they belong to."""
    return torch.zeros_like(like).index_add_(1, column, columns)


def _woodbury(gram: Tensor, first: Tensor, right: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
    """first - back((I + gram)^{-1} right)."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(eye + (gram + gram.T) / 2)
    if info.item():
        return first - back(torch.linalg.lstsq(eye + gram, right[:, None]).solution[:, 0])
    return first - back(torch.cholesky_solve(right[:, None], factor)[:, 0])
