"""Column generation against all patterns, enumerated; enumeration against the formula and against sampling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import Penalty, Problem, clean, gaussian, lambda_max, patterns, solve
from lplr.convex.columns import ascend, cauchy_schwarz, column_generation, enumerated, lower_bound, violators
from lplr.convex.solution import Solution
from lplr.errors import RecipeError


def sampled(n: int = 20, d: int = 3, P: int = 5, seed: int = 0, loss: str = "squared", C: int = 1, **options) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=draw, dtype=torch.float64)
    Y = 2 * torch.randn(n, C, generator=draw, dtype=torch.float64)
    Y = torch.where(Y > 0, 1.0, -1.0).double() if loss == "logistic" else Y
    if loss == "softmax":
        Y = torch.nn.functional.one_hot(Y.argmax(1), C).double()
    D = patterns(X, gaussian(d, P, draw))
    D = D if D.any() else ~D
    return Problem(X, Y, D[:, clean(D)], loss, "relu", **options)


def rows(D: torch.Tensor) -> set[bytes]:
    return {column.numpy().tobytes() for column in D.T.contiguous()}


@given(n=st.integers(1, 9), d=st.integers(1, 3), seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_all_patterns_are_counted_and_sampling_finds_no_other(n, d, seed):
    X = sampled(n, d, seed=seed).X
    every = enumerated(X)
    rank = min(n, d)
    assert every.shape[1] in {count := 2 * sum(math.comb(n - 1, k) for k in range(rank)), count - 1}  # but the empty one
    drawn = patterns(X, gaussian(d, 3000, torch.Generator().manual_seed(seed)))
    assert rows(drawn) - {bytes(n)} <= rows(every) and len(rows(every)) == every.shape[1]


def test_degenerate_samples_are_enumerated():
    X = sampled(7).X
    twice = enumerated(torch.cat([X, X, torch.zeros(2, 3, dtype=torch.float64)]))
    assert rows(twice[:7]) == rows(enumerated(X)) and torch.equal(twice[:7], twice[7:14]) and not twice[14:].any()
    mirrored = enumerated(torch.cat([X, -X]))
    assert torch.equal(mirrored[:7], ~mirrored[7:]) and rows(mirrored[:7]) - {bytes(7)} == rows(enumerated(X))
    grid = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)  # many planes through the same lines
    drawn = patterns(grid, gaussian(3, 200_000, torch.Generator().manual_seed(0)))
    assert rows(enumerated(grid)) == rows(drawn)
    flat = X @ torch.diag(torch.tensor([1.0, 1.0, 0.0])).double()
    assert enumerated(flat).shape[1] in (13, 14)
    assert enumerated(torch.zeros(4, 3)).shape == (4, 0)
    assert enumerated(sampled(30, 4).X) is None and enumerated(sampled(400, 3).X) is None


@pytest.mark.parametrize("P", [1, 20])
def test_the_optimum_over_all_patterns_is_found_and_certified(P):
    """Twenty samples in the plane's space: 382 patterns; starting from few the excess is tens of per cent."""
    problem = sampled(P=P, seed=3)
    full = replace(problem, D=enumerated(problem.X))
    penalty = Penalty(0.02 * lambda_max(full, "columns"), "columns")
    optimum = solve(full, penalty, tol=1e-8).primal
    found = column_generation(problem, penalty, tol=1e-4)
    excess = [line["primal"] / optimum - 1 for line in found.history]
    assert excess[0] > 0.01 and all(b <= a + 1e-6 for a, b in zip(excess, excess[1:], strict=False))
    assert -1e-7 <= excess[-1] < 1e-4 and len(excess) < 12
    assert found.how == "enumeration" and found.bound <= optimum * (1 + 1e-9) and found.bound >= optimum * (1 - 1e-3)
    assert found.best_violation <= (1 + 1e-4) * penalty.lam and found.D.shape[1] < 100
    assert "heuristic" in found.message and "certified" in found.message
    assert solve(replace(problem, D=found.D), penalty).primal == pytest.approx(found.solution.primal, rel=2e-6)


@pytest.mark.parametrize("loss, C, intercept", [("logistic", 1, True), ("softmax", 2, False), ("squared", 2, True)])
def test_other_losses_and_outputs(loss, C, intercept):
    problem = sampled(9, 2, 2, 1, loss, C, intercept=intercept)
    full = replace(problem, D=enumerated(problem.X))
    penalty = Penalty(0.1 * lambda_max(full, "columns"), "columns")
    optimum = solve(full, penalty, tol=1e-8).primal
    found = column_generation(problem, penalty, tol=1e-4)
    assert found.solution.primal == pytest.approx(optimum, rel=2e-4)
    assert optimum * (1 - 1e-3) <= found.bound <= optimum * (1 + 1e-9)


def test_violators_are_measured_by_projections_and_the_best_one_is_found():
    """theta from too few gates: no pattern of all 382 is violated more than the best that is found."""
    for seed in range(3):
        problem = sampled(P=4, seed=seed)
        penalty = Penalty(0.02 * lambda_max(problem, "columns"), "columns")
        found = solve(problem, penalty)
        D, values = violators(problem, found, torch.Generator().manual_seed(0), 100)
        every = replace(problem, D=enumerated(problem.X))
        exact = lambda_max_of(every, found.theta)
        assert values[0].item() == pytest.approx(exact, rel=1e-7) and (values[:-1] >= values[1:]).all()
        assert rows(D) <= rows(every.D)


def lambda_max_of(problem: Problem, theta: torch.Tensor) -> float:
    """max |theta^T (X w)_+| over cells, from lambda_max of the squared loss at targets n theta."""
    return lambda_max(replace(problem, Y=theta * len(theta), loss="squared"), "columns")


@given(seed=st.integers(0, 10_000), n=st.integers(1, 20), d=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_cauchy_schwarz_bounds_what_ascent_finds(seed, n, d):
    problem = sampled(n, d, seed=seed)
    theta, W = problem.Y[:, 0], gaussian(d, 50, torch.Generator().manual_seed(seed))
    for sign in (1, -1):
        before = sign * theta @ torch.relu(problem.X @ (W / W.norm(dim=0)))
        up = ascend(problem.X, sign * theta, W)
        after = sign * theta @ torch.relu(problem.X @ up)
        torch.testing.assert_close(up.norm(dim=0), torch.ones(50, dtype=torch.float64))
        assert (after >= before - 1e-9).all() and after.max() <= cauchy_schwarz(problem, theta)


@pytest.mark.parametrize("loss, C, intercept", [("squared", 1, False), ("logistic", 1, True), ("softmax", 3, False)])
def test_the_cheap_bound_is_valid(monkeypatch, loss, C, intercept):
    problem = sampled(12, 2, 4, 2, loss, C, intercept=intercept)
    full = replace(problem, D=enumerated(problem.X))
    penalty = Penalty(0.3 * lambda_max(full, "columns"), "columns")
    exact = solve(full, penalty, tol=1e-8)
    theta = exact.theta
    tight, how = lower_bound(problem, penalty, theta)
    monkeypatch.setattr("lplr.convex.columns.ENUMERATED", 0)
    cheap, other = lower_bound(problem, penalty, theta)
    assert (how, other) == ("enumeration", "Cauchy-Schwarz") and cheap < tight <= exact.primal * (1 + 1e-9)
    found = column_generation(problem, penalty)
    assert found.how == "Cauchy-Schwarz" and 0 < found.bound <= exact.primal


def test_one_cell_makes_the_cheap_bound_exact():
    """n = 1: theta (x w)_+ is at most |theta| ||x||."""
    problem = Problem(torch.tensor([[3.0, 4.0]]).double(), torch.ones(1, 1).double(), torch.ones(1, 1).bool(), activation="relu")
    assert cauchy_schwarz(problem, torch.tensor([-2.0]).double()) == pytest.approx(10.0)


def test_hard_cases_and_limits():
    problem = sampled(P=5)
    top = lambda_max(replace(problem, D=enumerated(problem.X)), "columns")
    zero = column_generation(problem, Penalty(1.01 * top, "columns"))
    assert not zero.solution.U.any() and zero.bound == pytest.approx(zero.solution.primal, rel=1e-9)
    late = Penalty(0.99 * top, "columns")  # above lambda_max of the sampled gates, perhaps, but not of all
    found = column_generation(problem, late)
    assert found.solution.U.any() and found.bound == pytest.approx(found.solution.primal, rel=1e-3)
    one = column_generation(sampled(1, 2), Penalty(0.01, "columns"))
    assert one.bound == pytest.approx(one.solution.primal, rel=1e-3)
    blank = column_generation(replace(problem, X=torch.zeros_like(problem.X)), Penalty(0.1, "columns"))
    assert blank.best_violation == 0 and not blank.solution.U.any()
    penalty = Penalty(0.02 * top, "columns")
    assert len(column_generation(problem, penalty, rounds=1).history) == 1
    assert len(column_generation(problem, penalty, callback=lambda line: line["round"] == 2).history) == 2
    with pytest.raises(RecipeError, match="relu"):
        column_generation(replace(problem, activation="gated"), penalty)


def test_a_solution_without_neurons_can_be_searched():
    problem = sampled(P=3)
    V, theta = torch.zeros(2, 3, 3, 1, dtype=torch.float64), problem.Y / 20
    blank = Solution(V, torch.zeros(1), theta, 0.0, 0.0, 0.0, 0.0, 0, 0.0, status="", message="")
    D, values = violators(problem, blank, torch.Generator().manual_seed(0), 64)
    assert values[0] > 0 and D.any(0).all()


def test_no_rounds_are_one():
    found = column_generation(sampled(), Penalty(0.05), rounds=0)
    assert len(found.history) == 1 and found.solution.U.shape[1] == found.D.shape[1]
