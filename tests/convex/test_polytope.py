"""Polytopes against the enumeration of their vertices and cvxpy."""

from __future__ import annotations

import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lplr.convex.polytope import Polytope, descend, row_space
from lplr.errors import RecipeError

float64 = torch.float64
shapes = {"seed": st.integers(0, 9999), "rows": st.integers(0, 4), "extra": st.integers(0, 4), "zeros": st.integers(0, 3)}


def fits_of(seed: int, rows: int, extra: int, zeros: int) -> tuple[Tensor, Tensor]:
    """F (rows + 1, K), the last row positive, so that the set is bounded, columns of very different size; p with zeros."""
    draw = torch.Generator().manual_seed(seed)
    K = rows + 1 + extra
    F = torch.cat([torch.randn(rows, K, generator=draw, dtype=float64), torch.rand(1, K, generator=draw, dtype=float64) + 0.1])
    p = torch.rand(K, generator=draw, dtype=float64) + 0.1
    p[: min(zeros, K - 1)] = 0
    sizes = 10.0 ** torch.randint(-2, 3, (K,), generator=draw)
    return F * sizes, p / sizes


def vertices(F: np.ndarray, goal: np.ndarray) -> list[np.ndarray]:
    """Every point whose columns in use are independent, by all subsets of columns."""
    F = F / (sizes := np.linalg.norm(F, axis=0))
    found = []
    for count in range(F.shape[1] + 1):
        for chosen in itertools.combinations(range(F.shape[1]), count):
            columns = F[:, list(chosen)]
            if count and np.linalg.matrix_rank(columns, 1e-9) < count:
                continue
            a = np.zeros(F.shape[1])
            if count:
                a[list(chosen)] = np.linalg.lstsq(columns, goal, rcond=None)[0]
            if (a[list(chosen)] > 1e-9).all() and np.linalg.norm(F @ a - goal) <= 1e-9 * np.linalg.norm(goal):
                found.append(a / sizes)
    return found


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_ranges_support_dimension_and_fewest_are_those_of_the_vertices(seed: int, rows: int, extra: int, zeros: int):
    F, p = fits_of(seed, rows, extra, zeros)
    polytope = Polytope.of(F, p)
    corners = np.array(vertices(F.numpy(), (F @ p).numpy()))
    ranges = polytope.ranges().numpy()
    unit = corners.max() * 1e-6  # HiGHS works to 1e-7
    assert ranges == pytest.approx(np.stack([corners.min(0), corners.max(0)], 1), abs=unit)
    assert (polytope.support.numpy() == (corners.max(0) > 0)).all()
    scaled = corners * F.norm(dim=0).numpy()
    spread = scaled - scaled[0]
    assert polytope.dimension == (np.linalg.matrix_rank(spread, 1e-7) if len(corners) > 1 else 0)
    fewest = polytope.sparsest()
    assert (fewest > 0).sum() == (corners > 0).sum(1).min() and polytope.contains(fewest)
    c = torch.randn(len(p), generator=torch.Generator().manual_seed(seed), dtype=float64)
    assert float(c @ polytope.minimise(c)) == pytest.approx(
        (corners @ c.numpy()).min(), abs=1e-6 * (np.abs(corners) @ np.abs(c.numpy())).max()
    )


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_descent_ends_at_a_vertex_within_the_support(seed: int, rows: int, extra: int, zeros: int):
    F, p = fits_of(seed, rows, extra, zeros)
    a = descend(F, p)
    used = a > 0
    assert (F @ a - F @ p).norm() <= 1e-12 * (F @ p).norm() and not (used & (p == 0)).any()
    unit = F[:, used] / F[:, used].norm(dim=0)
    assert torch.linalg.matrix_rank(unit, rtol=1e-9) == used.sum() <= rows + 1  # Caratheodory


@settings(max_examples=25, deadline=None)
@given(**shapes)
def test_the_nearest_point_is_that_of_cvxpy(seed: int, rows: int, extra: int, zeros: int):
    F, p = fits_of(seed, rows, extra, zeros)
    scale = F.norm(dim=0)
    F, p = F / scale, p * scale
    polytope = Polytope.of(F, p)
    draw = torch.Generator().manual_seed(seed + 1)
    for A, b in (
        (torch.eye(len(p), dtype=float64), torch.zeros(len(p), dtype=float64)),
        (torch.randn(len(p) + 2, len(p), generator=draw, dtype=float64), torch.randn(len(p) + 2, generator=draw, dtype=float64)),
    ):
        found = polytope.nearest(A, b)
        a = cp.Variable(len(p))
        programme = cp.Problem(cp.Minimize(cp.sum_squares(A.numpy() @ a - b.numpy())), [a >= 0, F.numpy() @ a == (F @ p).numpy()])
        programme.solve(solver=cp.CLARABEL)
        assert polytope.contains(found)
        # Clarabel's accuracy, and the share of the least norm that settles ties
        assert float((A @ found - b).square().sum()) <= programme.value + 1e-6 * (1 + abs(float(programme.value)))


def test_of_many_nearest_points_the_shortest_is_taken():
    polytope = Polytope.of(torch.ones(1, 4, dtype=float64), torch.tensor([1.0, 0, 0, 0], dtype=float64))
    found = polytope.nearest(torch.tensor([[1.0, 1, 0, 0]], dtype=float64), torch.tensor([0.5], dtype=float64))
    assert found == pytest.approx(torch.full((4,), 0.25), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(**shapes)
def test_samples_are_points_and_spread(seed: int, rows: int, extra: int, zeros: int):
    F, p = fits_of(seed, rows, extra, zeros)
    polytope = Polytope.of(F, p)
    found = polytope.sample(8, torch.Generator().manual_seed(0))
    assert found.shape == (8, len(p)) and all(polytope.contains(a) and bool((a >= 0).all()) for a in found)
    assert torch.equal(found, polytope.sample(8, torch.Generator().manual_seed(0)))
    if polytope.dimension:
        assert (found - found[0]).abs().amax() > 0


def test_samples_of_a_triangle_are_uniform():
    polytope = Polytope.of(torch.ones(1, 3, dtype=float64), torch.tensor([1.0, 0, 0], dtype=float64))
    found = polytope.sample(4000, torch.Generator().manual_seed(1))
    # mean 1/3, variance 1/18 of every coordinate; 4,000 nearly independent draws: three standard errors
    assert found.mean(0) == pytest.approx(torch.full((3,), 1 / 3), abs=3 * (1 / 18 / 4000) ** 0.5 * 1.5)
    assert found.var(0) == pytest.approx(torch.full((3,), 1 / 18), rel=0.1)


def test_the_vertex_of_the_descent_may_have_more_than_the_fewest():
    """Fits a, b, (a + b) / 2 and the sum a + b: {a, b} and {(a + b) / 2} are both vertices."""
    F = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5]], dtype=float64)
    polytope = Polytope.of(F, torch.tensor([1.0, 1, 0], dtype=float64))
    assert int((polytope.vertex(polytope.point) > 0).sum()) == 2
    assert polytope.sparsest() == pytest.approx(torch.tensor([0.0, 0, 2], dtype=float64), abs=1e-12)
    assert polytope.support.all() and polytope.dimension == 1


def test_degenerate_input():
    empty = Polytope.of(torch.zeros(5, 0, dtype=float64), torch.zeros(0, dtype=float64))
    assert empty.dimension == 0 and empty.ranges().shape == (0, 2) and empty.sparsest().shape == (0,)
    assert empty.contains(empty.point) and empty.sample(2, torch.Generator()).shape == (2, 0)
    one = Polytope.of(torch.ones(3, 1, dtype=float64), torch.tensor([2.0], dtype=float64))
    assert one.dimension == 0 and one.minimise(torch.ones(1, dtype=float64)) == pytest.approx(2.0)
    nothing = Polytope.of(torch.ones(2, 3, dtype=float64), torch.zeros(3, dtype=float64))  # only zero sums to zero
    assert nothing.dimension == 0 and not nothing.support.any()
    twins = Polytope.of(torch.ones(2, 2, dtype=float64), torch.tensor([1.0, 1.0], dtype=float64))
    assert twins.vertex(twins.point).sort()[0] == pytest.approx(torch.tensor([0.0, 2.0], dtype=float64))
    assert descend(torch.zeros(2, 2, dtype=float64), torch.ones(2, dtype=float64)) == pytest.approx(
        torch.zeros(2)
    )  # dead neurons
    unbounded = Polytope.of(torch.tensor([[1.0, -1.0]], dtype=float64), torch.ones(2, dtype=float64))
    with pytest.raises(RecipeError, match="unbounded"):
        unbounded.minimise(torch.tensor([-1.0, 0.0], dtype=float64))


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 6), K=st.integers(1, 6), r=st.integers(0, 4), seed=st.integers(0, 999))
def test_row_space(m: int, K: int, r: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    F = torch.randn(m, r, generator=draw, dtype=float64) @ torch.randn(r, K, generator=draw, dtype=float64)
    rows, free = row_space(F)
    assert len(rows) == min(m, r, K) and free.shape == (K, K - len(rows))
    assert rows.T @ rows == pytest.approx(F.T @ F, abs=1e-10)
    assert free.T @ free == pytest.approx(torch.eye(K - len(rows), dtype=float64), abs=1e-12)
    assert (F @ free).abs().sum() <= 1e-10
