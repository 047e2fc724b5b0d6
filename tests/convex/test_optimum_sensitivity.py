"""Derivatives of optima against finite differences of certified solves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convex.oracles import random_problem
from convex.test_optimal_set import matchings

from lplr.convex import Penalty, Problem, Solution, lambda_max, solve
from lplr.convex.sensitivity import sensitivity
from lplr.errors import RecipeError

float64 = torch.float64
PROGRAMMES = [
    ("gated", "squared", "group", False, 1, 0),
    ("gated", "squared", "group", True, 2, 1),
    ("gated", "squared", "columns", True, 2, 2),
    ("gated", "logistic", "group", True, 1, 3),
    ("gated", "softmax", "group", True, 3, 4),
    ("gated", "softmax", "columns", False, 3, 5),
    ("relu", "squared", "columns", False, 1, 6),
    ("relu", "squared", "columns", True, 2, 7),
]
STEP = 1e-5  # differences are off by its square, and by solutions' 1e-10 over it


def made(activation: str, loss: str, norm: str, intercept: bool, C: int, seed: int) -> tuple[Problem, float]:
    problem = random_problem(seed, loss, n=14, d=3, P=5, C=C, intercept=intercept, activation=activation)
    return problem, 0.1 * lambda_max(problem, norm)


def tight(problem: Problem, penalty: Penalty) -> Solution:
    return solve(problem, penalty, tol=1e-14)


@pytest.mark.parametrize("activation, loss, norm, intercept, C, seed", PROGRAMMES)
def test_the_derivative_by_lam_is_that_of_solutions_nearby(activation, loss, norm, intercept, C, seed):
    problem, lam = made(activation, loss, norm, intercept, C, seed)
    dU, db = sensitivity(problem, Penalty(lam, norm), tight(problem, Penalty(lam, norm))).by_lam
    up, down = (tight(problem, Penalty(lam * (1 + s * STEP), norm)) for s in (1, -1))
    size = (up.U - down.U).abs().max() / (2 * STEP * lam)
    assert dU == pytest.approx((up.U - down.U) / (2 * STEP * lam), abs=1e-3 * float(size)) and size > 0
    step = (up.b - down.b) / (2 * STEP * lam)
    assert db == pytest.approx(step - step.mean() if loss == "softmax" else step, abs=1e-3 * float(size))


@pytest.mark.parametrize("activation, loss, norm, intercept, C, seed", [p for p in PROGRAMMES if p[1] == "squared"])
def test_the_derivative_by_targets_and_the_degrees_of_freedom(activation, loss, norm, intercept, C, seed):
    problem, lam = made(activation, loss, norm, intercept, C, seed)
    penalty = Penalty(lam, norm)
    found = sensitivity(problem, penalty, tight(problem, penalty))
    direction = torch.randn(problem.Y.shape, generator=torch.Generator().manual_seed(seed), dtype=float64)
    step = STEP if activation == "gated" else 3e-4  # cones are solved less accurately
    up, down = (tight(replace(problem, Y=problem.Y + s * step * direction), penalty) for s in (1, -1))
    dU, db = found.by_targets(direction)
    size = float((up.U - down.U).abs().max()) / (2 * step)
    assert dU == pytest.approx((up.U - down.U) / (2 * step), abs=1e-3 * size)
    assert db == pytest.approx((up.b - down.b) / (2 * step), abs=1e-3 * size)
    if activation == "relu" and C > 1:
        return  # 56 programmes of cones
    total = 0.0  # sum of d z_j / d y_j, one target at a time
    for j in range(len(problem.Y)):
        for c in range(C):
            e = torch.zeros_like(problem.Y)
            e[j, c] = STEP
            fits = []
            for s in (1, -1):
                one = tight(replace(problem, Y=problem.Y + s * e), penalty)
                fits.append(problem.fit(one.U, one.b)[j, c].item())
            total += (fits[0] - fits[1]) / (2 * STEP)
    assert found.degrees_of_freedom == pytest.approx(total, rel=2e-3)


def test_what_has_no_derivative_is_refused():
    problem, penalty = matchings()
    with pytest.raises(RecipeError, match="not unique"):
        sensitivity(problem, penalty, solve(problem, penalty, tol=1e-12))
    other, lam = made("gated", "softmax", "group", True, 3, 4)
    found = sensitivity(other, Penalty(lam), tight(other, Penalty(lam)))
    with pytest.raises(RecipeError, match="squared"):
        found.by_targets(other.Y)
    with pytest.raises(RecipeError, match="nuclear"):
        sensitivity(other, Penalty(lam, "nuclear"), solve(other, Penalty(lam, "nuclear")))


def test_without_active_blocks_only_the_intercept_is_free():
    problem = random_problem(0, "squared", C=1, intercept=True)
    penalty = Penalty(1.1 * lambda_max(problem, "group"))
    found = sensitivity(problem, penalty, solve(problem, penalty))
    assert found.degrees_of_freedom == pytest.approx(1) and not found.by_lam[0].any()
    assert found.by_targets(torch.ones_like(problem.Y))[1].item() == pytest.approx(1)
    bare = replace(problem, intercept=False)
    penalty = Penalty(1.1 * lambda_max(bare, "group"))
    assert sensitivity(bare, penalty, solve(bare, penalty)).degrees_of_freedom == 0
