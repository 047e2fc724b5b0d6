"""The losses f(Z; Y), their conjugates, and what the solvers need of them.

    squared    1/(2n) ||Z - Y||_F^2                 D(theta) = <Y, theta> - n/2 ||theta||^2
    logistic   1/n sum log(1 + exp(-y z))           D(theta) = -1/n sum [q ln q + (1 - q) ln(1 - q)],  q = n y theta in [0, 1]
    softmax    1/n sum [log sum_c exp z_c - z_y]    D(theta) = -1/n sum Q ln Q,  Q = Y - n theta, rows in the simplex

D(theta) = -f*(-theta) is the dual objective: f(Z) + g >= D(theta) for every theta with ||A_i^T theta||_* <= lam (`certificate`).
theta_0 = -grad f(Z) is the dual point that a primal point implies.  Sums are taken in float64.
With an intercept the dual has the constraint 1^T theta = 0; `centred` moves theta into it without leaving the domain of D.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

NEWTON, HALVINGS = 100, 40
SLACK = 8.0  # roundings by which q may leave [0, 1]


class Loss(Protocol):
    """What the table LOSSES holds."""

    curvature: float  # ||grad^2 f|| <= curvature / n

    def value(self, Z: Tensor, Y: Tensor) -> float: ...
    def gradient(self, Z: Tensor, Y: Tensor) -> Tensor: ...
    def dual_value(self, theta: Tensor, Y: Tensor) -> float: ...
    def centred(self, theta: Tensor, Y: Tensor) -> Tensor: ...
    def intercept(self, Z: Tensor, Y: Tensor, start: Tensor | None = None) -> Tensor: ...


def smoothness(loss: Loss, n: int) -> float:
    """Lipschitz constant of grad f in Z: 1/n, 1/(4n), 1/(2n)."""
    return loss.curvature / n


class Squared:
    curvature = 1.0

    def value(self, Z: Tensor, Y: Tensor) -> float:
        return (Z.double() - Y.double()).square().sum().item() / (2 * len(Y))

    def gradient(self, Z: Tensor, Y: Tensor) -> Tensor:
        return (Z - Y) / len(Y)

    def dual_value(self, theta: Tensor, Y: Tensor) -> float:
        theta = theta.double()
        return (theta * Y.double()).sum().item() - len(Y) / 2 * theta.square().sum().item()

    def centred(self, theta: Tensor, Y: Tensor) -> Tensor:
        theta = theta - theta.mean(0)
        return theta - theta.mean(0)  # of a nearly constant theta the first difference is rounding, its mean as well

    def intercept(self, Z: Tensor, Y: Tensor, start: Tensor | None = None) -> Tensor:
        return (Y - Z).double().mean(0).to(Z.dtype)


class Logistic:
    """The two-class softmax of (z, 0); y = +-1."""

    curvature = 0.25

    def value(self, Z: Tensor, Y: Tensor) -> float:
        return softplus(-(Y.double() * Z.double()), threshold=40).sum().item() / len(Y)

    def gradient(self, Z: Tensor, Y: Tensor) -> Tensor:
        return -Y * torch.sigmoid(-Y * Z) / len(Y)

    def dual_value(self, theta: Tensor, Y: Tensor) -> float:
        q = _inside(len(Y) * Y.double() * theta.double(), theta.dtype)
        if q is None:
            return -math.inf
        return -(torch.xlogy(q, q) + torch.special.xlog1py(1 - q, -q)).sum().item() / len(Y)

    def centred(self, theta: Tensor, Y: Tensor) -> Tensor:
        """The heavier class is scaled down until both weigh the same."""
        up, down = theta.clamp_min(0), (-theta).clamp_min(0)
        weights = up.double().sum(), down.double().sum()
        target = torch.minimum(*weights)
        return (up * _ratio(target, weights[0]) - down * _ratio(target, weights[1])).to(theta.dtype)

    def intercept(self, Z: Tensor, Y: Tensor, start: Tensor | None = None) -> Tensor:
        def derivatives(b: Tensor) -> tuple[float, Tensor, Tensor]:
            moved = Z.double() + b
            p = torch.sigmoid(moved)
            return self.value(moved, Y), self.gradient(moved, Y.double()).sum(0), (p * (1 - p)).mean(0)[:, None]

        return _newton(derivatives, Z.new_zeros(1) if start is None else start).to(Z.dtype)


class Softmax:
    curvature = 0.5

    def value(self, Z: Tensor, Y: Tensor) -> float:
        Z = Z.double()
        return (torch.logsumexp(Z, 1) - (Y * Z).sum(1)).sum().item() / len(Y)

    def gradient(self, Z: Tensor, Y: Tensor) -> Tensor:
        return (torch.softmax(Z, 1) - Y) / len(Y)

    def dual_value(self, theta: Tensor, Y: Tensor) -> float:
        Q = _inside(Y.double() - len(Y) * theta.double(), theta.dtype)
        if Q is None or (Q.sum(1) - 1).abs().max().item() > SLACK * Y.shape[1] * torch.finfo(theta.dtype).eps * len(Y) ** 0.5:
            return -math.inf
        return -torch.xlogy(Q, Q).sum().item() / len(Y)

    def centred(self, theta: Tensor, Y: Tensor) -> Tensor:
        """Columns of Q that weigh too much are scaled down, and what the rows lost is given to the columns that lack it."""
        n, Y = len(Y), Y.double()
        Q, goal = (Y - n * theta.double()).clamp_min(0), Y.sum(0)
        sums = Q.sum(0)
        Q = Q * torch.where(sums > goal, goal / sums.clamp_min(1e-300), torch.ones_like(sums))
        lost, lacking = 1 - Q.sum(1), goal - Q.sum(0)
        total = lacking.sum()
        if total > 0:
            Q = Q + torch.outer(lost, lacking / total)
        return ((Y - Q) / n).to(theta.dtype)

    def intercept(self, Z: Tensor, Y: Tensor, start: Tensor | None = None) -> Tensor:
        """The solution of mean zero."""
        C = Y.shape[1]

        def derivatives(b: Tensor) -> tuple[float, Tensor, Tensor]:
            moved = Z.double() + b
            p = torch.softmax(moved, 1)
            hessian = torch.diag(p.mean(0)) - p.T @ p / len(Y)
            return self.value(moved, Y.double()), p.mean(0) - Y.double().mean(0), hessian + 1 / C  # constants: the null space

        return _newton(derivatives, Z.new_zeros(C) if start is None else start - start.mean()).to(Z.dtype)


LOSSES: dict[str, Loss] = {"squared": Squared(), "logistic": Logistic(), "softmax": Softmax()}


def _inside(q: Tensor, dtype: torch.dtype) -> Tensor | None:
    """q in [0, 1] but for rounding, clamped; None where it is not."""
    slack = SLACK * torch.finfo(dtype).eps
    low, high = q.aminmax()
    return q.clamp(0, 1) if low.item() >= -slack and high.item() <= 1 + slack else None


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp_min(1e-300), torch.ones_like(b))


def _newton(derivatives, b: Tensor) -> Tensor:
    """argmin of a smooth convex function of b (C,) by Newton's method, halving steps that do not decrease it; float64."""
    b = b.double()
    value, gradient, hessian = derivatives(b)
    for turn in range(NEWTON):
        ridge = torch.eye(len(b), dtype=b.dtype, device=b.device) * (1e-14 + 1e-12 * hessian.diagonal().max())
        step = -torch.linalg.solve(hessian + ridge, gradient)
        slope = (step @ gradient).item()
        if not -slope > 1e-24:
            break
        step = step * min(1.0, 4.0 * 2.0**turn / step.abs().max().item())
        for _ in range(HALVINGS):
            trial = derivatives(b + step)
            lower = trial[0] <= value + 1e-15 * abs(value)
            if lower or trial[1].norm() <= gradient.norm() / 2:  # near the optimum decreases are below the value's rounding
                break
            step = step / 2
        else:  # nothing decreases it any more
            break
        b = b + step
        value, gradient, hessian = trial
    return b
