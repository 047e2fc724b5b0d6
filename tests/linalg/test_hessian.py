"""Second moments, damping, and factors of indefinite input."""

from __future__ import annotations

import torch

from lplr.linalg.hessian import Hessian, cholesky_factor, damped


def test_running_mean_over_any_leading_sizes(generator: torch.Generator) -> None:
    X = torch.randn(4, 5, 7, generator=generator)
    H = Hessian(7)
    assert H.mean() is None
    H.add(X[:1])
    H.add(X[1:].bfloat16().float())
    rows = torch.cat([X[:1], X[1:].bfloat16().float()]).reshape(-1, 7).double()
    found = H.mean()
    assert found is not None and H.rows == 20
    torch.testing.assert_close(found.double(), rows.T @ rows / 20, rtol=1e-5, atol=1e-6)


def test_inputs_that_are_not_finite_give_nothing() -> None:
    H = Hessian(2)
    H.add(torch.tensor([[1.0, float("inf")]]))
    assert H.mean() is None


def test_damped() -> None:
    H = torch.diag(torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(damped(H), torch.diag(torch.tensor([4.02, 0.02])))
    assert torch.equal(damped(torch.zeros(3, 3)), torch.eye(3))


def test_cholesky_factor(generator: torch.Generator) -> None:
    X = torch.randn(30, 9, generator=generator)
    H = X.T @ X
    C = cholesky_factor(H)
    torch.testing.assert_close(C @ C.T, H, rtol=1e-5, atol=1e-5)
    assert torch.equal(C, C.tril())
    low = X[:3].T @ X[:3] - 1e-4 * torch.eye(9)  # indefinite
    C = cholesky_factor(low)
    assert bool(torch.isfinite(C).all())
    assert float((C @ C.T - low).norm()) < 0.01 * float(low.norm())
