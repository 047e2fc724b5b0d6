"""Restarted FISTA against Clarabel for every programme, in both precisions, from memory and from a file."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from convex.oracles import optimum, random_problem, value
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import cones
from lplr.convex import fista as module
from lplr.convex import problem as products
from lplr.convex.fista import State, fista, squared_norm
from lplr.convex.penalty import NORMS, Penalty
from lplr.convex.solve import lambda_max
from lplr.errors import RecipeError

programmes = [
    p for p in itertools.product(("squared", "logistic", "softmax"), NORMS, (False, True)) if p[:2] != ("logistic", "columns")
]
every = pytest.mark.parametrize("loss, norm, intercept", programmes)


@every
@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.05, 0.5]), linear=st.booleans(), C=st.integers(2, 3))
@settings(max_examples=5, deadline=None)
def test_clarabels_optimum(loss, norm, intercept, seed, ratio, linear, C):
    problem = random_problem(seed, loss, n=12, d=3, P=4, C=C, intercept=intercept, linear=linear)
    penalty = Penalty(ratio * lambda_max(problem, norm), norm)
    found = fista(problem, penalty, tol=1e-7)
    assert found.converged and found.relative_gap <= 1e-7
    assert found.primal == pytest.approx(optimum(problem, penalty), rel=2e-6, abs=1e-8)
    assert found.primal == pytest.approx(value(problem, penalty, found.U, found.b), rel=1e-10)


@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
@pytest.mark.parametrize("intercept", [False, True])
def test_the_cones_of_relu(loss, intercept):
    problem = random_problem(4, loss, n=12, d=3, P=3, C=2, activation="relu", intercept=intercept)
    penalty = Penalty(0.1 * lambda_max(problem, "columns"), "columns")
    found = fista(problem, penalty, tol=1e-6)
    assert found.converged
    assert found.primal == pytest.approx(optimum(problem, penalty), rel=5e-6)
    margins = (problem.X @ found.U) * (2 * problem.D.double() - 1).T[:, :, None]
    assert margins.min() >= -1e-8  # projections end at 1e-11 of the weights' length


@every
def test_float32(loss, norm, intercept):
    problem = random_problem(11, loss, n=60, d=6, P=8, C=3, intercept=intercept, dtype=torch.float32)
    wide = replace(problem, X=problem.X.double(), Y=problem.Y.double())
    penalty = Penalty(0.1 * lambda_max(problem, norm), norm)
    found, exact = fista(problem, penalty, tol=1e-4), fista(wide, penalty, tol=1e-7)
    assert found.converged and found.U.dtype == torch.float32
    assert found.dual <= exact.primal and exact.primal <= found.primal * (1 + 1e-7) <= exact.primal * (1 + 1.1e-4)


def test_samples_in_a_file_and_in_blocks(tmp_path, monkeypatch):
    problem = random_problem(1, "softmax", n=50, d=6, P=5, C=3, intercept=True)
    np.save(tmp_path / "X.npy", problem.X.numpy())
    mapped = replace(problem, X=torch.from_numpy(np.load(tmp_path / "X.npy", mmap_mode="r+")))
    penalty = Penalty(0.05 * lambda_max(problem, "group"))
    whole = fista(problem, penalty, tol=1e-6)
    monkeypatch.setattr(products, "ENTRIES", 100)
    monkeypatch.setattr(products, "KEPT", 0)
    blocks = fista(mapped, penalty, tol=1e-6)
    assert blocks.converged and blocks.primal == pytest.approx(whole.primal, rel=2e-6)


@given(n=st.integers(1, 20), d=st.integers(1, 6), P=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_step_is_never_disproved_for_long(n, d, P, seed):
    problem = random_problem(seed, "squared", n=n, d=d, P=P, C=1)
    A = torch.cat([problem.D[:, i : i + 1] * problem.X for i in range(P)], 1)
    exact = torch.linalg.matrix_norm(A, 2).item() ** 2
    found = squared_norm(problem)
    assert found >= 0.5 * exact and found <= exact * (1 + 1e-9) + 1e-300  # power iterations: from below
    state = State(problem, Penalty(0.01))
    state.L *= 1e-3
    for _ in range(5):
        state.step()
    assert module.GROWTH * exact / n + 1e-12 >= state.L


def test_the_objective_falls_without_momentum():
    problem = random_problem(5, "logistic", n=40, d=5, P=8, intercept=True)
    penalty = Penalty(0.05 * lambda_max(problem, "group"))
    state = State(problem, penalty)
    values = []
    for _ in range(30):
        state.t, state.old, state.old_fit = 1.0, state.U, state.Z
        state.step()
        values.append(state.gap()[0])
    assert all(b <= a * (1 + 1e-12) for a, b in zip(values, values[1:], strict=False)) and values[-1] < values[0]


def test_limits_callbacks_and_warm_starts():
    problem = random_problem(6, "squared", n=40, d=5, P=8, C=1)
    penalty = Penalty(0.02 * lambda_max(problem, "group"))
    short = fista(problem, penalty, tol=1e-8, max_iter=30)
    assert short.status == "max_iterations" and short.iterations == 30 and "raise max_iter" in short.message
    seen = []
    stopped = fista(problem, penalty, tol=1e-8, callback=lambda line: seen.append(line) or len(seen) == 2)
    assert stopped.status == "stopped" and len(seen) == 2 and stopped.iterations == 40
    full = fista(problem, penalty, tol=1e-6)
    assert fista(problem, penalty, tol=1e-6, warm=full).iterations == 0


def test_precision_that_cannot_be_had_is_a_status():
    problem = random_problem(6, "squared", n=40, d=5, P=8, C=1, dtype=torch.float32)
    found = fista(problem, Penalty(0.02 * lambda_max(problem, "group")), tol=1e-12)
    assert found.status == "stalled" and "float64" in found.message and found.relative_gap < 1e-4


def test_cones_of_a_large_problem_are_refused():
    problem = random_problem(0, "squared", n=3000, d=20, P=40, C=1, activation="relu")
    with pytest.raises(RecipeError, match="method='admm'"):
        fista(problem, Penalty(0.1))


def test_weights_outside_the_cones_are_no_start():
    problem = random_problem(1, "squared", n=18, P=5, C=1, activation="relu")
    penalty = Penalty(1e-3, "columns")
    cold = fista(problem, penalty, tol=1e-3)
    outside = torch.randn(cold.U.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert cones.violation(outside, problem.X, problem.D) > 0.1
    for options in ({"max_iter": 0}, {"tol": 1e-3}):
        found = fista(problem, penalty, warm=replace(cold, U=outside), **options)
        assert cones.violation(found.U, problem.X, problem.D) <= 1e-9
        assert found.primal >= optimum(problem, penalty) * (1 - 1e-7)
