"""Double binary factors: layout, the ridge solve, exact recovery, hard cases, the gain of the full metric."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lplr.errors import RecipeError
from lplr.factor.double_binary import _OnGrid, _ridge, double_binary
from lplr.factor.factorization import Factorization
from lplr.factor.feedback import lplr_feedback
from lplr.factor.rank import layout
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.recipe import FactorSpec, QuantSpec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spec_of(rank: int, bits: tuple[int, int] = (1, 1), alternations: int = 4) -> FactorSpec:
    l, r = QuantSpec(bits=bits[0], ranges="row"), QuantSpec(bits=bits[1], ranges="both")
    return FactorSpec(rank=rank, l=l, r=r, alternations=alternations, rotation=0)


def metric(d: int, seed: int = 5) -> Tensor:
    X = torch.randn(3 * d, d, generator=seeded(seed)) * torch.logspace(0, -1, d) @ torch.randn(d, d, generator=seeded(seed + 1))
    return cholesky_factor(damped(X.T @ X / (3 * d)))


def error(A: Tensor, C: Tensor | None, f: Factorization) -> float:
    E = A.double() - f.dequantize(torch.float64)
    return float((E if C is None else E @ C.double()).norm())


@pytest.mark.parametrize(("n", "d"), [(20, 33), (33, 20), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("bits", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_layout_and_error(n: int, d: int, bits: tuple[int, int], calibrated: bool) -> None:
    A, C = torch.randn(n, d, generator=seeded(1)), metric(d) if calibrated else None
    spec = spec_of(min(n, d, 12), bits)
    f = double_binary(A, spec, C, seeded())
    assert f.format == layout((n, d), spec)
    norm = float((A if C is None else A @ C).norm())
    assert error(A, C, f) < norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finds_a_double_binary_matrix_of_rank_one(dtype: torch.dtype) -> None:
    u, v = torch.rand(12, 1, generator=seeded(1)) + 0.5, torch.rand(1, 17, generator=seeded(2)) + 0.5
    signs = torch.randn(12, 1, generator=seeded(3)).sign() * torch.randn(1, 17, generator=seeded(4)).sign()
    A = (u * v * signs).to(dtype)
    for C in (None, metric(17).to(dtype)):
        f = double_binary(A, spec_of(1), C, seeded())
        # three scales of 8 significant bits
        assert error(A, C, f) < 3 * 2.0**-8 * float((A if C is None else A @ C).norm())


def test_grid_projection() -> None:
    X = torch.randn(11, 23, generator=seeded(1), dtype=torch.float64) * torch.rand(11, 1, generator=seeded(2)).double()
    # the square root of Max's distortion for a normal variable, 0.363, 0.119, 0.0115, and about 10 % for a small matrix
    for bits, most in ((1, 0.64), (2, 0.40), (4, 0.12)):
        near = _OnGrid.near(X, bits)
        assert bool((near.codes == near.codes.round()).all()) and 0 <= near.codes.min() <= near.codes.max() <= (1 << bits) - 1
        assert float((X - near.value()).norm() / X.norm()) < most
    assert bool(torch.isfinite(_OnGrid.near(torch.zeros(3, 4), 2).value()).all())


def test_ridge_solves_its_equation() -> None:
    F = torch.randn(9, 6, generator=seeded(1), dtype=torch.float64)
    right = torch.randn(4, 6, generator=seeded(2), dtype=torch.float64)
    X = _ridge(F.T @ F, right, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(X @ (F.T @ F + 0.3 * torch.eye(6)), right)


def test_descent_after_it_never_hurts_and_beats_alternating_signs() -> None:
    ratios = []
    for seed in range(3):
        A = torch.randn(48, 64, generator=seeded(seed)) * torch.logspace(0, -1, 64)
        C = metric(64, 7 * seed)
        binary = error(A, C, double_binary(A, spec_of(32), C, seeded(seed)))
        ratios.append(binary / error(A, C, lplr_feedback(A, spec_of(32), C, seeded(seed))))
    assert sum(ratios) / 3 < 1


def test_the_full_metric_pays() -> None:
    """Against the same method that sees the diagonal of H alone."""
    ratios = []
    for seed in range(3):
        A, C = torch.randn(40, 48, generator=seeded(seed)), metric(48, 9 * seed)
        full = error(A, C, double_binary(A, spec_of(24), C, seeded(seed)))
        ratios.append(full / error(A, C, double_binary(A, spec_of(24), C.norm(dim=1).diag(), seeded(seed))))
    assert sum(ratios) / 3 < 0.9


@pytest.mark.parametrize("bits", [(1, 1), (2, 2)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_hard_cases(bits: tuple[int, int], calibrated: bool) -> None:
    C = metric(14) if calibrated else None
    spike, holes = torch.zeros(10, 14), torch.randn(10, 14, generator=seeded(5))
    spike[3, 5] = 1
    holes[2], holes[:, 7] = 0, 0
    one = torch.randn(10, 1, generator=seeded(1)) @ torch.randn(1, 14, generator=seeded(2))
    for A in (torch.zeros(10, 14), spike, holes, one, torch.eye(10, 14), one * 1e-6, one * 1e6):
        f = double_binary(A, spec_of(4, bits, 1), C, seeded())
        assert bool(torch.isfinite(f.dequantize()).all())
        assert error(A, C, f) <= float((A if C is None else A @ C).norm()) * (1 + 1e-5)  # float32 decides
    dead = metric(14)
    dead[3:6] *= 1e-6  # inputs that are nearly always zero
    assert error(holes, dead, double_binary(holes, spec_of(4, bits), dead, seeded())) < float((holes @ dead).norm())


def test_other_ranges_are_refused() -> None:
    quant = QuantSpec(bits=1, ranges="rank")
    with pytest.raises(RecipeError, match="ranges"):
        double_binary(torch.eye(4), FactorSpec(rank=2, l=quant, r=quant), None, seeded())


def test_the_generator_decides() -> None:
    A, C = torch.randn(16, 20, generator=seeded(9)), metric(20)
    f, g, other = (double_binary(A, spec_of(8), C, seeded(s)) for s in (1, 1, 2))
    assert f.dequantize().equal(g.dequantize()) and not f.dequantize().equal(other.dequantize())
