"""Newton's method under the cones: derivatives by differences, systems by dense solves, certificates by Clarabel."""

from __future__ import annotations

import itertools

import pytest
import torch
from convex.oracles import optimum, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import Penalty, Problem, cones, lambda_max
from lplr.convex.certificate import column_norms
from lplr.convex.cone_newton import CONJUGATES, State, _directions, _evaluate, _null_space, polish
from lplr.convex.losses import LOSSES

programmes = pytest.mark.parametrize("loss, intercept", list(itertools.product(LOSSES, (False, True))))


def relu(seed: int, loss: str, intercept: bool = False, **sizes: int) -> tuple[Problem, Penalty]:
    problem = random_problem(seed, loss, intercept=intercept, activation="relu", **({"n": 14, "d": 3, "P": 4, "C": 2} | sizes))
    return problem, Penalty(0.05 * lambda_max(problem, "columns"), "columns")


def start(problem: Problem, scale: float = 0.0) -> State:
    """Zero, or random feasible weights, and the dual point they imply."""
    V = torch.randn(2, *problem.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * scale
    V, b = cones.repair(V, problem.X, problem.D), torch.zeros(problem.shape[2], dtype=torch.float64)
    return State(V, b, -LOSSES[problem.loss].gradient(problem.fit(V, b), problem.Y))


@programmes
def test_the_gradient_and_the_hessian_are_those_of_phi(loss, intercept):
    problem, penalty = relu(3, loss, intercept)
    state = start(problem, 0.3)
    sigma, n, C = 20.0 * len(problem.X), *problem.Y.shape
    point = _evaluate(problem, penalty, state.theta, state, sigma)
    B, column = _directions(problem, point, sigma * penalty.lam)
    assert len(column) > 3  # the point is not a trivial one
    delta = torch.randn(n, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / n
    if loss == "softmax":
        delta -= delta.mean(1, keepdim=True)  # theta lives where rows sum to zero
    h = 1e-5 * min(1.0, CONJUGATES[loss].room(state.theta, delta, problem.Y))
    up, down = (_evaluate(problem, penalty, state.theta + s * h * delta, state, sigma) for s in (1, -1))
    assert (up.value - down.value) / (2 * h) == pytest.approx((point.gradient * delta).sum().item(), rel=1e-5, abs=1e-8)
    along = sum((B[:, k] @ delta[:, c]) ** 2 for k, c in enumerate(column.tolist()))
    along = sigma * (along + (delta.sum(0).square().sum() if intercept else 0.0))
    if loss == "squared":
        conjugate = n * delta.square().sum()
    elif loss == "logistic":
        q = n * problem.Y * state.theta
        conjugate = n * (delta.square() / (q * (1 - q))).sum()
    else:
        conjugate = n * (delta.square() / (problem.Y - n * state.theta)).sum()
    second = ((up.gradient - down.gradient) * delta).sum() / (2 * h)
    assert second.item() == pytest.approx((along + conjugate).item(), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@given(seed=st.integers(0, 10_000), K=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_the_newton_system_is_a_dense_solve(loss, seed, K):
    problem = random_problem(seed, loss, n=7, C=3)
    n, C = problem.Y.shape
    random = torch.Generator().manual_seed(seed)
    theta = -LOSSES[loss].gradient(torch.randn(n, C, generator=random, dtype=torch.float64), problem.Y)
    B, column = torch.randn(n, K, generator=random, dtype=torch.float64), torch.randint(C, (K,), generator=random)
    g = torch.randn(n, C, generator=random, dtype=torch.float64)
    g = g - g.mean(1, keepdim=True) if loss == "softmax" else g
    columns = torch.zeros(n, C, K, dtype=torch.float64)
    columns[:, column, torch.arange(K)] = B
    columns = columns.reshape(n * C, K)
    q = {"squared": theta + 1, "logistic": n * problem.Y * theta, "softmax": problem.Y - n * theta}[loss]
    curvature = {"squared": torch.full_like(q, n), "logistic": n / (q * (1 - q)), "softmax": n / q}[loss]
    H = torch.diag(curvature.flatten()) + columns @ columns.T
    found = CONJUGATES[loss].solve(theta, problem.Y, B, column, g)
    if loss == "softmax":  # on the subspace of rows that sum to zero
        basis = torch.linalg.svd(torch.ones(1, C, dtype=torch.float64))[2][1:].T
        E = torch.block_diag(*[basis] * n)
        wanted = E @ torch.linalg.solve(E.T @ H @ E, E.T @ g.flatten())
    else:
        wanted = torch.linalg.solve(H, g.flatten())
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-7, atol=1e-9 * wanted.abs().max().item())


@given(m=st.integers(0, 6), d=st.integers(1, 6), seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_null_spaces(m, d, seed, scale):
    rows = scale * torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    N = _null_space(rows)
    assert N.shape == (d, max(d - m, 0))
    torch.testing.assert_close(N.T @ N, torch.eye(N.shape[1], dtype=torch.float64))
    assert (rows @ N).abs().sum() <= 1e-9 * scale
    twice = _null_space(torch.cat([rows, rows]))
    assert twice.shape == N.shape


@programmes
@given(seed=st.integers(0, 10_000))
@settings(max_examples=3, deadline=None)
def test_the_optimum_from_zero(loss, intercept, seed):
    problem, penalty = relu(seed, loss, intercept)
    found = polish(problem, penalty, start(problem), tol=1e-8, max_steps=400)
    assert found.gap <= 1e-8 * found.primal
    assert found.primal == pytest.approx(optimum(problem, penalty), rel=1e-6, abs=1e-9)
    assert cones.violation(found.best_V, problem.X, problem.D) < 1e-9


@programmes
def test_the_dual_points_on_the_way_are_feasible(loss, intercept):
    problem, penalty = relu(11, loss, intercept)
    best, seen = optimum(problem, penalty), []

    def watch(state: State) -> bool:
        seen.append(state.gap)
        sizes = column_norms(problem, problem.adjoint(state.best_theta))
        assert sizes.max() <= penalty.lam * (1 + 1e-8) and (not intercept or state.best_theta.sum(0).abs().max() < 1e-12)
        assert state.dual <= best * (1 + 1e-7) and state.primal >= best * (1 - 1e-7)
        return False

    polish(problem, penalty, start(problem, 0.5), tol=1e-9, max_steps=300, watch=watch)
    assert len(seen) > 2 and all(a >= b for a, b in itertools.pairwise(seen))


def test_a_watcher_ends_the_run_and_steps_are_limited():
    problem, penalty = relu(0, "squared")
    assert polish(problem, penalty, start(problem), tol=1e-15, max_steps=50, watch=lambda _: True).steps < 50
    assert polish(problem, penalty, start(problem), tol=1e-15, max_steps=3).steps == 3
    unreachable = polish(problem, penalty, start(problem), tol=1e-30, max_steps=10_000)
    assert unreachable.steps < 1000 and unreachable.gap < 1e-9 * unreachable.primal
