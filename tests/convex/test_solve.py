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
