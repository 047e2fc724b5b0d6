"""Two-sided feedback: the exact error identity against the dense quadratic form, and the gain over feedback on one side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lplr.quant.ldlq import ldlq, unit_upper
from lplr.quant.two_sided import two_sided
from lplr.quant.uniform import quantize, scales


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(size: int, seed: int, spread: float = 1.0) -> Tensor:
    X = torch.randn(3 * size, size, generator=seeded(seed), dtype=torch.float64)
    X = X @ torch.randn(size, size, generator=seeded(seed + 1), dtype=torch.float64)
    X = X * torch.logspace(0, -spread, size, dtype=torch.float64)
    return X.T @ X / (3 * size) + 1e-3 * 10 ** (-2 * spread) * torch.eye(size, dtype=torch.float64)


def diagonal(H: Tensor, U: Tensor) -> Tensor:
    return torch.linalg.solve(U, torch.linalg.solve(U, H).T).diagonal()


@pytest.mark.parametrize(("r", "d"), [(1, 1), (1, 6), (6, 1), (5, 7), (12, 9), (8, 16)])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_error_identity(r: int, d: int, bits: int) -> None:
    """tr(E^T G E H) = vec(E)^T (H kron G) vec(E) = sum_ij D_G,i D_H,j rho_ij^2."""
    G, H, X = correlated(r, 1), correlated(d, 5), torch.randn(r, d, generator=seeded(3), dtype=torch.float64)
    row, col = scales(X, bits, axis="both", clip="mse")
    assert row is not None and col is not None
    q = two_sided(X, bits, G, H, row, col, damping=0)
    E = X - q.dequantize(torch.float64)
    U_G, U_H = unit_upper(G), unit_upper(H)
    rho = U_G.T @ E @ U_H
    vec = E.T.reshape(-1)  # columns one below the other
    dense = float(vec @ torch.kron(H, G) @ vec)
    # eps times the condition numbers of G and H, about 1e3 each
    assert dense == pytest.approx(float((diagonal(G, U_G)[:, None] * diagonal(H, U_H) * rho.square()).sum()), rel=1e-8)
    # rho is what rounding left: every code is the one nearest to what was wanted
    wanted = q.dequantize(torch.float64) + rho
    points = (torch.arange(1 << bits).double() * 2 - ((1 << bits) - 1)) * (row.double()[:, None] * col.double())[..., None]
    nearest = (wanted[..., None] - points).abs().amin(-1)
    assert bool((rho.abs() <= nearest + 1e-9).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8), st.floats(0, 3), st.integers(0, 2**20))
def test_identity_and_bound_for_any_spectrum(r: int, d: int, bits: int, spread: float, seed: int) -> None:
    """Inside the grid |rho| is at most half a step, so that tr(E^T G E H) <= step^2 / 4 tr D_G tr D_H."""
    G, H = correlated(r, seed, spread), correlated(d, seed + 2, spread)
    X = torch.randn(r, d, generator=seeded(seed), dtype=torch.float64)
    scale = torch.tensor([2.0**-3])
    q = two_sided(X, bits, G, H, scale, damping=0)
    E = X - q.dequantize(torch.float64)
    U_G, U_H = unit_upper(G), unit_upper(H)
    rho = U_G.T @ E @ U_H
    left, weights = float(torch.trace(E.T @ G @ E @ H)), diagonal(G, U_G)[:, None] * diagonal(H, U_H)
    assert left == pytest.approx(float((weights * rho.square()).sum()), rel=1e-5, abs=1e-12)
    wanted = q.dequantize(torch.float64) + rho
    inside = wanted.abs() <= (1 << bits) / 8
    assert bool((rho.abs() <= 1 / 8 + 1e-6)[inside].all())
    if bool(inside.all()):
        assert left <= float(weights.sum()) / 64 * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3])
def test_two_sides_beat_one_beat_none_on_average(bits: int) -> None:
    errors = []
    for seed in range(8):
        G, H = correlated(24, 10 * seed), correlated(40, 10 * seed + 5)
        X = torch.randn(24, 40, generator=seeded(seed), dtype=torch.float64)
        row, _ = scales(X, bits, axis="row", clip="mse")
        found = quantize(X, bits, axis="row"), two_sided(X, bits, None, H, row), two_sided(X, bits, G, H, row)
        E = [X - q.dequantize(torch.float64) for q in found]
        errors.append([float(torch.trace(e.T @ G @ e @ H)) for e in E])
    none, one, two = np.exp(np.log(errors).mean(0))
    assert two < one < none


def test_identity_metrics_are_plain_rounding_and_one_side_is_ldlq() -> None:
    X = torch.randn(9, 150, generator=seeded(5), dtype=torch.float64)
    row, _ = scales(X, 3, axis="row", clip="mse")
    plain = quantize(X, 3, axis="row").dequantize()
    for G in (None, torch.eye(9, dtype=torch.float64)):
        assert torch.equal(two_sided(X, 3, G, None, row).dequantize(), plain)
    H = correlated(150, 7)
    assert torch.equal(two_sided(X, 3, None, H, row, damping=0).dequantize(), ldlq(X, 3, H, axis="row").dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_and_zero_metrics(dtype: torch.dtype) -> None:
    X = torch.randn(6, 10, generator=seeded(8)).to(dtype)
    v = torch.randn(6, 1, generator=seeded(9)).to(dtype)
    w = torch.randn(10, 1, generator=seeded(10)).to(dtype)
    row, col = scales(X, 2, axis="both", clip="mse")
    for G, H in ((v @ v.T, w @ w.T), (torch.zeros(6, 6, dtype=dtype), torch.zeros(10, 10, dtype=dtype))):
        for damping in (0.0, 0.01):
            assert bool(torch.isfinite(two_sided(X, 2, G, H, row, col, damping=damping).dequantize()).all())


def test_zero_rows_and_scales_stay_zero() -> None:
    X = torch.randn(4, 10, generator=seeded(6))
    X[1], X[:, 3] = 0, 0
    row, col = scales(X, 2, axis="both", clip="mse")
    out = two_sided(X, 2, correlated(4, 1).float(), correlated(10, 2).float(), row, col).dequantize()
    assert bool(torch.isfinite(out).all()) and not out[1].any() and not out[:, 3].any()
    assert not two_sided(torch.zeros(4, 10), 2, None, None, torch.zeros(1)).dequantize().any()
