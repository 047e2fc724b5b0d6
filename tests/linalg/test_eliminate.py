"""Elimination of inputs: each step against all other choices by numpy's least squares, and the refit; H degenerate too."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from lplr.linalg.eliminate import RIDGE, eliminated, others, output_error, refitted


def inputs(rows: int, d: int, generator: torch.Generator) -> Tensor:
    """Correlated, of very different sizes, with a mean: as activations are."""
    mixed = (
        torch.randn(rows, d, generator=generator).double()
        @ (torch.eye(d) + 0.5 * torch.randn(d, d, generator=generator)).double()
    )
    return (mixed + 0.3) * torch.logspace(-2, 2, d, dtype=torch.float64)[torch.randperm(d, generator=generator)]


def moments(X: Tensor) -> Tensor:
    return X.T @ X / len(X)


def solved(X: Tensor, W: Tensor, kept: list[int]) -> tuple[np.ndarray, float]:
    """(W' (n, |S|), E ||W h - W' h_S||^2) by numpy."""
    Y = (X @ W.T).numpy()
    found = np.linalg.lstsq(X[:, kept].numpy(), Y, rcond=None)[0]
    return found.T, float(((Y - X[:, kept].numpy() @ found) ** 2).sum() / len(X))


@pytest.mark.parametrize(("d", "n", "rows"), [(2, 1, 9), (5, 3, 40), (8, 8, 30), (10, 2, 200)])
def test_every_step_takes_the_cheapest_of_all_and_tells_its_cost(d: int, n: int, rows: int, generator: torch.Generator) -> None:
    X, W = inputs(rows, d, generator), torch.randn(n, d, generator=generator).double()
    order, costs = eliminated(moments(X), W, d - 1, ridge=0.0)
    assert sorted({*order.tolist()}) == sorted(order.tolist())
    left, spent, scale = list(range(d)), 0.0, float(((X @ W.T) ** 2).sum() / rows)
    for j, cost in zip(order.tolist(), costs.tolist(), strict=True):
        every = {i: solved(X, W, [k for k in left if k != i])[1] for i in left}
        spent += cost
        # squares of float64 sums over moments whose condition is some 1e4 once their units are gone
        assert spent == pytest.approx(every[j], rel=1e-8, abs=1e-10 * scale)
        assert every[j] <= min(every.values()) + 1e-9 * scale
        left.remove(j)


@pytest.mark.parametrize("count", [1, 3])
def test_against_every_subset(count: int, generator: torch.Generator) -> None:
    d, X = 9, inputs(60, 9, generator)
    W = torch.randn(4, d, generator=generator).double()
    order, costs = eliminated(moments(X), W, count, ridge=0.0)
    best = min(solved(X, W, list(kept))[1] for kept in combinations(range(d), d - count))
    found = float(costs.sum())
    assert found >= best * (1 - 1e-9)
    if count == 1:
        assert found == pytest.approx(best, rel=1e-9)
    worse = solved(X, W, list(range(d - count)))[1]
    assert found <= worse * (1 + 1e-9)


@pytest.mark.parametrize(("d", "n", "rows", "keep"), [(7, 5, 50, 4), (12, 3, 100, 1), (6, 9, 40, 5), (1, 1, 5, 1)])
def test_the_refit_is_least_squares(d: int, n: int, rows: int, keep: int, generator: torch.Generator) -> None:
    X, W = inputs(rows, d, generator), torch.randn(n, d, generator=generator).double()
    kept = torch.randperm(d, generator=generator)[:keep].sort().values
    expected, cost = solved(X, W, kept.tolist())
    found = refitted(moments(X), W, kept, ridge=0.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    assert output_error(moments(X), W, kept, found) == pytest.approx(
        cost / float(((X @ W.T) ** 2).sum() / rows), rel=1e-7, abs=1e-13
    )


def test_the_ridge_draws_to_the_weights_as_they_were(generator: torch.Generator) -> None:
    X, W, kept = inputs(40, 8, generator), torch.randn(3, 8, generator=generator).double(), torch.tensor([0, 2, 3, 7])
    sizes = moments(X).diagonal().sqrt()
    # min E ||W h - W' h_S||^2 + e sum H_jj ||w'_j - w_j||^2 as one problem of least squares
    left = torch.cat([X[:, kept] / 40**0.5, RIDGE**0.5 * torch.diag(sizes[kept])])
    right = torch.cat([X @ W.T / 40**0.5, RIDGE**0.5 * sizes[kept, None] * W[:, kept].T])
    expected = np.linalg.lstsq(left.numpy(), right.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(refitted(moments(X), W, kept).numpy(), expected, rtol=1e-8, atol=1e-10)


def test_the_costs_are_those_of_the_refit(generator: torch.Generator) -> None:
    X, W = inputs(500, 20, generator), torch.randn(6, 20, generator=generator).double()
    H = moments(X)
    order, costs = eliminated(H, W, 8)
    kept = others(order, 20)
    damped = H + RIDGE * torch.diag(H.diagonal())
    total = float(((W @ damped) * W).sum())
    assert float(costs.sum()) == pytest.approx(output_error(damped, W, kept, refitted(H, W, kept)) * total, rel=1e-8)


def test_units_of_the_inputs_do_not_matter(generator: torch.Generator) -> None:
    X, W = inputs(80, 11, generator), torch.randn(5, 11, generator=generator).double()
    units = torch.logspace(-3, 3, 11, dtype=torch.float64)
    order, costs = eliminated(moments(X), W, 6)
    again, same = eliminated(moments(X * units), W / units, 6)
    assert torch.equal(order, again)
    torch.testing.assert_close(costs, same)
    kept = others(order, 11)
    torch.testing.assert_close(refitted(moments(X), W, kept), refitted(moments(X * units), W / units, kept) * units[kept])


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_fewer_rows_than_inputs(ridge: float, generator: torch.Generator) -> None:
    """H of rank 5: seven of twelve inputs can go for nothing."""
    X, W = inputs(5, 12, generator), torch.randn(4, 12, generator=generator).double()
    order, costs = eliminated(moments(X), W, 9, ridge=ridge)
    assert bool(torch.isfinite(costs).all()) and bool((costs >= 0).all())
    kept = others(order[:7], 12)
    found = refitted(moments(X), W, kept, ridge=ridge)
    error = output_error(moments(X), W, kept, found)
    assert bool(torch.isfinite(found).all())
    # without a ridge what rounding needs is added, 1e-6; with one the correction falls short by about its share, squared
    assert error < (1e-9 if ridge == 0 else 0.01)


def test_dead_inputs_go_first_and_change_nothing(generator: torch.Generator) -> None:
    X, W = inputs(60, 9, generator), torch.randn(4, 9, generator=generator).double()
    X[:, [2, 6]] = 0
    order, costs = eliminated(moments(X), W, 3)
    assert set(order[:2].tolist()) == {2, 6} and costs[:2].tolist() == [0, 0] and costs[2] > 0
    kept = others(order[:2], 9)
    torch.testing.assert_close(refitted(moments(X), W, kept), W[:, kept], rtol=1e-12, atol=0)
    kept = torch.tensor([1, 2, 3])  # a dead one that stays keeps its weights
    assert torch.equal(refitted(moments(X), W, kept)[:, 1], W[:, 2])


def test_what_is_not_read_goes_for_nothing(generator: torch.Generator) -> None:
    X, W = inputs(60, 7, generator), torch.randn(4, 7, generator=generator).double()
    W[:, 3] = 0
    order, costs = eliminated(moments(X), W, 1)
    assert order.tolist() == [3] and float(costs[0]) == 0
    kept = others(order, 7)
    assert torch.equal(refitted(moments(X), W, kept), W[:, kept])


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_of_two_that_are_one_the_other_takes_over(factor: float, generator: torch.Generator) -> None:
    X, W = inputs(60, 6, generator), torch.randn(4, 6, generator=generator).double()
    X[:, 4] = factor * X[:, 1]
    order, costs = eliminated(moments(X), W, 2, ridge=0.0)
    scale = float(((X @ W.T) ** 2).sum() / len(X))
    assert int(order[0]) in (1, 4) and float(costs[0]) < 1e-5 * scale  # 1e-6 is added where H is singular
    assert float(costs[1]) > 1e-4 * scale or int(order[1]) not in (1, 4)
    kept = torch.tensor([0, 1, 2, 3, 5])
    found = refitted(moments(X), W, kept, ridge=0.0)
    torch.testing.assert_close(found[:, 1], W[:, 1] + factor * W[:, 4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[:, [0, 2, 3, 4]], W[:, [0, 2, 3, 5]], rtol=1e-5, atol=1e-5)


def test_moments_in_float32_of_a_usual_size(generator: torch.Generator) -> None:
    X, W = inputs(2000, 96, generator), torch.randn(24, 96, generator=generator)
    H = moments(X)
    order, costs = eliminated(H.float(), W, 40)
    exact, true = eliminated(H, W, 40)
    assert len(set(order.tolist()) ^ set(exact.tolist())) <= 2  # near ties may fall the other way
    torch.testing.assert_close(costs.sum(), true.sum(), rtol=1e-3, atol=0.0)


def test_all_but_one_and_none(generator: torch.Generator) -> None:
    X, W = inputs(30, 4, generator), torch.randn(3, 4, generator=generator).double()
    assert len(eliminated(moments(X), W, 0)[0]) == 0
    assert sorted(eliminated(moments(X), W, 4)[0].tolist()) == [0, 1, 2, 3]
    every = torch.arange(4)
    assert torch.equal(refitted(moments(X), W, every), W)
    assert output_error(torch.zeros(4, 4), W, every[:1], W[:, :1]) == 0
