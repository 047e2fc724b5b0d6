"""The two products against the explicit matrix (A_1 ... A_P), and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from convex.oracles import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import problem as module
from lplr.convex.problem import Problem, check
from lplr.errors import RecipeError

EXACT = 1e-12  # a few hundred float64 roundings of numbers of order one


def explicit(problem: Problem) -> torch.Tensor:
    """(n, P d)."""
    return torch.cat([problem.D[:, i : i + 1] * problem.X for i in range(problem.D.shape[1])], 1)


@given(
    n=st.integers(1, 9),
    d=st.integers(1, 5),
    P=st.integers(1, 5),
    C=st.integers(1, 3),
    relu=st.booleans(),
    entries=st.sampled_from([1, 7, 1 << 22]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_products_are_those_of_the_explicit_matrix(n, d, P, C, relu, entries, seed):
    problem = random_problem(seed, "squared", n=n, d=d, P=P, C=C, activation="relu" if relu else "gated")
    draw = torch.Generator().manual_seed(seed)
    U = torch.randn(*((2,) if relu else ()), P, d, C, generator=draw, dtype=torch.float64)
    b, T = torch.randn(C, generator=draw, dtype=torch.float64), torch.randn(n, C, generator=draw, dtype=torch.float64)
    W = U[0] - U[1] if relu else U
    kept, module.ENTRIES = module.ENTRIES, entries
    try:
        assert (problem.fit(U, b) - (explicit(problem) @ W.reshape(P * d, C) + b)).abs().max() < EXACT
        assert (problem.adjoint(T).reshape(P * d, C) - explicit(problem).T @ T).abs().max() < EXACT
    finally:
        module.ENTRIES = kept


def test_the_type_of_the_argument_is_the_type_of_the_product():
    single = random_problem(0, "squared", n=40, d=7, P=5, dtype=torch.float32)
    double = replace(single, X=single.X.double(), Y=single.Y.double())
    U, b = torch.randn(5, 7, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    assert (single.fit(U, b) - double.fit(U, b)).abs().max() < EXACT
    assert (single.adjoint(double.Y) - double.adjoint(double.Y)).abs().max() < EXACT
    assert single.fit(U.float(), b.float()).dtype == single.adjoint(single.Y).dtype == torch.float32


def test_samples_in_a_mapped_file(tmp_path, monkeypatch):
    problem = random_problem(1, "squared", n=30, d=6, P=4)
    np.save(tmp_path / "X.npy", problem.X.numpy())
    mapped = replace(problem, X=torch.from_numpy(np.load(tmp_path / "X.npy", mmap_mode="r+")))
    monkeypatch.setattr(module, "ENTRIES", 40)
    monkeypatch.setattr(module, "KEPT", 0)  # the patterns are converted block by block too
    assert len(list(mapped.blocks())) > 3 and mapped.mask is None
    U, b = torch.randn(4, 6, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert (mapped.fit(U, b) - problem.fit(U, b)).abs().max() < EXACT
    assert (mapped.adjoint(problem.Y) - problem.adjoint(problem.Y)).abs().max() < EXACT


@pytest.mark.parametrize(
    "change, message",
    [
        ({"X": torch.zeros(4)}, "the same n"),
        ({"Y": torch.zeros(5, 1)}, "the same n"),
        ({"D": torch.ones(3, 2, dtype=torch.bool)}, "the same n"),
        ({"D": torch.ones(4, 2, dtype=torch.int64)}, "as bool"),
        ({"D": torch.ones(4, 2), "activation": "relu"}, "as bool"),
        ({"D": torch.ones(4, 0, dtype=torch.bool)}, "no gates"),
        ({"X": torch.zeros(4, 0)}, "no features"),
        ({"X": torch.zeros(4, 3, dtype=torch.float64)}, "cast both"),
        ({"X": torch.zeros(4, 3, dtype=torch.int64), "Y": torch.zeros(4, 1, dtype=torch.int64)}, "cast both"),
        ({"activation": "gelu"}, "gated, relu"),
        ({"X": torch.zeros(0, 3), "Y": torch.zeros(0, 1), "D": torch.ones(0, 2, dtype=torch.bool)}, "no samples"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    good = {"X": torch.zeros(4, 3), "Y": torch.zeros(4, 1), "D": torch.ones(4, 2, dtype=torch.bool)}
    Problem(**good)
    with pytest.raises(RecipeError, match=message):
        Problem(**{**good, **change})


@pytest.mark.parametrize(
    "loss, Y, intercept, message",
    [
        ("squared", [[0.0], [float("nan")], [1.0]], False, "Y holds NaN"),
        ("logistic", [[0.0], [1.0], [1.0]], False, "-1 and"),
        ("logistic", [[-1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], False, "-1 and"),
        ("logistic", [[1.0], [1.0], [1.0]], True, "one class"),
        ("softmax", [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]], False, "one-hot"),
        ("softmax", [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]], False, "one-hot"),
        ("softmax", [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], True, r"classes \[2\]"),
    ],
)
def test_targets_outside_of_the_losses_domain(loss, Y, intercept, message):
    problem = Problem(torch.ones(3, 2), torch.tensor(Y), torch.ones(3, 1, dtype=torch.bool), loss, intercept=intercept)
    with pytest.raises(RecipeError, match=message):
        check(problem)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_samples_that_are_not_finite(bad):
    X = torch.ones(3, 2)
    X[2, 1] = bad
    with pytest.raises(RecipeError, match="X holds NaN"):
        check(Problem(X, torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool)))


def test_one_class_without_an_intercept_is_fitted():
    check(Problem(torch.ones(3, 2), torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool), "logistic"))
