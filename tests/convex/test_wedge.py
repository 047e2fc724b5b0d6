"""Wedge products against determinants; their Lasso against the network programme with all patterns, and its dual on a grid."""

from __future__ import annotations

import math
from itertools import combinations

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lplr.convex import subsets, wedge
from lplr.convex.gates import Gates
from lplr.convex.lasso import Lasso, lambda_max, solve_lasso
from lplr.convex.solution import Solution
from lplr.errors import RecipeError

EXACT = 1e-12  # rounding of float64 products of a few numbers of size one
SOLVED = 2e-6  # relative: what Clarabel at 1e-9 and a Lasso at 1e-9 differ by


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def programme(X: np.ndarray, y: np.ndarray, patterns: np.ndarray, lam: float, p: float, bias: bool) -> float:
    """Optimum of the network programme with the given patterns (n, P), squared loss, by Clarabel: no dictionary in it."""
    n, d = X.shape
    Z, penalty, constraints = cp.Constant(np.zeros(n)), 0, []
    for D in patterns.T:
        for sign in (1, -1):
            w, b = cp.Variable(d), cp.Variable() if bias else 0.0
            scores = X @ w + b
            Z = Z + sign * cp.multiply(D, scores)
            penalty = penalty + cp.norm(w, {1.0: 1, 2.0: 2, math.inf: "inf"}[p])
            constraints.append(cp.multiply(2 * D - 1, scores) >= 0)
    found = cp.Problem(cp.Minimize(cp.sum_squares(Z - y) / (2 * n) + lam * penalty), constraints)
    found.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return float(found.value)


def thresholds(x: np.ndarray) -> np.ndarray:
    """All patterns of a line with biases."""
    order = np.sort(x)
    columns = [x > t for t in order] + [x < t for t in order] + [np.ones_like(x, bool)]
    return np.array(columns, float).T


def sectors(X: np.ndarray) -> np.ndarray:
    """All patterns of lines through 0 in the plane: one direction between every two neighbouring normals."""
    angles = np.sort(np.concatenate([np.arctan2(X[:, 1], X[:, 0]) + s * np.pi / 2 for s in (1, -1)]) % (2 * np.pi))
    middle = (angles + np.append(angles[1:], angles[0] + 2 * np.pi)) / 2
    return (X @ np.array([np.cos(middle), np.sin(middle)]) > 0).astype(float)


def fitted(X: Tensor, Y: Tensor, wedges: wedge.Wedges, share: float = 0.1) -> tuple[Solution, float]:
    lasso = Lasso(wedges.columns(X), len(wedges), Y, "squared", wedges.bias)
    lam = share * lambda_max(lasso)
    found = solve_lasso(lasso, lam, tol=1e-9)
    assert found.converged and found.relative_gap <= 1e-9
    return found, lam


def worst(X: Tensor, theta: Tensor, w: Tensor, b: Tensor) -> float:
    """max ||theta^T (X w + b)_+|| over the columns of w (d, N), offsets b (N,)."""
    return (theta.T @ (X @ w + b).clamp_min(0)).norm(dim=0).max().item()


@given(d=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_cross_product_is_the_determinant(d, seed):
    rows, x = normal(seed, d - 1, d), normal(seed + 1000, 3, d)
    found = wedge.cross(rows)
    scale = rows.norm(dim=1).prod().item() * x.norm(dim=1).max().item()
    det = torch.stack([torch.linalg.det(torch.cat([v[None], rows])) for v in x])
    assert (x @ found - det).abs().max() < EXACT * max(scale, 1)
    assert d == 1 or (rows @ found).abs().max() < EXACT * scale * rows.norm(dim=1).max()
    if d > 2:
        swapped = rows.clone()
        swapped[[0, 1]] = rows[[1, 0]]
        assert (wedge.cross(swapped) + found).abs().max() < EXACT * scale
    unit, independent = wedge.normals(rows)
    assert independent and unit.norm() == pytest.approx(1) and (unit @ found).abs() == pytest.approx(found.norm().item())


def test_the_cross_product_of_three_dimensions_is_the_schoolbook_one():
    a, b = normal(0, 50, 3), normal(1, 50, 3)
    assert torch.allclose(wedge.cross(torch.stack([a, b], 1)), torch.linalg.cross(a, b), atol=EXACT)


def test_minors_and_lengths_far_out_of_range():
    """Of rows of lengths 1e-200 and 1e200 the normal is that of rows of length one; determinants would be 0 or inf."""
    rows = normal(3, 7, 8)
    unit, _ = wedge.normals(rows)
    moved, independent = wedge.normals(rows * torch.logspace(-140, 140, 7, dtype=torch.float64)[:, None])
    assert independent and (unit @ moved).abs() == pytest.approx(1, abs=1e-12)


def test_dependent_rows_are_no_wedge_product():
    rows = normal(0, 4, 3, 4)
    rows[1, 2] = 2 * rows[1, 0] - rows[1, 1]
    rows[2, 1] = 0
    rows[3, 2] = rows[3, 0] + 1e-7 * rows[3, 2]  # nearly, but not
    unit, independent = wedge.normals(rows)
    assert independent.tolist() == [True, False, False, True]
    assert (rows[3] @ unit[3]).abs().max() < 1e-12


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_one_dimension_is_exact(share):
    x = normal(0, 13, 1)
    y = (3 * x[:, 0]).sin()[:, None]
    wedges = wedge.dictionary(x)
    assert wedges.exact and len(wedges) == 26 and wedges.bias
    found, lam = fitted(x, y, wedges, share)
    optimum = programme(x.numpy(), y[:, 0].numpy(), thresholds(x[:, 0].numpy()), lam, 2.0, True)
    assert found.primal == pytest.approx(optimum, rel=SOLVED)
    b = torch.linspace(-3, 3, 6001, dtype=torch.float64) * x.abs().max()
    for w in (1.0, -1.0):
        assert worst(x, found.theta, torch.full((1, 6001), w, dtype=torch.float64), b) <= lam * (1 + 1e-9)


@pytest.mark.parametrize("n, p", [(6, 1.0), (15, 1.0), (6, math.inf), (15, math.inf)])
def test_two_dimensions_are_exact_for_polyhedral_balls(n, p):
    X = normal(n, n, 2)
    y = X[:, :1].relu() - X.sum(1, keepdim=True).relu() + 0.1 * normal(1, n, 1)
    wedges = wedge.dictionary(X, p=p, bias=False)
    assert wedges.exact and len(wedges) == 2 * (n + 2)
    found, lam = fitted(X, y, wedges)
    assert found.primal == pytest.approx(programme(X.numpy(), y[:, 0].numpy(), sectors(X.numpy()), lam, p, False), rel=SOLVED)
    angle = torch.linspace(0, 2 * math.pi, 60_001, dtype=torch.float64)
    w = torch.stack([angle.cos(), angle.sin()])
    w = w / torch.linalg.vector_norm(w, ord=p, dim=0)
    assert worst(X, found.theta, w, torch.zeros(len(angle))) <= lam * (1 + 1e-9)
    data_only = wedge.through(X, subsets.every(n, 1), p=p, bias=False)
    assert fitted_at(X, y, data_only, lam) > found.primal * (1 + (1e-4 if n == 15 else -1e-9))  # the faces are needed


def fitted_at(X: Tensor, Y: Tensor, wedges: wedge.Wedges, lam: float) -> float:
    found = solve_lasso(Lasso(wedges.columns(X), len(wedges), Y, "squared", wedges.bias), lam, tol=1e-9)
    assert found.converged
    return found.primal


@pytest.mark.parametrize("n", [4, 6, 15])
def test_two_dimensions_are_within_the_secant_for_the_round_ball(n):
    X = normal(n + 1, n, 2)
    y = X[:, :1].relu() - X.sum(1, keepdim=True).relu()
    wedges = wedge.dictionary(X, bias=False)
    assert not wedges.exact and len(wedges) == 2 * n
    found, lam = fitted(X, y, wedges)
    factor = wedge.factor(X)
    rays = np.sort(np.arctan2(X[:, 1].numpy(), X[:, 0].numpy()) % np.pi)
    gaps = np.diff(np.append(rays, rays[0] + np.pi))
    assert 1 <= factor <= 1 / math.cos(gaps.max() / 2) * (1 + 1e-12)
    optimum = programme(X.numpy(), y[:, 0].numpy(), sectors(X.numpy()), lam, 2.0, False)
    above = programme(X.numpy(), y[:, 0].numpy(), sectors(X.numpy()), lam * factor, 2.0, False)
    assert optimum * (1 - SOLVED) <= found.primal <= above * (1 + SOLVED) <= factor * optimum * (1 + 2 * SOLVED)


def test_the_factor_bounds_every_direction_in_three_dimensions():
    """||theta^T (X w)_+|| of any unit w is at most `factor` times the largest of the dictionary, for whatever theta."""
    X = normal(5, 7, 3)
    factor, wedges = wedge.factor(X), wedge.dictionary(X, bias=False)
    directions = torch.nn.functional.normalize(normal(6, 3, 40_000), dim=0)
    largest = 0.0
    for seed in range(20):
        theta = normal(seed, 7, 1)
        top = (theta.T @ wedges.features(X)).abs().max().item()
        largest = max(largest, worst(X, theta, directions, torch.zeros(40_000)) / top)
    assert 1 < largest <= factor < 10


@pytest.mark.parametrize("n, d", [(1, 1), (2, 2), (3, 3), (3, 5)])
def test_the_factor_says_little_where_samples_are_no_more_than_features(n, d):
    assert wedge.factor(normal(8, n, d)) >= math.sqrt(n) * (1 - 1e-3)  # 1e-3: the axes of cells are searched for
    assert wedge.factor(torch.eye(n, dtype=torch.float64)) == pytest.approx(math.sqrt(n), rel=1e-3)


def test_no_factor_is_claimed_in_four_dimensions():
    assert wedge.factor(normal(0, 9, 4)) == math.inf


@pytest.mark.parametrize("p, bias", [(1.0, False), (math.inf, False), (1.0, True), (math.inf, True)])
@pytest.mark.parametrize("C", [1, 3])
def test_three_dimensions_and_biases_are_exact_on_a_grid_of_directions(p, bias, C):
    """The dual of the network programme: no direction, with any offset, sees more than lam.  Most directions miss the rays, so
    those between two neuron directions of the dictionary are asked for as well.
    """
    d = 2 if bias else 3
    X = normal(11, 8, d)
    Y = torch.cat([X[:, :1].relu(), normal(12, 8, C - 1)], 1) + 0.1 * normal(13, 8, C)
    wedges = wedge.dictionary(X, p=p, bias=bias)
    found, lam = fitted(X, Y, wedges, 0.2)
    pairs = torch.randint(len(wedges), (2, 4000), generator=torch.Generator().manual_seed(0))
    w = torch.cat([normal(14, d, 4000), wedges.gates.vectors[:, pairs].sum(1)], 1)
    w = w / torch.linalg.vector_norm(w, ord=p, dim=0).clamp_min(1e-9)
    on_a_sample = torch.cat([-(x @ w) for x in X]) if bias else torch.zeros(w.shape[1])
    w = w.repeat(1, len(X)) if bias else w
    assert worst(X, found.theta, w, on_a_sample) <= lam * (1 + 1e-8)
    if C == 1 and not bias:
        patterns = (X.numpy() @ normal(15, 3, 20_000).numpy() > 0).astype(float)  # nearly all of 58, a restriction if one lacks
        assert found.primal <= programme(X.numpy(), Y[:, 0].numpy(), np.unique(patterns, axis=1), lam, p, False) * (1 + SOLVED)


def test_counts_of_directions():
    X = normal(0, 6, 3)
    for p, bias, faces in [(1.0, False, 3), (1.0, True, 3), (2.0, False, 0), (2.0, True, 0), (math.inf, False, 6)]:
        found = wedge.dictionary(X, p=p, bias=bias)
        size = 3 if bias else 2
        none = math.comb(faces, size) if bias else 0  # a hull of directions alone
        parallel = found.skipped
        assert len(found) == 2 * (math.comb(6 + faces, size) - none - parallel)
        assert torch.linalg.vector_norm(found.gates.vectors, ord=p, dim=0) == pytest.approx(torch.ones(len(found)))


@given(n=st.integers(5, 8), d=st.integers(1, 4), bias=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_features_are_signed_distances_and_volumes(n, d, bias, seed):
    X = normal(seed, n, d)
    wedges, size = wedge.dictionary(X, bias=bias), d if bias else d - 1
    F, half = wedges.features(X), len(wedges) // 2
    assert F.shape == (n, 2 * half) and (F.gather(0, wedges.samples.T).abs().max() if size else 0) < 1e-10
    for k, chosen in enumerate(combinations(range(n), size)):
        base = X[chosen[0]] if bias else torch.zeros(d, dtype=torch.float64)
        span = X[list(chosen)][1:] - base if bias else X[list(chosen)]
        rest = X - base
        if size > bias:  # the part of x - base outside of the span
            rest = rest - (torch.linalg.lstsq(span.T, rest.T).solution.T @ span)
        distances = (F[:, k] - F[:, half + k]).abs()
        scale = 1e-6 if size > bias and torch.linalg.cond(span) > 1e4 else 1e-9
        assert (distances - rest.norm(dim=1)).abs().max() < scale
    volume = wedge.cross(X[list(range(d - 1))])
    assert (X @ volume / volume.norm()).abs() == pytest.approx((X @ wedge.normals(X[: d - 1])[0]).abs(), abs=1e-9)


def test_what_changes_nothing():
    """Lengths of samples without biases, a shift with them, a rotation for p = 2: the same hyperplanes."""
    X, half = normal(2, 7, 3), 21
    lines = wedge.dictionary(X, bias=False).gates.vectors[:, :half]
    longer = wedge.dictionary(X * torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None], bias=False).gates.vectors[:, :half]
    assert (lines * longer).sum(0).abs() == pytest.approx(torch.ones(half))
    planes, shift = wedge.dictionary(X), torch.tensor([1e3, -20.0, 7.0], dtype=torch.float64)
    moved = wedge.dictionary(X + shift)
    assert moved.features(X + shift).sort(1).values == pytest.approx(planes.features(X).sort(1).values, abs=1e-9)
    Q = torch.linalg.qr(normal(3, 3, 3)).Q
    turned = wedge.dictionary(X @ Q)
    assert turned.features(X @ Q).sort(1).values == pytest.approx(planes.features(X).sort(1).values, abs=1e-10)


def test_samples_in_a_subspace():
    """Three features of rank two: with p = 2 the dictionary of the plane; with p = 1 that of the space, and still exact."""
    flat, up = normal(4, 9, 2), normal(5, 2, 3)
    X, y = flat @ up, flat[:, :1].relu()
    plane = torch.linalg.svd(up, full_matrices=False).Vh  # (2, 3)
    found, lam = fitted(X, y, wedge.dictionary(X, bias=False))
    assert found.primal == pytest.approx(fitted_at(X @ plane.T, y, wedge.dictionary(X @ plane.T, bias=False), lam), rel=1e-8)
    found, lam = fitted(X, y, wedge.dictionary(X, p=1.0, bias=False))
    w = normal(6, 3, 30_000)
    assert worst(X, found.theta, w / w.abs().sum(0), torch.zeros(30_000)) <= lam * (1 + 1e-9)
    with pytest.raises(RecipeError, match="all samples are equal"):
        wedge.dictionary(torch.ones(4, 2))
    with pytest.raises(RecipeError, match="all samples are zero"):
        wedge.dictionary(torch.zeros(4, 2), bias=False)


def test_the_network_of_a_solution():
    X = normal(7, 20, 2)
    Y = torch.stack([X[:, 0].relu(), X.sum(1).relu()], 1)
    wedges = wedge.dictionary(X, p=1.0)
    found, lam = fitted(X, Y, wedges, 0.05)
    net = wedge.network(wedges, found)
    Z = net(X)
    assert torch.allclose(Z, wedges.features(X) @ found.U[:, 0] + found.b, atol=1e-10)
    first, second = net.layers
    decay = (first.weight.abs().sum(1).square().sum() + second.weight.square().sum()).item() / 2
    assert (Z - Y).square().sum().item() / 40 + lam * decay == pytest.approx(found.primal, rel=1e-9)
    with pytest.raises(RecipeError, match="its own Solution"):
        wedge.network(wedges[torch.arange(3)], found)


@pytest.mark.parametrize("labels", [False, True])
def test_subsets_are_subsets(labels):
    X, draw = normal(9, 12, 2), torch.Generator().manual_seed(0)
    y = torch.arange(12) % 3 if labels else None
    for found in (subsets.uniform(12, 5, 300, draw), subsets.local(X, 5, 300, draw, y), subsets.local(X, 12, 9, draw, y)):
        assert all(len(set(row)) == len(row) for row in found.tolist()) and int(found.min()) == 0 and int(found.max()) == 11
    near, far = subsets.local(X, 3, 500, draw), subsets.uniform(12, 3, 500, draw)
    spread = [(X[s] - X[s].mean(1, keepdim=True)).norm(dim=2).mean() for s in (near, far)]
    assert spread[0] < 0.8 * spread[1]
    if y is not None:
        mixed = subsets.local(X, 5, 300, draw, y)
        assert (y[mixed[:, :1]] != y[mixed[:, 1:3]]).all()
    with pytest.raises(RecipeError, match="through 13 samples of 12"):
        subsets.uniform(12, 13, 1, draw)
    with pytest.raises(RecipeError, match="sample some"):
        subsets.every(100, 8)


def test_a_polished_hyperplane_goes_through_the_samples_next_to_it():
    X = normal(10, 200, 4)
    gates = Gates(normal(11, 4, 6), normal(12, 6))
    chosen = subsets.nearest(X, gates, 4)
    for i, row in enumerate(chosen.tolist()):
        scores = (X @ gates.vectors[:, i] + gates.offsets[i]).abs()
        assert set(row) == set(scores.argsort()[:4].tolist())
    polished = wedge.through(X, chosen)
    scores = X @ polished.gates.vectors + polished.gates.offsets
    assert scores.gather(0, polished.samples.T).abs().max() < 1e-11


@pytest.mark.parametrize("kind", ["sketch", "principal"])
def test_sketched_hyperplanes_go_through_their_samples_exactly(kind):
    X, draw = normal(13, 60, 40), torch.Generator().manual_seed(1)
    basis = wedge.sketched(40, 6, draw) if kind == "sketch" else wedge.principal(X, 6)
    for bias, size in ((True, 6), (False, 5)):
        found = wedge.through(X, subsets.uniform(60, size, 50, draw), bias=bias, basis=basis)
        scores = X @ found.gates.vectors + found.gates.offsets
        assert len(found) == 100 and scores.gather(0, found.samples.T).abs().max() < 1e-10 * X.norm(dim=1).max()
        inside = basis @ torch.linalg.lstsq(basis, found.gates.vectors).solution
        assert torch.allclose(inside, found.gates.vectors, atol=1e-10)
        assert bias or not found.gates.offsets.any()
    with pytest.raises(RecipeError, match="go through 6 samples"):
        wedge.through(X, subsets.uniform(60, 5, 2, draw), basis=basis)


def test_drawn_gates():
    X, draw = normal(14, 50, 30), torch.Generator().manual_seed(2)
    gates = wedge.draw_gates(X, 9, draw, most=5)
    near = (X @ gates.vectors + gates.offsets).abs() < 1e-10
    assert len(gates) == 9 and (near.sum(0) == 5).all()
    gates = wedge.draw_gates(X, 9, draw, basis=wedge.sketched(30, 7, draw))
    assert (((X @ gates.vectors + gates.offsets).abs() < 1e-10).sum(0) == 7).all()
    gates = wedge.draw_gates(X[:4], 9, draw, bias=False)
    assert gates.vectors.shape[0] == 30 and not gates.offsets.any() and len(gates)
    flat = torch.cat([normal(1, 20, 2), torch.full((20, 1), 3.0)], 1)  # a constant column is no direction
    assert wedge.draw_gates(flat, 5, draw).vectors[:2].norm(dim=0) == pytest.approx(torch.ones(5))
    assert len(wedge.draw_gates(torch.ones(5, 3, dtype=torch.float64), 4, draw)) == 0
    assert len(wedge.draw_gates(normal(0, 1, 3), 4, draw)) == 0  # one sample draws no hyperplane


def test_an_unknown_ball():
    with pytest.raises(RecipeError, match="choose one of 1, 2, inf"):
        wedge.dictionary(normal(0, 4, 2), p=3.0)


def test_samples_that_are_none():
    X = normal(0, 5, 2)
    for chosen in ([[0, 5]], [[-1, 2]]):
        with pytest.raises(RecipeError, match="there are 0 to 4"):
            wedge.through(X, torch.tensor(chosen))
    assert wedge.through(X, torch.tensor([[1, 1], [0, 3]])).skipped == 1
    X[2, 1] = torch.inf
    for made in (lambda: wedge.dictionary(X), lambda: wedge.through(X, torch.tensor([[0, 1]]))):
        with pytest.raises(RecipeError, match="X holds NaN or Inf"):
            made()
