"""Oracle A: the convex programmes written once more, for cvxpy and Clarabel; random problems for the tests of every solver."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem


def optimum(problem: Problem, penalty: Penalty) -> float:
    """The optimal value by Clarabel, from explicit matrices D_i X."""
    return solve_by_cvxpy(problem, penalty)[0]


def solve_by_cvxpy(problem: Problem, penalty: Penalty) -> tuple[float, np.ndarray]:
    """Optimal value and weights (P, d, C), or (2, P, d, C) for relu."""
    X, Y, D = problem.X.double().numpy(), problem.Y.double().numpy(), problem.D.numpy().astype(float)
    (n, d), C, P = X.shape, Y.shape[1], D.shape[1]
    relu = problem.activation == "relu"
    weights = [[cp.Variable((d, C)) for _ in range(P)] for _ in range(2 if relu else 1)]
    b = cp.Variable((1, C))
    Z = np.ones((n, 1)) @ b if problem.intercept else np.zeros((n, C))
    constraints = []
    for s, row in enumerate(weights):
        for i, U in enumerate(row):
            Z = Z + (1 - 2 * s) * ((D[:, i : i + 1] * X) @ U)
            if relu:
                constraints.append(cp.multiply(2 * D[:, i : i + 1] - 1, X @ U) >= 0)
    objective = _loss(problem.loss, Z, Y, n) + penalty.lam * sum(_norm(penalty.norm, U, C) for row in weights for U in row)
    programme = cp.Problem(cp.Minimize(objective), constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        programme.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    found = np.array([[U.value for U in row] for row in weights])
    return float(programme.value), found if relu else found[0]  # type: ignore[arg-type]


def _loss(name: str, Z, Y: np.ndarray, n: int):
    if name == "squared":
        return cp.sum_squares(Z - Y) / (2 * n)
    if name == "logistic":
        return cp.sum(cp.logistic(cp.multiply(-Y, Z))) / n
    return (cp.sum(cp.log_sum_exp(Z, axis=1)) - cp.sum(cp.multiply(Y, Z))) / n


def _norm(name: str, U, C: int):
    if name == "columns":
        return sum(cp.norm(U[:, c], 2) for c in range(C))
    return cp.norm(U, "nuc") if name == "nuclear" else cp.norm(U, "fro")


def random_problem(
    seed: int, loss: str, *, n: int = 12, d: int = 3, P: int = 4, C: int = 2, intercept: bool = False, linear: bool = False,
    activation: str = "gated", dtype: torch.dtype = torch.float64,
) -> Problem:  # fmt: skip
    """Gaussian samples and gates; every class has samples where n allows; `linear` makes the last gate see all samples."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=draw, dtype=torch.float64)
    D = torch.randn(d, P, generator=draw, dtype=torch.float64)
    D = X @ D > 0
    if linear:
        D[:, -1] = True
    C = 1 if loss == "logistic" else C
    if loss == "squared":
        Y = torch.randn(n, C, generator=draw, dtype=torch.float64) + X[:, :1].relu() + 0.5
    else:
        labels = torch.cat([torch.arange(max(C, 2)), torch.randint(max(C, 2), (n,), generator=draw)])[:n]
        Y = 2.0 * labels[:, None] - 1 if loss == "logistic" else torch.nn.functional.one_hot(labels, C)
    return Problem(X.to(dtype), Y.to(dtype), D, loss, activation, intercept)


def value(problem: Problem, penalty: Penalty, U: Tensor, b: Tensor) -> float:
    """The objective by brute force: one sample, gate and output at a time, in float64."""
    X, Y, D = problem.X.double(), problem.Y.double(), problem.D
    U, b = U.double(), b.double()
    W = U[0] - U[1] if problem.activation == "relu" else U
    total = 0.0
    for j in range(len(X)):
        z = b.clone()
        for i in range(D.shape[1]):
            if D[j, i]:
                z = z + X[j] @ W[i]
        if problem.loss == "squared":
            total += 0.5 * (z - Y[j]).square().sum().item()
        elif problem.loss == "logistic":
            total += torch.log1p(torch.exp(-Y[j] * z)).sum().item()
        else:
            total += (torch.log(torch.exp(z).sum()) - z[Y[j].argmax()]).item()
    groups = U.reshape(-1, *U.shape[-2:])
    if penalty.norm == "columns":
        size = sum(g[:, c].square().sum().sqrt().item() for g in groups for c in range(g.shape[1]))
    elif penalty.norm == "nuclear":
        size = sum(torch.linalg.svdvals(g).sum().item() for g in groups)
    else:
        size = sum(g.square().sum().sqrt().item() for g in groups)
    return total / len(X) + penalty.lam * size
