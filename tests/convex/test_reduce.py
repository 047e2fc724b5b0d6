"""The programme on an n x r factor against the programme itself, and one pass over a file against the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convex.oracles import optimum, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import reduce as module
from lplr.convex.certificate import certify
from lplr.convex.newton import newton
from lplr.convex.penalty import NORMS, Penalty
from lplr.convex.problem import Problem
from lplr.convex.reduce import certify_stream, compact, expand, factor, gate_rows, lift, stream
from lplr.convex.solve import lambda_max, solve
from lplr.errors import RecipeError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)


def wide(seed: int, n: int = 10, d: int = 50, rank: int | None = None) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=draw, dtype=torch.float64)
    return X if rank is None else torch.randn(n, rank, generator=draw, dtype=torch.float64) @ X[:rank]


@pytest.mark.parametrize("kind", ["tensor", "array", "file", "slice"])
def test_one_pass(tmp_path, kind):
    X = wide(0).float()
    np.save(tmp_path / "X.npy", X.numpy())
    given = {
        "tensor": X,
        "array": X.numpy(),
        "file": np.load(tmp_path / "X.npy", mmap_mode="r"),
        "slice": np.load(tmp_path / "X.npy", mmap_mode="r")[2:, 3:],
    }[kind]
    X = (X[2:, 3:] if kind == "slice" else X).double()
    found = stream(given, 7, seed=3)
    G = torch.cat([gate_rows(3, k, min(16, X.shape[1] - 16 * k), 7) for k in range(-(-X.shape[1] // 16))])
    assert (found.K - X @ X.T).abs().max() < 1e-11 and torch.equal(found.K, found.K.T)
    assert (found.scores - X @ G).abs().max() < 1e-11
    assert torch.equal(found.patterns(), X @ G > 0)
    assert not torch.equal(stream(given, 7, seed=4).scores, found.scores)


@given(seed=st.integers(0, 999), norm=st.sampled_from(NORMS), rank=st.sampled_from([None, 4]), intercept=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_same_optimum_weights_and_certificate(seed, norm, rank, intercept):
    X = wide(seed, rank=rank)
    D = X @ torch.randn(50, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) > 0
    D[:, 0] = True
    Y = torch.randn(10, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    problem = Problem(X, Y, D, intercept=intercept)
    small, found = compact(problem)
    assert found.rank == (rank or 10) and (small.X @ small.X.T - X @ X.T).abs().max() < 1e-10
    penalty = Penalty(0.1 * lambda_max(problem, norm), norm)
    assert lambda_max(small, norm) == pytest.approx(lambda_max(problem, norm), rel=1e-9)
    solution = solve(small, penalty, method="fista" if norm == "nuclear" else "newton", tol=1e-7)
    back = expand(solution, found, problem, penalty, 1e-7)
    assert back.primal == pytest.approx(solution.primal, rel=1e-8) and back.dual == pytest.approx(solution.dual, rel=1e-8)
    assert back.relative_gap <= 2e-7 and back.converged
    assert (problem.fit(back.U, back.b) - small.fit(solution.U, solution.b)).abs().max() < 1e-8
    assert (penalty.lengths(back.U).sum() - penalty.lengths(solution.U).sum()).abs() < 1e-8
    lifted = torch.cat([block for _, block in lift(X, found, solution.U)], 1)
    assert (lifted - back.U).abs().max() < 1e-9


@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_certificate_of_another_pass(tmp_path, loss, norm):
    X = wide(1).float()
    np.save(tmp_path / "X.npy", X.numpy())
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    passed = stream(mapped, 6, seed=0)
    found = factor(passed.K)
    problem = Problem(found.L, random_problem(0, loss, n=10, C=2).Y, passed.patterns(), loss, intercept=True)
    penalty = Penalty(0.1 * lambda_max(problem, norm), norm)
    solution = solve(problem, penalty, method="fista" if norm == "nuclear" else "auto", tol=1e-6)
    proof = certify_stream(mapped, problem, penalty, found, solution)
    U = torch.cat([block for _, block in lift(mapped, found, solution.U)], 1)
    original = Problem(X.double(), problem.Y, problem.D, loss, intercept=True)
    exact = certify(original, penalty, U, solution.b, solution.theta)
    assert proof.primal == pytest.approx(exact.primal, rel=1e-8)  # nuclear: roots of eigenvalues
    assert proof.dual == pytest.approx(exact.dual, rel=1e-6) and proof.within(3e-6)


def test_solve_reduces_wide_problems():
    problem = random_problem(0, "logistic", n=12, d=60, P=5, intercept=True)
    penalty = Penalty(0.1 * lambda_max(problem, "group"))
    found, direct = solve(problem, penalty, tol=1e-8), newton(problem, penalty, tol=1e-8)
    assert found.converged and found.U.shape == (5, 60, 1)
    assert found.primal == pytest.approx(direct.primal, rel=2e-8) and found.primal == pytest.approx(
        optimum(problem, penalty), rel=1e-6
    )


def test_bad_samples():
    X = wide(0)
    X[3, 20] = float("nan")
    with pytest.raises(RecipeError, match="NaN"):
        stream(X, 3, seed=0)
    with pytest.raises(RecipeError, match="zero"):
        factor(torch.zeros(3, 3, dtype=torch.float64))


def test_what_is_left_out_is_told():
    X = torch.diag(torch.tensor([1.0, 1e-3, 1e-8], dtype=torch.float64))
    found = factor(X @ X.T)
    assert found.rank == 2 and found.dropped == pytest.approx(1e-8, rel=1e-6)
