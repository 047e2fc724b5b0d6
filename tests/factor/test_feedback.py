"""Feedback-rounded factors: layouts, monotone improvement in float64, the exact start, hard cases, and the gain over `lplr`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lplr.factor.factorization import Factorization
from lplr.factor.feedback import Problem, columns_put, improved, lplr_feedback, svd_start
from lplr.factor.lplr import lplr
from lplr.factor.rank import layout
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.quant.uniform import quantize
from lplr.recipe import FactorSpec, QuantSpec

RANGES = ["tensor", "row", "rank", "both"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spec_of(rank: int, bits: int = 2, l: Any = "row", r: Any = "rank", alternations: int = 2) -> FactorSpec:
    quants = QuantSpec(bits=bits, ranges=l), QuantSpec(bits=bits, ranges=r)
    return FactorSpec(rank=rank, l=quants[0], r=quants[1], alternations=alternations, rotation=0)


def layer(n: int, d: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A matrix with a decaying spectrum, and the Cholesky factor of a correlated metric."""
    k = min(n, d)
    A = torch.randn(n, k, generator=seeded(seed)) * torch.logspace(0, -1.5, k) @ torch.randn(k, d, generator=seeded(seed + 1))
    mix = torch.randn(d, d, generator=seeded(seed + 3))
    X = torch.randn(3 * d, d, generator=seeded(seed + 2)) * torch.logspace(0, -1, d) @ mix
    return A, cholesky_factor(damped(X.T @ X / (3 * d)))


def error(A: Tensor, C: Tensor | None, f: Factorization) -> float:
    E = A.double() - f.dequantize(torch.float64)
    return float((E if C is None else E @ C.double()).norm())


@pytest.mark.parametrize("l", RANGES)
@pytest.mark.parametrize("r", RANGES)
@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
def test_every_range_is_obeyed(l: str, r: str, shape: tuple[int, int]) -> None:
    A, C = layer(*shape)
    for metric in (None, C):
        spec = spec_of(7, 3, l, r, 1)
        f = lplr_feedback(A, spec, metric, seeded())
        assert f.format == layout(shape, spec)
        assert Factorization.from_tensors(f.format, f.tensors()).dequantize().equal(f.dequantize())
        norm = float((A if metric is None else A @ metric).norm())
        assert error(A, metric, f) < norm * (0.9 if "tensor" not in (l, r) else 1)


@pytest.mark.parametrize(("n", "d", "rank"), [(1, 1, 1), (1, 9, 1), (9, 1, 1), (12, 12, 12), (6, 40, 5), (40, 6, 5)])
def test_start_is_the_best_of_its_rank(n: int, d: int, rank: int) -> None:
    A, C = layer(n, d)
    problem = Problem.of(A.double(), C.double())
    L, R = svd_start(problem, rank, seeded())
    s = torch.linalg.svdvals(problem.AC)
    # the Gram matrix squares the condition number: directions below sqrt(eps) sigma_1 are noise of that size
    assert float(((problem.A - L @ R) @ problem.C).norm()) == pytest.approx(float(s[rank:].norm()), abs=1e-6 * float(s[0]))
    # balanced: the two factors have the same norms in the metric
    assert float(L.norm()) == pytest.approx(float(problem.in_metric(R).norm()), rel=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_improvement_is_monotone(bits: int) -> None:
    A, C = layer(24, 31)
    problem = Problem.of(A.double(), C.double())
    L, R = svd_start(problem, 8, seeded())
    for l_axis, r_axis in (("row", "both"), ("row", "row")):
        l, r = quantize(L, bits, axis=l_axis), quantize(R, bits, axis=r_axis)  # type: ignore[arg-type]
        errors = [improved(problem, l, r, turns)[2] for turns in (0, 1, 2, 5)]
        assert errors == sorted(errors, reverse=True) and errors[1] < 0.9 * errors[0]
        assert errors[0] == pytest.approx(problem.error(l, r), rel=1e-12)


def test_more_alternations_never_hurt_much_and_feedback_beats_the_plain_method() -> None:
    ratios = []
    for seed in range(4):
        A, C = layer(40, 56, 10 * seed)
        once, more = (error(A, C, lplr_feedback(A, spec_of(12, alternations=a), C, seeded(seed))) for a in (0, 4))
        plain = error(A, C, lplr(A, spec_of(12, l="rank", r="rank", alternations=4), C, seeded(seed)))
        assert more < once
        ratios.append(more / plain)
    assert sum(ratios) / len(ratios) < 0.9


def test_columns_are_put_back() -> None:
    R = torch.randn(4, 9, generator=seeded(3))
    order = torch.randperm(9, generator=seeded(4))
    for axis in ("row", "column", "both"):
        q = quantize(R[:, order], 3, axis=axis)  # type: ignore[arg-type]
        torch.testing.assert_close(columns_put(q, order).dequantize()[:, order], q.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("calibrated", [False, True])
def test_hard_cases(bits: int, calibrated: bool) -> None:
    C = layer(3, 14)[1] if calibrated else None
    rank_one = torch.randn(10, 1, generator=seeded(1)) @ torch.randn(1, 14, generator=seeded(2))
    spike = torch.zeros(10, 14)
    spike[3, 5] = 1
    holes = torch.randn(10, 14, generator=seeded(5))
    holes[2], holes[:, 7] = 0, 0
    for A in (torch.zeros(10, 14), rank_one, spike, holes, torch.eye(10, 14)):
        for r in ("rank", "both"):
            f = lplr_feedback(A, spec_of(4, bits, "row", r), C, seeded())
            assert bool(torch.isfinite(f.dequantize()).all())
            norm = float((A if C is None else A @ C).norm())
            # float32 decides
            assert error(A, C, f) <= norm * (1 + 1e-5)
    f = lplr_feedback(rank_one, spec_of(4, 8, "row", "both"), C, seeded())
    assert error(rank_one, C, f) < 0.05 * float((rank_one if C is None else rank_one @ C).norm())


@pytest.mark.parametrize("unit", [1e-12, 1e8])
def test_the_unit_of_the_metric_does_not_matter(unit: float) -> None:
    A, C = layer(16, 20)
    f, g = (lplr_feedback(A, spec_of(6), factor, seeded()) for factor in (C, C * unit))
    assert error(A, C, g) == pytest.approx(error(A, C, f), rel=0.02)  # another rounding of C, other ties


def test_the_generator_decides() -> None:
    A, C = layer(16, 20)
    f, g, other = (lplr_feedback(A, spec_of(6), C, seeded(s)) for s in (1, 1, 2))
    assert f.dequantize().equal(g.dequantize()) and not f.dequantize().equal(other.dequantize())
