"""Signs with a rank-one magnitude against numpy's singular value decomposition of |X|."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.quant.binary import rank_one, sign_rank_one


@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 7), (7, 1), (20, 33), (64, 16)])
def test_best_rank_one_magnitude(n: int, d: int, generator: torch.Generator) -> None:
    X = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.rand(n, 1, generator=generator).double()
    u, v = rank_one(X.abs(), 50)
    left, s, right = np.linalg.svd(X.abs().numpy(), full_matrices=False)
    np.testing.assert_allclose(torch.outer(u, v).numpy(), s[0] * np.outer(left[:, 0], right[0]), rtol=1e-8, atol=1e-12)
    assert float(u.norm()) == pytest.approx(float(v.norm()), rel=1e-12)
    q = sign_rank_one(X)
    assert q.bits == 1 and q.row_scale is not None and q.col_scale is not None and q.shape == (n, d)
    assert q.stored_bits() == 8 * n * -(-d // 8) + 16 * (n + d)
    best = float((X.abs().square().sum() - s[0] ** 2).clamp(min=0).sqrt())
    # each scale is stored with 8 significant bits: 2^-8 of the magnitude at the most from the two
    assert float((X - q.dequantize(torch.float64)).norm()) <= best + 2.0**-8 * float(X.norm()) + 1e-12


def test_exact_where_the_magnitude_has_rank_one() -> None:
    u, v = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([4.0, 1.0, 0.25, 2.0])  # the split of the norm is inexact in bfloat16
    X = torch.outer(u, v) * torch.tensor([[1.0, -1, 1, 1], [-1, -1, 1, -1], [1, 1, -1, 1]])
    torch.testing.assert_close(sign_rank_one(X).dequantize(), X, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("unit", [1e-30, 1e-18, 1.0, 1e15])
def test_zero_and_huge_range(unit: float, generator: torch.Generator) -> None:
    assert not sign_rank_one(torch.zeros(3, 5)).dequantize().any()
    X = torch.randn(6, 9, generator=generator) * unit
    X[2], X[:, 4] = 0, 0
    out = sign_rank_one(X).dequantize()
    assert bool(torch.isfinite(out).all()) and not out[2].any() and not out[:, 4].any()
    assert float((out / unit - X / unit).norm()) < float((X / unit).norm())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**20))
def test_never_worse_than_zero(n: int, d: int, iterations: int, seed: int) -> None:
    """For any number of iterations v is exact for its u: the error is ||X||^2 - ||u v^T||^2."""
    P = torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).square()
    u, v = rank_one(P, iterations)
    assert bool((u >= 0).all() and (v >= 0).all())
    left = float((P - torch.outer(u, v)).square().sum())
    assert left == pytest.approx(float(P.square().sum() - (u.square().sum() * v.square().sum())), abs=1e-9)
