"""The range finder's subspace and the rotation that equalises its columns (its error bound: tests/factor/test_bounds.py)."""

from __future__ import annotations

import pytest
import torch

from lplr.linalg.range_finder import random_rotation, range_finder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["gaussian", "srht", "sparse"])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_spans_an_exact_low_rank_range(kind: str, power: int) -> None:
    A = torch.randn(30, 4, generator=seeded(1), dtype=torch.float64) @ torch.randn(
        4, 25, generator=seeded(2), dtype=torch.float64
    )
    Y = range_finder(A, 6, kind, power, seeded(3))
    assert Y.shape == (30, 6)
    Q, s, _ = torch.linalg.svd(Y)
    assert float(s[4] / s[0]) < 1e-12
    torch.testing.assert_close(Q[:, :4] @ (Q[:, :4].T @ A), A, rtol=0, atol=1e-10)


def test_power_iterations_find_the_leading_subspace() -> None:
    U, _ = torch.linalg.qr(torch.randn(40, 30, generator=seeded(4), dtype=torch.float64))
    s = torch.cat([torch.ones(5), torch.full((25,), 0.3)]).double()
    A = U * s
    angles = []
    for power in (0, 1, 2, 4):
        Q, _ = torch.linalg.qr(range_finder(A, 5, "gaussian", power, seeded(5)))
        angles.append(float((U[:, :5] - Q @ (Q.T @ U[:, :5])).norm()))
    assert angles[0] > angles[1] > angles[2] > angles[3] and angles[3] < 1e-3


def test_power_iterations_do_not_overflow() -> None:
    A = torch.diag(torch.logspace(12, -12, 20))
    Y = range_finder(A, 6, "gaussian", 8, seeded(6))
    assert bool(torch.isfinite(Y).all())


def test_columns_are_equalised() -> None:
    """A x is mixed by a rotation: with a steep spectrum the columns of Y still have similar norms."""
    A = torch.diag(torch.logspace(0, -3, 64))
    norms = range_finder(A, 32, "gaussian", 2, seeded(7)).norm(dim=0)
    assert float(norms.max() / norms.min()) < 200  # without it: 10^(3 * 31 / 63) = 30 to 1, in order of the spectrum
    order = torch.argsort(norms, descending=True)
    assert not torch.equal(order, torch.arange(32))


@pytest.mark.parametrize("m", [1, 2, 7, 40])
def test_rotation_is_orthogonal(m: int) -> None:
    O = random_rotation(m, torch.zeros(1, dtype=torch.float64), seeded(m))  # noqa: E741
    torch.testing.assert_close(O.T @ O, torch.eye(m, dtype=torch.float64))


def test_rotation_is_uniform() -> None:
    """Mean zero and variance 1/m of each entry, over 4000 draws of a 3 x 3 rotation (five standard errors)."""
    g = seeded(9)
    draws = torch.stack([random_rotation(3, torch.zeros(1, dtype=torch.float64), g) for _ in range(4000)])
    assert float(draws.mean(0).abs().max()) < 5 * (1 / 3) ** 0.5 / 4000**0.5
    assert float((draws.square().mean(0) - 1 / 3).abs().max()) < 5 * 0.3 / 4000**0.5
    # fourth moment of a coordinate of the unit sphere: 3 / (m (m + 2))
    assert float((draws.pow(4).mean(0) - 0.2).abs().max()) < 5 * 0.27 / 4000**0.5
