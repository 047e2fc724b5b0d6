"""Sketches: unbiased, norm preserving, and what each is built of."""

from __future__ import annotations

import pytest
import torch

from lplr.errors import RecipeError
from lplr.linalg.sketch import SKETCHES, SPARSITY, sketch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize(("d", "m"), [(11, 4), (8, 8), (5, 1), (1, 1), (6, 9)])
def test_expectation_of_the_square_is_the_identity(kind: str, d: int, m: int) -> None:
    """E[S S^T] = I: entries of a mean over 3000 sketches, each of standard deviation at most about sqrt(2 d / m)."""
    g, draws = seeded(d * m), 3000
    S = torch.stack([sketch(torch.eye(d, dtype=torch.float64), m, kind, g) for _ in range(draws)])
    squares = S @ S.transpose(1, 2)
    mean, deviation = squares.mean(0), squares.std(0)
    error = (mean - torch.eye(d)).abs()
    assert bool((error <= 5 * deviation / draws**0.5 + 1e-12).all())
    assert S.shape == (draws, d, m)


def test_srht_of_all_columns_preserves_norms() -> None:
    A = torch.randn(7, 32, generator=seeded(1), dtype=torch.float64)
    Y = sketch(A, 32, "srht", seeded(2))
    torch.testing.assert_close(Y @ Y.T, A @ A.T, rtol=1e-12, atol=1e-12)
    wide = sketch(A, 64, "srht", seeded(2))  # every column twice
    torch.testing.assert_close(wide @ wide.T, A @ A.T, rtol=1e-12, atol=1e-12)


def test_srht_columns_are_distinct_and_flat() -> None:
    S = sketch(torch.eye(16, dtype=torch.float64), 9, "srht", seeded(3))
    torch.testing.assert_close(S.T @ S, torch.eye(9, dtype=torch.float64) * 16 / 9)
    torch.testing.assert_close(S.abs(), torch.full((16, 9), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("m", [1, 5, 8, 24, 33])
def test_sparse_has_so_many_entries_a_row(m: int) -> None:
    S = sketch(torch.eye(40, dtype=torch.float64), m, "sparse", seeded(4))
    entries = min(SPARSITY, m)
    assert bool(((S != 0).sum(1) == entries).all())
    torch.testing.assert_close(S[S != 0].abs().unique(), torch.tensor([entries**-0.5], dtype=torch.float64))


def test_gaussian_variance() -> None:
    S = sketch(torch.eye(200, dtype=torch.float64), 50, "gaussian", seeded(5))
    assert float(S.var()) == pytest.approx(1 / 50, rel=0.06)  # 10^4 samples: standard error 1.4 %
    assert abs(float(S.mean())) < 4 * 50**-0.5 / 100


@pytest.mark.parametrize("kind", SKETCHES)
def test_linear_reproducible_and_without_side_effects(kind: str) -> None:
    A = torch.randn(6, 10, generator=seeded(6))
    before, state = A.clone(), torch.get_rng_state()
    Y = sketch(A, 4, kind, seeded(7))
    assert torch.equal(A, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(Y, sketch(A, 4, kind, seeded(7))) and Y.dtype == torch.float32
    assert not torch.equal(Y, sketch(A, 4, kind, seeded(8)))
    S = sketch(torch.eye(10), 4, kind, seeded(7))
    torch.testing.assert_close(Y, A @ S, rtol=1e-5, atol=1e-5)


def test_unknown_kind() -> None:
    with pytest.raises(RecipeError, match="gaussian, srht, sparse"):
        sketch(torch.eye(3), 2, "gausian", seeded())
