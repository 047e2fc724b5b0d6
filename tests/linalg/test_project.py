"""Orthonormal bases and least squares against numpy in float64, ill-conditioned and rank deficient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lplr.linalg.project import least_squares, orth


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conditioned(n: int, m: int, decades: float, dtype: torch.dtype) -> torch.Tensor:
    g = seeded(1)
    U, _ = torch.linalg.qr(torch.randn(n, m, generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))
    return ((U * torch.logspace(0, -decades, m, dtype=torch.float64)) @ V.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [0.0, 2.0, 3.5, 6.0, 12.0])
def test_orth_at_every_conditioning(decades: float, dtype: torch.dtype) -> None:
    Y = conditioned(60, 12, decades, dtype)
    Q = orth(Y)
    eps = torch.finfo(dtype).eps
    assert Q.shape == (60, 12)
    torch.testing.assert_close(Q.T @ Q, torch.eye(12, dtype=dtype), rtol=0, atol=50 * eps)
    assert float((Y - Q @ (Q.T @ Y)).norm()) <= 50 * eps * float(Y.norm())


@pytest.mark.parametrize("shape", [(5, 9), (1, 4), (7, 1), (6, 6)])
def test_orth_of_any_shape(shape: tuple[int, int]) -> None:
    Y = torch.randn(*shape, generator=seeded(2), dtype=torch.float64)
    Q = orth(Y)
    assert Q.shape == (shape[0], min(shape))
    torch.testing.assert_close(Q @ (Q.T @ Y), Y)


@pytest.mark.parametrize("Y", [torch.zeros(8, 3), torch.ones(8, 3), torch.eye(8, 3) * torch.tensor([1.0, 0.0, 1.0])])
def test_orth_of_rank_deficient(Y: torch.Tensor) -> None:
    Q = orth(Y)
    torch.testing.assert_close(Q.T @ Q, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(Q @ (Q.T @ Y), Y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decades", [0.0, 1.5, 3.0, 4.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_residual(decades: float, dtype: torch.dtype) -> None:
    """The residual, which is what a factorization feels, against numpy's; a thousandth of it may be lost in float32."""
    L, A = conditioned(50, 10, decades, dtype), torch.randn(50, 21, generator=seeded(3)).to(dtype)
    X = least_squares(L, A)
    best, *_ = np.linalg.lstsq(L.double().numpy(), A.double().numpy(), rcond=None)
    found = float((A.double() - L.double() @ X.double()).norm())
    least = float(np.linalg.norm(A.double().numpy() - L.double().numpy() @ best))
    assert least * (1 - 1e-12) <= found <= least * (1 + (1e-3 if dtype == torch.float32 else 1e-9))


def test_least_squares_solution_in_float64() -> None:
    L, A = (
        torch.randn(30, 8, generator=seeded(4), dtype=torch.float64),
        torch.randn(30, 5, generator=seeded(5), dtype=torch.float64),
    )
    best, *_ = np.linalg.lstsq(L.numpy(), A.numpy(), rcond=None)
    np.testing.assert_allclose(least_squares(L, A).numpy(), best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_gives_the_least_norm(dtype: torch.dtype) -> None:
    base = torch.randn(40, 3, generator=seeded(6), dtype=torch.float64)
    L = torch.cat([base, base[:, :1] + base[:, 1:2], base[:, 2:]], 1).to(dtype)
    A = torch.randn(40, 7, generator=seeded(7)).to(dtype)
    best, *_ = np.linalg.lstsq(L.double().numpy(), A.double().numpy(), rcond=1e-6)
    np.testing.assert_allclose(least_squares(L, A).double().numpy(), best, atol=2e-4 if dtype == torch.float32 else 1e-9)


def test_wide_and_zero() -> None:
    L, A = (
        torch.randn(4, 9, generator=seeded(8), dtype=torch.float64),
        torch.randn(4, 6, generator=seeded(9), dtype=torch.float64),
    )
    X = least_squares(L, A)
    best, *_ = np.linalg.lstsq(L.numpy(), A.numpy(), rcond=None)
    np.testing.assert_allclose(X.numpy(), best, atol=1e-11)
    assert torch.equal(least_squares(torch.zeros(5, 2), torch.ones(5, 3)), torch.zeros(2, 3))
    assert torch.equal(least_squares(torch.zeros(1, 1), torch.ones(1, 3)), torch.zeros(1, 3))
