"""Proof of optimality: a dual point for any primal point, the gap between them, the KKT residual, and safe screening.

    P(U, b) = f(Z; Y) + lam sum ||U_i||   >=   max { D(theta) : ||A_i^T theta||_* <= lam for all i;  1^T theta = 0 with b }

D of `losses`.  From a primal point: theta_0 = -grad f(Z), moved to 1^T theta = 0 inside the domain of D, then scaled by s
with mu = max_i ||A_i^T theta_0||_*: squared: s = clip(<Y, theta_0> / (n ||theta_0||^2), -lam / mu, lam / mu), the best
multiple (one for each output where the penalty separates them); logistic, softmax: s = min(1, lam / mu).  With the ReLU's
cones

    mu = max ||Pi_K(+-A_i^T theta_0)||,   since  sup { <a, v> : v in K, ||v|| <= 1 } = ||Pi_K(a)||           (`cones`).

Everything is computed in float64 from U, b as they are, whatever solver made them.
KKT residual: max_i ||U_i - prox(U_i + A_i^T theta_0)||, prox of the penalty (and the cones) with step 1, which is zero at optima
only; with an intercept |1^T theta_0| if larger.
Screening: D is strongly concave with modulus n / curvature, hence ||theta* - theta|| <= R = sqrt(2 gap curvature / n), and
||A_i^T theta||_* + R ||A_i||_2 < lam proves U_i = 0 at every optimum.
Source: Fenchel duality; Ndiaye, Fercoq, Gramfort, Salmon, "Gap safe screening rules", JMLR 2017.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lplr.convex import cones
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem, centred_targets

TINY = 1e-300
ROUNDING = 1e-12  # of the values: what a computed gap may lack


class Certificate(NamedTuple):
    """primal at (U, b), theta (n, C) dual feasible, dual at theta, kkt: the residual at (U, b)."""

    primal: float
    theta: Tensor
    dual: float
    kkt: float

    @property
    def gap(self) -> float:
        return self.primal - self.dual

    def within(self, tol: float) -> bool:
        """Is the gap at most tol |primal|?"""
        return self.gap <= tol * abs(self.primal)


def certify(problem: Problem, penalty: Penalty, U: Tensor, b: Tensor, theta: Tensor | None = None) -> Certificate:
    """The certificate of U (P, d, C), or V (2, P, d, C) in the cones, and b (C,).

    theta is another candidate for the dual point, e.g. a solver's own; it need not be feasible, the better one is taken.
    """
    loss, (Y, means) = LOSSES[problem.loss], centred_targets(problem)
    U, b = U.double(), b.double() - means
    Z = problem.fit(U, b)
    primal = loss.value(Z, Y) + penalty.value(U)
    start = -loss.gradient(Z, Y)
    pulled = problem.adjoint(start)
    kkt = (U - _prox(problem, penalty, U, pulled)).flatten(-2).norm(dim=-1).max().item()
    best, dual = dual_point(problem, penalty, start, None if problem.intercept else pulled)
    if problem.intercept:
        kkt = max(kkt, start.sum(0).abs().max().item())
    if theta is not None:
        other, value = dual_point(problem, penalty, theta.double())
        if value > dual:
            best, dual = other, value
    return Certificate(primal, best, dual, kkt)


def dual_point(problem: Problem, penalty: Penalty, theta: Tensor, pulled: Tensor | None = None) -> tuple[Tensor, float]:
    """theta (n, C), in the domain of D, made feasible, and its dual value; pulled = A^T theta where no intercept moves theta."""
    Y = centred_targets(problem)[0].to(theta.dtype)
    if problem.intercept:
        theta, pulled = LOSSES[problem.loss].centred(theta, Y), None
    if pulled is None:
        pulled = problem.adjoint(theta)
    separate = penalty.norm == "columns" or Y.shape[1] == 1
    sizes = column_norms(problem, pulled) if separate else penalty.dual_norm(pulled)[:, None]  # (P, C) or (P, 1)
    return scaled(problem.loss, Y, theta, penalty.lam / sizes.double().amax(0).clamp_min(TINY))


def scaled(loss: str, Y: Tensor, theta: Tensor, room: Tensor) -> tuple[Tensor, float]:
    """theta (n, C) times the best factor within room, and its dual value; room (C,): one factor for each output, (1,): one."""
    if loss != "squared":
        scale = room.min().clamp_max(1.0)
    else:
        along, square = (Y * theta).double().sum(0), theta.double().square().sum(0)
        if room.shape != along.shape:
            along, square = along.sum(), square.sum()
        scale = torch.clamp(along / (len(Y) * square).clamp_min(TINY), -room, room)
    theta = theta * scale.to(theta.dtype)
    return theta, LOSSES[loss].dual_value(theta, Y)


def column_norms(problem: Problem, pulled: Tensor) -> Tensor:
    """max over the signs of ||A_i^T theta_c||, projected with "relu": (P, C) from A^T theta (P, d, C)."""
    if problem.activation == "relu":
        return cones.dual_norms(pulled, problem.X, problem.D).amax(0)
    return pulled.norm(dim=1)


def _prox(problem: Problem, penalty: Penalty, U: Tensor, pulled: Tensor) -> Tensor:
    if problem.activation == "relu":
        return cones.prox(U + cones.both_signs(pulled), problem.X, problem.D, penalty.lam)
    return penalty.prox(U + pulled, 1.0)


def screen(problem: Problem, penalty: Penalty, primal: float, theta: Tensor) -> Tensor:
    """Gates (P,) bool that may be active at an optimum, from any primal value and any dual feasible theta; the others are not."""
    theta = theta.double()
    value = LOSSES[problem.loss].dual_value(theta, centred_targets(problem)[0])
    gap = max(primal - value, 0.0) + ROUNDING * max(abs(primal), abs(value))
    radius = math.sqrt(2 * gap * LOSSES[problem.loss].curvature / len(problem.X))
    pulled = problem.adjoint(theta)
    sizes = column_norms(problem, pulled).amax(1) if problem.activation == "relu" else penalty.dual_norm(pulled)
    return sizes + radius * spectral_bounds(problem) >= penalty.lam * (1 - ROUNDING)


def spectral_bounds(problem: Problem) -> Tensor:
    """Upper bounds (P,) of ||A_i||_2: ||A_i||_F or, if smaller, max |D_i| ||X||_2, where the Gram matrix of X is affordable."""
    n, d = problem.X.shape
    squares = torch.cat([problem.rows(rows, torch.float64).square().sum(1) for rows in problem.blocks()])
    bounds = (squares @ problem.D.double().square()).sqrt()
    if min(n, d) > 4096:
        return bounds
    gram = torch.zeros(min(n, d), min(n, d), dtype=torch.float64, device=problem.Y.device)
    if d <= n:
        for rows in problem.blocks():
            block = problem.rows(rows, torch.float64)
            gram += block.T @ block
    else:
        X = problem.X.to(gram)
        gram = X @ X.T
    largest = problem.D.to(gram).abs().amax(0)
    return torch.minimum(bounds, largest * torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt() * (1 + ROUNDING))
