"""The one door: what it picks, refuses and says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from convex.oracles import optimum, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import Penalty, Problem, lambda_max, solve
from lplr.convex.solve import METHODS, pick
from lplr.errors import RecipeError

LOSSES = ("squared", "logistic", "softmax")


@pytest.mark.parametrize("loss, intercept, linear", [*itertools.product(LOSSES, (False, True), (False, True))])
@pytest.mark.parametrize(
    "norm, activation", [("group", "gated"), ("columns", "gated"), ("nuclear", "gated"), ("columns", "relu")]
)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=1, deadline=None)
def test_auto_reaches_the_optimum_of_every_programme(loss, intercept, linear, norm, activation, seed):
    problem = random_problem(seed, loss, n=14, d=3, P=3, C=2, intercept=intercept, linear=linear, activation=activation)
    penalty = Penalty(0.1 * lambda_max(problem, norm), norm)
    found = solve(problem, penalty)
    assert found.converged and found.relative_gap <= 1e-6 and str(found.status) in found.message + "converged"
    assert found.primal == pytest.approx(optimum(problem, penalty), rel=3e-6, abs=1e-8)


@pytest.mark.parametrize("loss, intercept, activation", [*itertools.product(LOSSES, (False, True), ("gated", "relu"))])
def test_lambda_max_is_where_gates_appear(loss, intercept, activation):
    problem = random_problem(3, loss, n=14, d=3, P=4, intercept=intercept, activation=activation)
    top = lambda_max(problem, "columns")
    assert top == pytest.approx(lambda_max(problem, Penalty(1.0, "columns")), rel=1e-12)
    above, below = (
        solve(problem, Penalty(top * (1 + 1e-6), "columns")),
        solve(problem, Penalty(top * (1 - 1e-3), "columns"), tol=1e-8),
    )
    assert not above.U.any() and above.converged and "lambda_max" in above.message and above.relative_gap < 1e-9
    assert below.U.any()


def test_zero_targets():
    problem = replace(random_problem(0, "squared"), Y=torch.zeros(12, 2, dtype=torch.float64))
    found = solve(problem, Penalty(0.1))
    assert found.converged and found.primal == found.dual == found.relative_gap == 0.0


def test_what_auto_picks():
    gated, relu = random_problem(0, "squared"), random_problem(0, "squared", activation="relu")
    assert pick(gated, Penalty(1.0)) == "newton" and pick(relu, Penalty(1.0, "columns")) == "admm"
    assert pick(gated, Penalty(1.0, "nuclear")) == "fista"
    long = Problem(torch.zeros(20_000, 1), torch.zeros(20_000, 1), torch.ones(20_000, 1, dtype=torch.bool))
    assert pick(long, Penalty(1.0)) == "fista"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_certified_even_when_cut_short(method):
    activation = "relu" if method in ("admm", "cronos") else "gated"
    problem = random_problem(5, "squared", n=16, d=3, P=4, C=1, activation=activation)
    penalty = Penalty(0.05 * lambda_max(problem, "columns"), "columns")
    found = solve(problem, penalty, method=method, max_iter=1, tol=1e-12)
    best = optimum(problem, penalty)
    assert found.dual <= best * (1 + 1e-7) and found.primal >= best * (1 - 1e-7) and found.gap == found.primal - found.dual
    assert not found.converged and len(found.message) > 20 and found.seconds > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "adam"}, "choose one of"),
        ({"tol": 0.0}, "between 0 and 1"),
        ({"tol": float("nan")}, "between 0 and 1"),
        ({"max_iter": -1}, "0 or more"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(RecipeError, match=message):
        solve(random_problem(0, "squared"), Penalty(0.1), **change)


def test_input_that_cannot_be_fitted():
    problem = random_problem(0, "squared")
    with pytest.raises(RecipeError, match="X holds NaN"):
        solve(replace(problem, X=torch.full_like(problem.X, float("nan"))), Penalty(0.1))
    with pytest.raises(RecipeError, match="norm='columns'"):
        solve(random_problem(0, "squared", activation="relu"), Penalty(0.1))
    with pytest.raises(RecipeError, match="unknown loss"):
        solve(replace(problem, loss="hinge"), Penalty(0.1))
    other = solve(random_problem(0, "squared", P=3), Penalty(0.01))
    with pytest.raises(RecipeError, match="equal shapes"):
        solve(problem, Penalty(0.1), warm=other)


def test_a_callback_ends_the_run():
    problem = random_problem(0, "logistic", n=60, d=5, P=9)
    found = solve(problem, Penalty(0.01 * lambda_max(problem, "group")), callback=lambda line: line["iteration"] == 1)
    assert found.status == "stopped" and found.iterations == 1 and len(found.history) == 2


@pytest.mark.parametrize("norm", ["group", "columns"])
@pytest.mark.parametrize("method", ["newton", "fista", "admm"])
def test_constant_targets_leave_no_false_certificate(norm, method):
    """A constant column's residual is rounding, which a dual point must not be made of."""
    problem = random_problem(1, "squared", n=40, d=5, P=8, C=2, intercept=True)
    problem.Y[:, 0] = 0.1
    penalty = Penalty(1e-3, norm)
    other = optimum(replace(problem, Y=problem.Y[:, 1:]), penalty)  # the constant column costs nothing
    found = solve(problem, penalty, method=method)
    assert found.converged and found.dual <= other * (1 + 1e-7) and found.primal == pytest.approx(other, rel=3e-6)
    assert found.theta.sum(0).abs().max() <= 1e-12


@pytest.mark.parametrize("value", [0.1, 0.7834181838581267, -3e7])
def test_targets_that_are_all_the_same(value):
    problem = random_problem(8, "squared", n=13, C=1, intercept=True)
    found = solve(replace(problem, Y=torch.full_like(problem.Y, value)), Penalty(1e-3))
    assert found.converged and found.primal == found.dual == 0.0 and found.b.item() == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("method, offset", [*itertools.product(("newton", "fista", "admm"), (1e6, 1e11))])
def test_a_large_offset_of_the_targets_goes_into_the_intercept(method, offset):
    activation = "relu" if method == "admm" else "gated"
    problem = random_problem(4, "squared", n=30, d=3, P=4, C=2, intercept=True, activation=activation)
    moved = replace(problem, Y=problem.Y + offset)
    problem = replace(problem, Y=moved.Y - offset)  # what is left of Y, exactly
    penalty = Penalty(0.05 * lambda_max(problem, "columns"), "columns")
    assert lambda_max(moved, "columns") == pytest.approx(lambda_max(problem, "columns"), rel=1e-9)
    found = solve(moved, penalty, method=method)
    again = solve(moved, penalty, method=method, warm=found)
    best = optimum(problem, penalty)
    for one in (found, again):
        assert one.converged and one.primal == pytest.approx(best, rel=3e-6) and one.dual <= best * (1 + 1e-6)


@pytest.mark.parametrize("loss, size", [*itertools.product(LOSSES, (1e-4, 1e4))])
def test_the_size_of_the_samples_does_not_matter_to_relu(loss, size):
    problem = random_problem(2, loss, n=24, d=3, P=4, intercept=True, activation="relu")
    penalty = Penalty(0.05 * lambda_max(problem, "columns"), "columns")
    plain = solve(problem, penalty)
    scaled = solve(replace(problem, X=problem.X * size), Penalty(penalty.lam * size, "columns"))
    assert plain.converged and scaled.converged and scaled.iterations <= 2 * plain.iterations
    assert scaled.primal == pytest.approx(plain.primal, rel=2e-6)


@pytest.mark.parametrize("norm", ["group", "columns"])
def test_where_newton_is_stuck_auto_goes_on(norm):
    problem = random_problem(0, "softmax", n=30, d=4, P=6, C=3)
    penalty = Penalty(1e-6 * lambda_max(problem, norm), norm)
    alone, found = solve(problem, penalty, method="newton"), solve(problem, penalty)
    assert found.gap <= alone.gap and found.relative_gap <= 1e-3
    nothing = solve(problem, Penalty(1e-15 * lambda_max(problem, norm), norm))  # no exception, a status
    assert nothing.primal < 1e-3 and nothing.message


def test_weights_of_another_programme_are_no_false_start():
    gated = random_problem(6, "squared", n=20, C=1, intercept=True)
    shifted = replace(gated, Y=gated.Y + 3)
    warm = solve(shifted, Penalty(0.01))
    cut = solve(replace(shifted, intercept=False), Penalty(0.01), method="admm", warm=warm, max_iter=0)
    assert not cut.b.any() and cut.primal >= optimum(replace(shifted, intercept=False), Penalty(0.01)) * (1 - 1e-7)
    with pytest.raises(RecipeError, match="warm holds NaN"):
        solve(shifted, Penalty(0.01), warm=replace(warm, U=warm.U * float("nan")))
    with pytest.raises(RecipeError, match="equal shapes"):
        solve(shifted, Penalty(0.01), warm=replace(warm, b=torch.zeros(2)))


def test_samples_with_gradients():
    problem = random_problem(3, "softmax", intercept=True)
    found = solve(replace(problem, X=problem.X.clone().requires_grad_()), Penalty(0.01))
    assert found.converged and not found.U.requires_grad
