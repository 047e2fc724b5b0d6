"""Projections onto the ReLU's cones, by non-negative least squares, Clarabel and Moreau's theorem."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from convex.oracles import random_problem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from lplr.convex import cones

shapes = {"n": st.integers(1, 25), "d": st.integers(1, 6), "seed": st.integers(0, 10_000)}


def draw(n: int, d: int, seed: int, batch: int = 3, kind: str = "plain") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points (batch, d), X (n, d), signs (batch, n) of random gates; kinds are the awkward samples."""
    random = torch.Generator().manual_seed(seed)
    a, X, g = (torch.randn(k, d, generator=random, dtype=torch.float64) for k in (batch, n, batch))
    if kind == "duplicates":
        X[n // 2 :] = X[: n - n // 2].clone()
    elif kind == "zeros":
        X[::2] = 0
    elif kind == "scales":
        X *= 10.0 ** torch.randint(-4, 5, (n, 1), generator=random)
    elif kind == "zero columns":
        X[:, 0] = 0
    sign = (g @ X.T > 0).double() * 2 - 1
    if kind == "any signs":  # cones that no gate makes: {0}, half-lines, faces
        sign = torch.randint(0, 2, (batch, n), generator=random).double() * 2 - 1
    return a, X, sign


def by_nnls(a: torch.Tensor, X: torch.Tensor, sign: torch.Tensor) -> np.ndarray:
    """a + G^T rho with rho = argmin ||a + G^T rho|| over rho >= 0."""
    G = (sign[:, None] * X).numpy()
    return a.numpy() + G.T @ nnls(G.T, -a.numpy(), maxiter=1000)[0]


@pytest.mark.parametrize("kind", ["plain", "duplicates", "zeros", "scales", "zero columns", "any signs"])
@given(**shapes)
@settings(max_examples=40, deadline=None)
def test_projections_are_those_of_non_negative_least_squares(kind, n, d, seed):
    a, X, sign = draw(n, d, seed, kind=kind)
    found = cones.projection(a, X, sign)
    for row, point, signs in zip(a, found.point, sign, strict=True):
        np.testing.assert_allclose(point, by_nnls(row, X, signs), atol=1e-8 * (1 + row.norm().item()))  # nnls' own accuracy
    assert (found.multipliers >= 0).all()
    torch.testing.assert_close(found.point, a + (found.multipliers * sign) @ X, rtol=1e-9, atol=1e-9)


@given(**shapes, kind=st.sampled_from(["plain", "duplicates", "any signs"]))
@example(n=13, d=5, seed=13, kind="plain")  # facets so nearly parallel that another last digit of a moves Pi(a) by 1.5e-9
@settings(max_examples=40, deadline=None)
def test_moreau(n, d, seed, kind):
    """a = p + q with p in K, <q, w> <= 0 for all w in K, <p, q> = 0; and Pi is idempotent, homogeneous and non-expansive."""
    a, X, sign = draw(n, d, seed, kind=kind)
    p = cones.project(a, X, sign)
    q, tiny = a - p, 1e-9 * (1 + a.norm())
    assert ((sign * (p @ X.T)) >= -tiny * (1 + X.norm())).all()
    assert ((p * q).sum(1).abs() <= tiny * a.norm()).all()
    others = cones.project(torch.randn(3, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), X, sign)
    assert ((q * others).sum(1) <= tiny * (1 + others.norm(dim=1))).all()
    torch.testing.assert_close(cones.project(p, X, sign), p, rtol=1e-8, atol=1e-8)
    assert torch.equal(cones.project(2.0**20 * a, X, sign), 2.0**20 * p)  # to the bit: a power of two rounds nothing
    assert ((others - p).norm(dim=1) <= (others - a).norm(dim=1) + tiny).all()


def test_the_prox_by_clarabel():
    """argmin 1/2 ||w - a||^2 + t ||w|| over the cone, which is shrink_t(Pi_K(a)) though neither alone is a projection."""
    problem = random_problem(3, "squared", n=14, d=4, P=3, C=2, activation="relu")
    V = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cones.prox(V, problem.X, problem.D, 0.3)
    assert 0 < (found.norm(dim=2) == 0).sum() < 12
    for s, i, c in np.ndindex(2, 3, 2):
        w = cp.Variable(4)
        sign = 2 * problem.D[:, i].double().numpy() - 1
        objective = cp.sum_squares(w - V[s, i, :, c].numpy()) / 2 + 0.3 * cp.norm(w, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cp.Problem(cp.Minimize(objective), [cp.multiply(sign, problem.X.numpy() @ w) >= 0]).solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(found[s, i, :, c], w.value, atol=2e-5)  # Clarabel's default accuracy, square root at zero


@given(**shapes)
@settings(max_examples=30, deadline=None)
def test_dual_norms_are_attained_and_any_multipliers_bound_them(n, d, seed):
    problem = random_problem(seed, "squared", n=n, d=d, P=3, C=2, activation="relu")
    random = torch.Generator().manual_seed(seed)
    T = torch.randn(3, d, 2, generator=random, dtype=torch.float64)
    norms = cones.dual_norms(T, problem.X, problem.D)
    best = cones.repair(cones.both_signs(T), problem.X, problem.D)  # the maximiser of <T, w> over the cone, up to its length
    attained = (cones.both_signs(T) * best).sum(2)
    torch.testing.assert_close(attained, norms * best.norm(dim=2), rtol=1e-7, atol=1e-9)
    rho = torch.rand(2, 3, 2, n, generator=random, dtype=torch.float64) - 0.3  # negative ones must not count
    assert (cones.dual_norms(T, problem.X, problem.D, rho) >= norms - 1e-9).all()
    exact = cones.project_weights(cones.both_signs(T), problem.X, problem.D).multipliers
    torch.testing.assert_close(cones.dual_norms(T, problem.X, problem.D, exact), norms, rtol=1e-6, atol=1e-7)


def test_feasibility_is_measured_and_repaired():
    problem = random_problem(0, "squared", n=10, d=3, P=4, C=2, activation="relu")
    V = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    worst = 0.0
    for s, i, c, j in np.ndindex(2, 4, 2, 10):
        margin = (problem.X[j] @ V[s, i, :, c]).item() * (1 if problem.D[j, i] else -1)
        worst = max(worst, -margin)
    assert cones.violation(V, problem.X, problem.D).item() == pytest.approx(worst, rel=1e-12) and worst > 0.1
    repaired = cones.repair(V, problem.X, problem.D)
    assert cones.violation(repaired, problem.X, problem.D) < 1e-9
    assert (repaired.norm(dim=2) <= V.norm(dim=2) + 1e-12).all()
    torch.testing.assert_close(cones.repair(repaired, problem.X, problem.D), repaired, rtol=1e-9, atol=1e-9)


def test_where_nothing_is_left_the_projection_may_end_early():
    """radius: the point returned is no longer than it, and neither is the projection, so both shrink to zero."""
    a, X, sign = draw(40, 5, 7, batch=20)
    exact = cones.project(a, X, sign).norm(dim=1)
    early = cones.projection(a, X, sign, radius=float(exact.median())).point.norm(dim=1)
    assert (early >= exact - 1e-9).all()
    assert ((early <= exact.median() + 1e-9) == (exact <= exact.median() + 1e-9)).all()


def test_multipliers_of_a_neighbour_are_a_good_start():
    a, X, sign = draw(60, 6, 1, batch=8)
    near = cones.projection(a, X, sign)
    moved = a + 1e-3 * torch.ones_like(a)
    warm, cold = cones.projection(moved, X, sign, near.multipliers), cones.projection(moved, X, sign)
    torch.testing.assert_close(warm.point, cold.point, rtol=1e-8, atol=1e-9)
    assert cones.projection(a, X, sign, near.multipliers).residual.max() <= cones.TOLERANCE


def test_shapes_and_types():
    a, X, sign = draw(9, 3, 0)
    assert cones.project(a[0], X, sign[0]).shape == (3,)
    assert cones.project(a[:, None].expand(3, 2, 3), X, sign[:, None]).shape == (3, 2, 3)
    single = cones.projection(a.float(), X.float(), sign.float())
    assert single.point.dtype == single.multipliers.dtype == torch.float32
    torch.testing.assert_close(single.point.double(), cones.project(a, X, sign), rtol=1e-5, atol=1e-5)
    zero = cones.projection(torch.zeros_like(a), X, sign)
    assert not zero.point.any() and not zero.residual.any()


@pytest.mark.parametrize("n, d, seed, kind", [(8, 4, 3355, "any signs"), (9, 6, 7071, "any signs")])
def test_thin_cones_take_large_multipliers(n, d, seed, kind):
    """Rounds without progress while sigma still grew once ended the first of these at a violation of 5e-4."""
    a, X, sign = draw(n, d, seed, kind=kind)
    found = cones.projection(a, X, sign)
    assert found.residual.max() <= 1e-9  # multipliers of 1e3 and more: what they lose to rounding
    for k in range(len(a)):
        np.testing.assert_allclose(found.point[k], by_nnls(a[k], X, sign[k]), atol=1e-8)


def test_large_cones_by_small_systems(monkeypatch):
    """More features than active rows: the systems of the rows and those of the features give the same projection."""
    a, X, sign = draw(150, 120, 3)
    found = cones.projection(a, X, sign)
    monkeypatch.setattr(cones, "SMALL", 1000)
    other = cones.projection(a, X, sign)
    assert found.residual.max() <= cones.TOLERANCE and other.residual.max() <= cones.TOLERANCE
    torch.testing.assert_close(found.point, other.point, rtol=0, atol=1e-9 * float(a.norm()))
    for k in range(len(a)):
        np.testing.assert_allclose(found.point[k], by_nnls(a[k], X, sign[k]), atol=1e-8)
