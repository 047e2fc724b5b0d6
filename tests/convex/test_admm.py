"""Oracles A, B and C for the repaired splitting, through the one door."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from convex.oracles import optimum, random_problem, value
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import Penalty, Problem, admm, cones, lambda_max, solve, splitting
from lplr.convex.certificate import column_norms

LOSSES = ("squared", "logistic", "softmax")
programmes = pytest.mark.parametrize("loss, intercept", list(itertools.product(LOSSES, (False, True))))


def relu(seed: int, loss: str, intercept: bool = False, ratio: float = 0.1, **sizes: int) -> tuple[Problem, Penalty]:
    problem = random_problem(seed, loss, intercept=intercept, activation="relu", **({"n": 14, "d": 3, "P": 4, "C": 2} | sizes))
    return problem, Penalty(ratio * lambda_max(problem, "columns"), "columns")


def certified(problem: Problem, penalty: Penalty, tol: float, **options) -> torch.Tensor:
    """Oracles A (Clarabel), B (the gap, its dual point tested by projections) and C (KKT); returns the weights."""
    found = solve(problem, penalty, tol=tol, **options)
    best = optimum(problem, penalty)
    assert found.converged, found.message
    assert found.primal == pytest.approx(value(problem, penalty, found.U, found.b), rel=1e-10)
    assert best * (1 - 1e-6) - 1e-9 <= found.primal <= best * (1 + tol + 1e-6) + 1e-9  # Clarabel's own accuracy
    assert found.dual <= best * (1 + 1e-6) + 1e-9 and 0 <= found.gap <= tol * abs(found.primal)
    assert column_norms(problem, problem.adjoint(found.theta)).max() <= penalty.lam * (1 + 1e-9)
    if problem.activation == "relu":
        assert cones.violation(found.U, problem.X, problem.D) <= 1e-8 * (1 + found.U.abs().max())
    # P(U) - P* >= 1/2 step^-1 ||U - prox||^2 up to the smoothness of the loss: the residual is of the order of the gap's root
    assert found.kkt <= 10 * (found.gap + 1e-15) ** 0.5 * (1 + problem.X.norm().item())
    return found.U


@programmes
@given(seed=st.integers(0, 10_000), n=st.integers(3, 18), d=st.integers(1, 4), ratio=st.sampled_from([0.01, 0.1, 0.6]))
@settings(max_examples=4, deadline=None)
def test_relu_programmes_by_all_oracles(loss, intercept, seed, n, d, ratio):
    certified(*relu(seed, loss, intercept, ratio, n=n, d=d, P=3), 1e-7)


@programmes
@pytest.mark.parametrize("norm", ["group", "columns", "nuclear"])
def test_gated_programmes_by_all_oracles(loss, intercept, norm):
    problem = random_problem(7, loss, n=14, C=2, intercept=intercept)
    penalty = Penalty(0.1 * lambda_max(problem, norm), norm)
    found = solve(problem, penalty, method="admm", tol=1e-6)
    assert found.converged and found.primal == pytest.approx(optimum(problem, penalty), rel=2e-6)


@programmes
@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_large_problems_take_conjugate_gradients_and_no_newton(monkeypatch, loss, intercept, activation):
    monkeypatch.setattr(splitting, "DENSE", 0)
    monkeypatch.setattr(admm, "NEWTON_SIZE", 0)
    problem = random_problem(3, loss, n=12, d=2, P=3, intercept=intercept, activation=activation)
    penalty = Penalty(0.2 * lambda_max(problem, "columns"), "columns")
    found = solve(problem, penalty, method="admm", tol=1e-4)
    assert found.converged and found.history[-1]["inner"] > found.iterations
    assert found.primal == pytest.approx(optimum(problem, penalty), rel=2e-4)


def awkward(kind: str) -> Problem:
    problem = relu(2, "squared", n=12, C=1)[0]
    X, Y, D = problem.X, problem.Y, problem.D
    if kind == "zero column":
        X = X * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    elif kind == "zero rows":
        X = X * (torch.arange(12) % 3 > 0)[:, None]
    elif kind == "duplicate rows":
        X, Y, D = (torch.cat([t, t]) for t in (X, Y, D))
    elif kind == "duplicate gates":
        D = torch.cat([D, D], 1)
    elif kind == "one gate":
        D = D[:, :1]
    elif kind == "one sample":
        X, Y, D = X[:1], Y[:1], torch.ones(1, 2, dtype=torch.bool)
    elif kind == "scales":
        X = X * torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    elif kind == "linear block":
        X, D = torch.cat([X[:, :2], torch.ones_like(Y)], 1), torch.cat([D, torch.ones_like(D[:, :1])], 1)
    elif kind == "cones of zero":  # a pattern that no gate makes: V = 0 is all there is
        X, D = torch.cat([X, -X]), torch.ones_like(torch.cat([D, D]))
        Y = torch.cat([Y, Y])
    return replace(problem, X=X, Y=Y, D=D)


kinds = ["zero column", "zero rows", "duplicate rows", "duplicate gates", "one gate", "one sample", "scales", "linear block"]
kinds += ["cones of zero"]


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("intercept", [False, True])
def test_hard_cases(kind, intercept):
    problem = replace(awkward(kind), intercept=intercept)
    top = lambda_max(problem, "columns")
    if kind == "cones of zero":
        found = solve(problem, Penalty(0.1, "columns"))
        assert found.converged and not found.U.any() and top < 1e-9
        return
    if kind == "one sample" and intercept:
        found = solve(problem, Penalty(0.1, "columns"))
        assert found.converged and found.primal == pytest.approx(0.0, abs=1e-12)  # b alone fits it
        return
    certified(problem, Penalty(0.05 * top, "columns"), 1e-7)
    above = solve(problem, Penalty(1.01 * top, "columns"))
    assert above.converged and not above.U.any()


def test_a_warm_start_is_shorter():
    problem, penalty = relu(1, "squared", n=60, d=5, P=8, C=1, ratio=0.05)
    cold = solve(problem, penalty, tol=1e-8)
    again = solve(problem, penalty, tol=1e-6, warm=cold)
    near = solve(problem, Penalty(0.95 * penalty.lam, "columns"), tol=1e-6, warm=cold)
    fresh = solve(problem, Penalty(0.95 * penalty.lam, "columns"), tol=1e-6)
    assert again.iterations <= 0.3 * cold.iterations and near.iterations < fresh.iterations
    assert near.primal == pytest.approx(fresh.primal, rel=2e-6)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_a_warm_point_is_stationary_in_the_first_step(loss, activation):
    """At the optimum, with the multipliers of its dual vector, an iteration moves nothing."""
    problem = random_problem(5, loss, n=16, d=3, P=4, C=1, activation=activation)
    penalty = Penalty(0.1 * lambda_max(problem, "columns"), "columns")
    exact = solve(problem, penalty, tol=1e-12 if activation == "gated" else 1e-10)
    split = splitting.Splitting(problem)
    at = admm.begin(problem, split, exact)
    splitting.step(problem, penalty, split, at)
    weights = exact.U if activation == "relu" else exact.U[None]
    assert (at.v - weights).abs().max() < 1e-4 < 1e-2 < weights.abs().max()


def test_runs_that_are_cut_short_are_feasible_and_say_so():
    problem, penalty = relu(4, "softmax", True, n=20)
    best = optimum(problem, penalty)
    for steps in (0, 1, 7, 26):
        found = solve(problem, penalty, tol=1e-12, max_iter=steps)
        assert found.status == "max_iterations" and "max_iter" in found.message and found.iterations == steps
        assert found.dual <= best <= found.primal and cones.violation(found.U, problem.X, problem.D) < 1e-9
    seen: list[dict] = []
    found = solve(problem, penalty, tol=1e-12, callback=lambda line: seen.append(line) or len(seen) == 2)
    assert found.status == "stopped" and len(seen) == len(found.history) == 2 and found.gap < 0.5 * found.primal


def test_float32():
    problem, penalty = relu(6, "logistic", n=30, C=1)
    single = replace(problem, X=problem.X.float(), Y=problem.Y.float())
    found = solve(single, penalty, tol=1e-5)
    assert found.U.dtype == torch.float32 and found.converged
    assert found.primal == pytest.approx(solve(problem, penalty, tol=1e-8).primal, rel=2e-5)
