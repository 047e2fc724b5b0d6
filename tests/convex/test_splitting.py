"""The repaired splitting, step by step: the u-step by dense algebra, the losses' proximal operators by their definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from convex.oracles import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lplr.convex import Penalty, Problem, lambda_max, splitting
from lplr.convex.admm import begin
from lplr.convex.splitting import CURVATURE, PROX, Iterate, Splitting, rebalance, step

activations = pytest.mark.parametrize("activation", ["gated", "relu"])


def matrices(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """F (n, N) and G (signs P n, N) entry by entry, N = signs P d, for one output."""
    X, D, relu = problem.X, problem.D.double(), problem.activation == "relu"
    signs, P = (1, -1) if relu else (1,), D.shape[1]
    F = torch.cat([s * D[:, i : i + 1] * X for s in signs for i in range(P)], 1)
    G = torch.block_diag(*[(2 * D[:, i : i + 1] - 1) * X for _ in signs for i in range(P)])
    return F, G if relu else G[:0]


def dense(problem: Problem, rho1: float, rho2: float, w: torch.Tensor, r: torch.Tensor, t: torch.Tensor):
    """u, b of the quadratic by its normal equations, N + 1 unknowns."""
    F, G = matrices(problem)
    ones = torch.ones_like(t[:, :1]) * problem.intercept
    A = torch.cat([F, ones], 1)
    N = F.shape[1]
    M = A.T @ (w * A)
    M[:N, :N] += rho1 * torch.eye(N, dtype=F.dtype) + rho2 * G.T @ G
    right = A.T @ (w * t)
    right[:N] += r.reshape(N, -1)
    if not problem.intercept:
        M[N, N] = 1
    found = torch.linalg.solve(M, right)
    return found[:N].reshape(r.shape), found[N]


@activations
@pytest.mark.parametrize("size", ["dense", "iterative"])
@pytest.mark.parametrize("intercept", [False, True])
@given(n=st.integers(1, 12), d=st.integers(1, 5), seed=st.integers(0, 10_000), rho=st.sampled_from([0.01, 1.0, 7.0]))
@settings(max_examples=10, deadline=None)
def test_the_u_step_is_a_dense_solve(activation, size, intercept, n, d, seed, rho):
    problem = random_problem(seed, "squared", n=n, d=d, P=3, C=2, intercept=intercept, activation=activation)
    random = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        if size == "iterative":
            patch.setattr(splitting, "DENSE", 0)
            patch.setattr(splitting, "INNER", 5000)
        split = Splitting(problem)
        r = torch.randn(split.signs, 3, d, 2, generator=random, dtype=torch.float64)
        t = torch.randn(n, 2, generator=random, dtype=torch.float64)
        w = torch.rand(n, 1, generator=random, dtype=torch.float64) + 0.1
        split.set(rho, 0.3, w)
        u, b = split.solve(r, t, torch.zeros_like(r), 1e-12)
    wanted = dense(problem, rho, 0.3, w, r, t)
    size = 1 + wanted[0].abs().max().item()
    torch.testing.assert_close(u, wanted[0], rtol=1e-7, atol=1e-8 * size)
    torch.testing.assert_close(b, wanted[1] * intercept, rtol=1e-7, atol=1e-8 * size)


def test_the_system_of_the_paper():
    """(I + F^T F / rho + G^T G) u = b, the published u-step, is w = 1 / rho, rho1 = rho2 = 1."""
    problem = random_problem(4, "squared", n=15, d=4, P=5, C=1, activation="relu")
    split = Splitting(problem)
    split.set(1.0, 1.0, torch.full((15, 1), 1 / 0.1, dtype=torch.float64))
    b = torch.randn(2, 5, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F, G = matrices(problem)
    wanted = torch.linalg.solve(torch.eye(40, dtype=torch.float64) + F.T @ F / 0.1 + G.T @ G, b.reshape(40, 1))
    found = split.solve(b, torch.zeros_like(problem.Y), b, 0.0)[0]
    torch.testing.assert_close(found.reshape(40, 1), wanted, rtol=1e-9, atol=1e-11)


@activations
def test_operators_are_adjoint(activation):
    problem = random_problem(1, "squared", n=9, d=3, P=4, C=2, activation=activation)
    split, random = Splitting(problem), torch.Generator().manual_seed(0)
    u = torch.randn(split.signs, 4, 3, 2, generator=random, dtype=torch.float64)
    T = torch.randn(9, 2, generator=random, dtype=torch.float64)
    F, G = matrices(problem)
    torch.testing.assert_close(split.forward(u), F @ u.reshape(-1, 2))
    torch.testing.assert_close(split.backward(T).reshape(-1, 2), F.T @ T)
    if activation == "relu":
        s = torch.randn(2, 4, 9, 2, generator=random, dtype=torch.float64)
        torch.testing.assert_close(split.margins(u).reshape(-1, 2), G @ u.reshape(-1, 2))
        torch.testing.assert_close(split.lift(s).reshape(-1, 2), G.T @ s.reshape(-1, 2))


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
@given(seed=st.integers(0, 10_000), weight=st.sampled_from([1e-4, 0.1, 1.0, 50.0]), scale=st.sampled_from([0.0, 1.0, 300.0]))
@settings(max_examples=40, deadline=None)
def test_the_prox_of_a_loss_solves_its_equation(loss, seed, weight, scale):
    problem = random_problem(seed, loss, n=9, C=3)
    x = scale * torch.randn(problem.Y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = torch.full_like(x[:, :1], weight)
    z = PROX[loss](x, problem.Y, weights)
    slope = -problem.Y * torch.sigmoid(-problem.Y * z) if loss == "logistic" else torch.softmax(z, 1) - problem.Y
    assert (slope + weights * (z - x)).abs().max() <= 1e-11 * (1 + weight * scale * 5)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_the_prox_of_a_loss_by_brute_force(loss):
    problem = random_problem(2, loss, n=5, C=3)
    x = 2 * torch.randn(problem.Y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = PROX[loss](x, problem.Y, torch.full_like(x[:, :1], 0.4)).numpy()
    for row, y, z in zip(x.numpy(), problem.Y.numpy(), found, strict=True):

        def objective(z: np.ndarray, row: np.ndarray = row, y: np.ndarray = y) -> float:
            loss_value = np.log1p(np.exp(-y * z)).sum() if loss == "logistic" else np.log(np.exp(z).sum()) - y @ z
            return float(loss_value + 0.2 * ((z - row) ** 2).sum())

        np.testing.assert_allclose(z, minimize(objective, row, tol=1e-12).x, atol=1e-5)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_curvatures_bound_second_differences(loss):
    problem = random_problem(3, loss, n=6, C=3)
    z = torch.randn(problem.Y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for j in range(6):
        row = z[j].detach()
        f = (lambda t, y=problem.Y[j]: torch.nn.functional.softplus(-y * t).sum()) if loss == "logistic" else (
            lambda t, y=problem.Y[j]: torch.logsumexp(t, 0) - (y * t).sum()
        )  # fmt: skip
        hessian = torch.autograd.functional.hessian(f, row)
        assert CURVATURE[loss](row[None], problem.Y[j : j + 1]).max() == pytest.approx(hessian.diagonal().max().item(), rel=1e-9)


def unscaled(split: Splitting, at: Iterate) -> list[torch.Tensor]:
    pairs = ((split.rho1, at.mu), (split.rho2, at.nu), (split.w, at.zeta))
    return [size * scaled for size, scaled in pairs if scaled is not None]


@activations
@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
def test_balancing_moves_no_unscaled_multiplier(activation, loss):
    problem = random_problem(0, loss, n=12, activation=activation)
    penalty = Penalty(0.1 * lambda_max(problem, "columns"), "columns")
    split = Splitting(problem)
    at = begin(problem, split, None)
    for _ in range(12):
        residuals = step(problem, penalty, split, at)
    before = unscaled(split, at)
    old = split.rho1, split.rho2
    rebalance(problem, split, at, replace(residuals, weights=(1.0, 1e-3), cones=(1e-3, 1.0)))
    assert split.rho1 == pytest.approx(splitting.SCALE * old[0]) and split.rho2 == pytest.approx(old[1] / splitting.SCALE)
    for left, right in zip(before, unscaled(split, at), strict=True):
        torch.testing.assert_close(left, right)


@activations
@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
@pytest.mark.parametrize("intercept", [False, True])
def test_residuals_vanish(activation, loss, intercept):
    problem = random_problem(8, loss, n=10, d=2, P=3, intercept=intercept, activation=activation)
    penalty = Penalty(0.2 * lambda_max(problem, "columns"), "columns")
    split = Splitting(problem)
    at = begin(problem, split, None)
    worst = [step(problem, penalty, split, at).worst for _ in range(400)]
    assert worst[-1] < 0.01 < 0.1 < worst[0] and worst[-1] < worst[100]
