"""The Triton rounding with feedback against the torch form."""

from __future__ import annotations

import pytest
import torch

from lplr.kernels.feedback import gpu, reference


def setting(r: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """X, row and column scales, U: multiples of powers of two, whose products and sums are exact in any order."""
    g = torch.Generator().manual_seed(r + d)
    X = (torch.randn(r, d, generator=g) * 64).round() / 64
    row, col = (2.0 ** torch.randint(-2, 2, (size,), generator=g) for size in (r, d))
    few = torch.where(torch.rand(d, d, generator=g) * d < 4, torch.randn(d, d, generator=g).sign() / 2, 0)
    U = torch.eye(d) + few.triu(1)
    return tuple(t.to(dtype) for t in (X, row, col, U))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("r", "d"), [(1, 1), (5, 7), (17, 64), (33, 130), (0, 4), (3, 0)])
def test_rounds_as_the_reference(r: int, d: int, bits: int, dtype: torch.dtype, device: torch.device) -> None:
    X, row, col, U = setting(r, d, dtype)
    if r and d:
        row[0], col[-1] = 0, 0
    expected, errors = reference.feedback_round(X, bits, row, col, U)
    codes, E = gpu.feedback_round(X.to(device), bits, row.to(device), col.to(device), U.to(device))
    assert torch.equal(codes.cpu(), expected) and torch.equal(E.cpu(), errors)


def test_the_residual_is_that_of_rounding(device: torch.device) -> None:
    """E U is the error of rounding what was wanted: at most half a step where the grid reaches it (random scales)."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(40, 200, generator=g, dtype=torch.float64)
    row, col = torch.rand(40, generator=g).double() + 1, torch.rand(200, generator=g).double() + 0.5
    U = torch.eye(200, dtype=torch.float64) + torch.randn(200, 200, generator=g, dtype=torch.float64).triu(1) / 40
    found = gpu.feedback_round(X.to(device), 8, row.to(device), col.to(device), U.to(device))
    codes, E = (t.cpu() for t in found)
    assert torch.equal(E, X - (2 * codes.double() - 255) * (row[:, None] * col))
    # the sums of 200 float64 terms in another order: 1e-12
    assert ((E @ U).abs() <= row[:, None] * col + 1e-12).all()
