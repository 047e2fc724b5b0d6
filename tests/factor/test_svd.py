"""The baselines against plain float64 re-implementations of their formulas, and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lplr.factor import factorize, measured_error, optimal_error, spectrum
from lplr.recipe import FactorSpec, QuantSpec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bfloat16_up(x: np.ndarray) -> np.ndarray:
    """The smallest bfloat16 that is not below x, by stepping through the bits of float32."""
    found = torch.from_numpy(np.asarray(x, dtype=np.float32).reshape(-1)).view(torch.int32)
    up = torch.where(found & 0xFFFF != 0, (found | 0xFFFF) + 1, found)
    return up.view(torch.float32).numpy().astype(np.float64).reshape(np.shape(x))


def grid(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The nearest of the points (2c - T) scale, by brute force."""
    levels = np.arange(1 << bits) * 2.0 - ((1 << bits) - 1)
    points = scale[..., None] * levels
    return np.take_along_axis(points, np.abs(x[..., None] - points).argmin(-1)[..., None], -1)[..., 0]


def decaying(n: int, d: int, power: float) -> torch.Tensor:
    g = seeded(3)
    U, _ = torch.linalg.qr(torch.randn(n, min(n, d), generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(d, min(n, d), generator=g, dtype=torch.float64))
    return (U * torch.arange(1, min(n, d) + 1).double() ** -power) @ V.T


@pytest.mark.parametrize("bits", [2, 5])
def test_direct_svd_by_its_formula(bits: int) -> None:
    W, k, T = decaying(18, 14, 0.7), 5, 2**bits - 1
    quant = QuantSpec(bits=bits, clip="max")
    f = factorize(W, FactorSpec(method="direct_svd", rank=k, l=quant, r=quant), generator=seeded())
    U, s, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    left = bfloat16_up(np.abs(U[:, :k]).max(0) / T)
    L = grid(U[:, :k], np.broadcast_to(left, (18, k)), bits)
    wanted = left[:, None] * s[:k, None] * Vh[:k]
    R = grid(wanted, np.broadcast_to(bfloat16_up(np.abs(wanted).max(1) / T)[:, None], (k, 14)), bits)
    np.testing.assert_allclose(f.dequantize(torch.float64).numpy(), (L / left) @ R, rtol=0, atol=1e-7)


def test_naive_by_its_formula() -> None:
    W = torch.randn(9, 12, generator=seeded(1), dtype=torch.float64)
    f = factorize(W, FactorSpec(method="naive", q=QuantSpec(bits=3, ranges="row", clip="max")), generator=seeded())
    scale = bfloat16_up(np.abs(W.numpy()).max(1) / 7)[:, None]
    np.testing.assert_allclose(
        f.dequantize(torch.float64).numpy(), grid(W.numpy(), np.broadcast_to(scale, (9, 12)), 3), atol=1e-12
    )
    whole = factorize(W, FactorSpec(method="naive", q=QuantSpec(bits=3, ranges="tensor", clip="max")), generator=seeded())
    scale = np.broadcast_to(bfloat16_up(np.abs(W.numpy()).max() / 7), (9, 12))
    np.testing.assert_allclose(whole.dequantize(torch.float64).numpy(), grid(W.numpy(), scale, 3), atol=1e-12)


@pytest.mark.parametrize("method", ["lplr", "lplr_svd"])
def test_r_is_the_rounded_least_squares_solution(method: str) -> None:
    """Whatever L was drawn: R = Q'(L^+ W), by numpy's lstsq and a brute-force grid; Pythagoras for the error."""
    W, T = decaying(20, 16, 0.9), 15
    quant = QuantSpec(bits=4, clip="max")
    f = factorize(W, FactorSpec(method=method, rank=6, l=quant, r=quant), generator=seeded(2))
    assert f.l is not None and f.r is not None
    L, R = f.l.dequantize(torch.float64).numpy(), f.r.dequantize(torch.float64).numpy()
    best, *_ = np.linalg.lstsq(L, W.numpy(), rcond=None)
    scale = np.broadcast_to(bfloat16_up(np.abs(best).max(1) / T)[:, None], best.shape)
    np.testing.assert_allclose(R, grid(best, scale, 4), rtol=0, atol=1e-9)
    Q, _ = np.linalg.qr(L)
    left = np.linalg.norm(W.numpy() - Q @ (Q.T @ W.numpy())) ** 2
    assert measured_error(W, f) ** 2 == pytest.approx(left + np.linalg.norm(L @ (R - best)) ** 2)


def test_lplr_svd_spans_the_leading_subspace() -> None:
    W = decaying(40, 30, 0.5)
    quant = QuantSpec(bits=8)
    f = factorize(W, FactorSpec(method="lplr_svd", rank=8, l=quant, r=quant), generator=seeded())
    assert f.l is not None
    U, _, _ = torch.linalg.svd(W)
    Q, _ = torch.linalg.qr(f.l.dequantize(torch.float64))
    assert float((U[:, :8] - Q @ (Q.T @ U[:, :8])).norm()) < 0.1
    best = optimal_error(spectrum(W), 8)
    assert best <= measured_error(W, f) <= 1.01 * best


def test_projection_beats_independent_rounding_of_coherent_factors() -> None:
    """What LPLR is for: leading singular vectors with one large entry each waste the grid of direct_svd."""
    g = seeded(5)
    W = 0.05 * torch.randn(60, 50, generator=g)
    for i in range(6):
        W[i, i] = 8.0 - i
        W[10:, i] += 0.5 * torch.randn(50, generator=g)
    quant = QuantSpec(bits=3, clip="max", ranges="tensor")
    errors = {
        m: measured_error(W, factorize(W, FactorSpec(method=m, rank=12, l=quant, r=quant), generator=seeded(1)))
        for m in ("lplr", "lplr_svd", "direct_svd")
    }
    assert errors["lplr"] < errors["direct_svd"] and errors["lplr_svd"] < errors["direct_svd"]
