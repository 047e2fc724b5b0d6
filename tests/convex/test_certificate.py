"""Oracles B and C: the dual point bounds Clarabel's optimum for any weights, tightly; screening removes nothing active."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from convex.oracles import random_problem, solve_by_cvxpy, value
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex.certificate import certify, dual_point, screen, spectral_bounds
from lplr.convex.losses import LOSSES
from lplr.convex.newton import newton
from lplr.convex.penalty import NORMS, Penalty
from lplr.convex.problem import Problem
from lplr.convex.solve import lambda_max, solve

programmes = [
    (loss, norm, intercept)
    for loss, norm, intercept in itertools.product(LOSSES, NORMS, (False, True))
    if not (loss == "logistic" and norm != "group")
]
every = pytest.mark.parametrize("loss, norm, intercept", programmes)


def feasible(problem: Problem, penalty: Penalty, theta: torch.Tensor) -> bool:
    """By the definition, one gate at a time; intercepts: columns of theta sum to zero."""
    for i in range(problem.D.shape[1]):
        T = (problem.D[:, i : i + 1] * problem.X.double()).T @ theta
        sizes = {"group": T.norm(), "columns": T.norm(dim=0).max(), "nuclear": torch.linalg.svdvals(T)[0]}
        if sizes[penalty.norm] > penalty.lam * (1 + 1e-9):
            return False
    return not problem.intercept or theta.sum(0).abs().max().item() < 1e-14


def weights(problem: Problem, seed: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    U = scale * torch.randn(*problem.shape, generator=draw, dtype=torch.float64)
    b = scale * torch.randn(problem.shape[2], generator=draw, dtype=torch.float64) * problem.intercept
    return U * (torch.rand(problem.shape[0], 1, 1, generator=draw) < 0.6), b


@every
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.0, 0.1, 3.0]), ratio=st.sampled_from([0.01, 0.3, 1.5]))
@settings(max_examples=20, deadline=None)
def test_any_weights_have_a_valid_certificate(loss, norm, intercept, seed, scale, ratio):
    problem = random_problem(seed, loss, n=10, C=3, intercept=intercept, linear=seed % 2 == 0)
    penalty = Penalty(ratio * lambda_max(problem, norm), norm)
    U, b = weights(problem, seed, scale)
    found = certify(problem, penalty, U, b)
    assert found.primal == pytest.approx(value(problem, penalty, U, b), rel=1e-10)
    assert feasible(problem, penalty, found.theta)
    others = [certify(problem, penalty, *weights(problem, seed + k, s)).primal for k in (1, 2) for s in (0.0, 0.05, 0.3)]
    assert found.dual <= min([found.primal, *others]) + 1e-12
    assert found.kkt >= 0 and math.isfinite(found.kkt)


@every
@pytest.mark.parametrize("linear", [False, True])
def test_the_optimum_lies_between_and_is_reached(loss, norm, intercept, linear):
    problem = random_problem(5, loss, n=14, C=3, intercept=intercept, linear=linear)
    penalty = Penalty(0.15 * lambda_max(problem, norm), norm)
    optimum, U = solve_by_cvxpy(problem, penalty)
    rough = certify(problem, penalty, *weights(problem, 0, 0.1))
    assert rough.dual <= optimum + 1e-8 and rough.primal >= optimum - 1e-8  # Clarabel's own tolerance
    weight = torch.from_numpy(U)
    Z = problem.fit(weight, torch.zeros(problem.shape[2], dtype=torch.float64))
    b = LOSSES[loss].intercept(Z, problem.Y) if intercept else torch.zeros_like(Z[0])
    exact = certify(problem, penalty, weight, b)
    assert exact.gap <= 1e-4 * optimum  # first order in the error of Clarabel's weights, about 1e-5
    assert exact.kkt < 1e-4 < 1e-2 < rough.kkt


def test_a_candidate_for_the_dual_point_is_only_taken_where_it_is_better():
    problem = random_problem(2, "logistic", n=20, intercept=True)
    penalty = Penalty(0.1 * lambda_max(problem, "group"))
    U, b = weights(problem, 1, 0.2)
    good = newton(problem, penalty, tol=1e-9)
    plain = certify(problem, penalty, U, b)
    assert certify(problem, penalty, U, b, good.theta).dual == pytest.approx(good.dual, rel=1e-9)
    assert certify(problem, penalty, U, b, 0.1 * good.theta).dual == plain.dual
    assert feasible(problem, penalty, certify(problem, penalty, U, b, 50 * good.theta).theta)


def test_kkt_vanishes_at_the_optimum_only():
    problem = random_problem(4, "squared", n=25, d=4, P=6)
    penalty = Penalty(0.1 * lambda_max(problem, "group"))
    found = newton(problem, penalty, tol=1e-12)
    assert found.kkt < 1e-9
    moved = certify(problem, penalty, found.U * 1.01, found.b)
    assert moved.kkt > 1e-4
    assert certify(problem, penalty, -found.U, found.b).kkt > 0.1 * penalty.lam


def test_float32_weights_are_certified_in_float64():
    problem = random_problem(3, "squared", n=30, d=5, P=6, dtype=torch.float32)
    penalty = Penalty(0.1 * lambda_max(problem, "group"))
    found = solve(problem, penalty, tol=1e-5)
    exact = value(problem, penalty, found.U, found.b)
    assert found.converged and found.primal == pytest.approx(exact, rel=1e-12)


def test_the_cones_of_relu():
    problem = random_problem(6, "squared", n=14, P=5, C=1, activation="relu")
    penalty = Penalty(0.1 * lambda_max(problem, "columns"), "columns")
    optimum, V = solve_by_cvxpy(problem, penalty)
    zero = certify(problem, penalty, torch.zeros(V.shape, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert zero.dual <= optimum <= zero.primal
    from lplr.convex import cones

    near = certify(problem, penalty, cones.repair(torch.from_numpy(V), problem.X, problem.D), torch.zeros(1, dtype=torch.float64))
    assert near.primal == pytest.approx(optimum, rel=1e-6) and 0 <= near.gap + 1e-9 < 1e-3 * optimum and near.kkt < 1e-4


@every
@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.02, 0.3, 0.9]), steps=st.sampled_from([0, 1, 3]))
@settings(max_examples=10, deadline=None)
def test_screening_never_removes_an_active_gate(loss, norm, intercept, seed, ratio, steps):
    problem = random_problem(seed, loss, n=12, d=3, P=8, C=2, intercept=intercept)
    penalty = Penalty(ratio * lambda_max(problem, norm), norm)
    method, tol = ("fista", 1e-7) if norm == "nuclear" else ("newton", 1e-10)
    exact = solve(problem, penalty, method=method, tol=tol)
    rough = solve(problem, penalty, method=method, tol=tol, max_iter=steps)
    kept = screen(problem, penalty, rough.primal, rough.theta)
    spurious = 2 * tol**0.5 * exact.U.norm()  # lengths that a gap of this size may leave on gates that are zero at the optimum
    active = penalty.lengths(exact.U).amax(1) > spurious
    assert not (active & ~kept).any()
    if exact.U.any() and exact.converged:
        assert (active & ~screen(problem, penalty, exact.primal, exact.theta)).sum() == 0


def test_screening_removes_most_gates_near_the_optimum():
    problem = random_problem(0, "squared", n=40, d=5, P=60, C=1)
    penalty = Penalty(0.4 * lambda_max(problem, "group"))
    exact = solve(problem, penalty, tol=1e-11)
    kept = screen(problem, penalty, exact.primal, exact.theta)
    assert 0 < kept.sum() < 20
    small = replace(problem, D=problem.D[:, kept])
    assert solve(small, penalty, tol=1e-11).primal == pytest.approx(exact.primal, rel=1e-9)


@given(n=st.integers(1, 12), d=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_spectral_bounds(n, d, seed):
    problem = random_problem(seed, "squared", n=n, d=d, P=5)
    weighted = replace(problem, D=3 * torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    for p in (problem, weighted):
        exact = torch.stack([torch.linalg.matrix_norm(p.D[:, i : i + 1] * p.X, 2) for i in range(5)])
        assert (spectral_bounds(p) >= exact * (1 - 1e-9)).all()


def test_a_dual_point_of_the_wrong_sign_is_worth_little():
    problem = random_problem(1, "logistic", n=20)
    penalty = Penalty(0.1)
    theta = -LOSSES["logistic"].gradient(torch.zeros_like(problem.Y), problem.Y)
    assert dual_point(problem, penalty, theta)[1] > 0
    assert dual_point(problem, penalty, -theta)[1] == -math.inf
