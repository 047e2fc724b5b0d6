"""`factorize`: every method on ordinary and hard matrices, refusals, determinism, quality."""

from __future__ import annotations

import math

import pytest
import torch

from lplr.errors import CheckpointError, RecipeError
from lplr.factor import Factorization, factorize, measured_error, optimal_error, spectrum
from lplr.factor.methods import METHODS
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.recipe import FACTOR_RANGES, LOW_RANK, FactorSpec, QuantSpec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spec_for(method: str, bits: int = 4, rank: int = 3, **more: object) -> FactorSpec:
    l, r = (QuantSpec(bits=bits, ranges=ranges) for ranges in FACTOR_RANGES.get(method, ("rank", "rank")))
    q = None if method in LOW_RANK else QuantSpec(bits=bits, ranges="row")
    return FactorSpec(method=method, rank=rank, l=l, r=r, q=q, **more)  # type: ignore[arg-type]


def decaying(n: int, d: int, power: float = 1.0) -> torch.Tensor:
    g = seeded(3)
    U, _ = torch.linalg.qr(torch.randn(n, min(n, d), generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(d, min(n, d), generator=g, dtype=torch.float64))
    return ((U * torch.arange(1, min(n, d) + 1).double() ** -power) @ V.T).float()


@pytest.mark.parametrize("method", METHODS)
def test_zero_is_reproduced(method: str) -> None:
    for alternations in (0, 2):
        f = factorize(torch.zeros(9, 7), spec_for(method, alternations=alternations), generator=seeded())
        assert not f.dequantize().any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 13), (13, 1), (1, 1), (5, 5), (3, 40), (40, 3)])
def test_any_shape_is_finite_and_close(method: str, shape: tuple[int, int]) -> None:
    W = torch.randn(*shape, generator=seeded(1))
    f = factorize(W, spec_for(method, bits=8, rank=min(shape)), generator=seeded(2))
    assert f.shape == shape and bool(torch.isfinite(f.dequantize()).all())
    assert measured_error(W, f) <= 0.05 * float(W.norm())


@pytest.mark.parametrize("method", METHODS)
def test_rank_one(method: str) -> None:
    W = torch.outer(torch.linspace(-2, 1, 30), torch.linspace(1, 3, 20))
    f = factorize(W, spec_for(method, bits=8), generator=seeded(2))
    assert measured_error(W, f) <= 0.02 * float(W.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decade", [-30, -10, 10, 30])
def test_scale_invariance(method: str, decade: int) -> None:
    """A power of two changes the scales alone, within the range of bfloat16."""
    W = torch.randn(12, 10, generator=seeded(1), dtype=torch.float64)
    unit = 2.0 ** round(decade * math.log2(10))
    plain, scaled = (factorize(X, spec_for(method), generator=seeded(2)) for X in (W, W * unit))
    torch.testing.assert_close(scaled.dequantize(torch.float64), plain.dequantize(torch.float64) * unit, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(value: float) -> None:
    W = torch.ones(4, 4)
    W[1, 2] = value
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        factorize(W, spec_for("lplr"), generator=seeded())


def test_misuse_is_refused() -> None:
    for W in (torch.ones(3), torch.ones(0, 4), torch.ones(2, 2, 2)):
        with pytest.raises(RecipeError, match="shape"):
            factorize(W, spec_for("lplr"), generator=seeded())
    with pytest.raises(RecipeError, match="fits"):
        factorize(torch.ones(4, 4), FactorSpec(method="lplr", bits_per_weight=0.1), generator=seeded())
    with pytest.raises(RecipeError, match="did you mean 'lplr'"):
        factorize(torch.ones(4, 4), FactorSpec(method="lprl", rank=1), generator=seeded())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bytes(method: str, rounding: str) -> None:
    W, H = decaying(20, 15), torch.eye(15)
    spec = FactorSpec(method=method, bits_per_weight=4, rounding=rounding, power_iterations=1, alternations=1)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    for metric in (None, H):
        first, again = (factorize(W, spec, H=metric, generator=seeded(5)).tensors() for _ in range(2))
        assert list(first) == list(again) and all(torch.equal(first[k], again[k]) for k in first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    W = decaying(16, 12).to(dtype)
    f = factorize(W, spec_for("lplr_svd", bits=8, rank=12), generator=seeded())
    assert measured_error(W, f) <= 0.05 * float(W.double().norm())


@pytest.mark.parametrize("method", ["lplr", "lplr_svd"])
@pytest.mark.parametrize("ranges", ["tensor", "rank", "both"])
def test_eight_bits_come_close_to_the_optimum(method: str, ranges: str) -> None:
    W = decaying(80, 60, 0.8)
    quant = QuantSpec(bits=8, ranges=ranges)  # type: ignore[arg-type]
    f = factorize(W, FactorSpec(method=method, rank=20, l=quant, r=quant, power_iterations=3), generator=seeded())
    best = optimal_error(spectrum(W), 20)
    assert best <= measured_error(W, f) <= 1.03 * best


def test_more_power_iterations_help() -> None:
    W = decaying(60, 50, 0.4)
    errors = [
        sum(measured_error(W, factorize(W, spec_for("lplr", 8, 12, power_iterations=q), generator=seeded(s))) for s in range(8))
        for q in (0, 1, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("method", ["lplr", "lplr_svd", "ldlq", "caldera"])
def test_the_metric_is_what_is_minimised(method: str) -> None:
    W = torch.randn(40, 30, generator=seeded(1))
    X = torch.randn(200, 30, generator=seeded(2)) * torch.logspace(0.5, -1.5, 30)
    H = X.T @ X / 200
    C = cholesky_factor(damped(H)).double()

    def weighted(metric: torch.Tensor | None) -> float:
        total = 0.0
        for seed in range(4):
            f = factorize(W, spec_for(method, 3, 8, alternations=1), H=metric, generator=seeded(seed))
            total += float(((W.double() - f.dequantize(torch.float64)) @ C).norm())
        return total

    assert weighted(H) < 0.9 * weighted(None)


@pytest.mark.parametrize("method", ["ldlq", "caldera", "auto", "lplr"])
def test_output_metric_lowers_the_loss_that_it_weighs_or_is_left_out(method: str) -> None:
    n, d = 96, 48
    g = torch.Generator().manual_seed(1)
    W = torch.randn(n, d, generator=g)
    X, Y = (torch.randn(4 * k, k, generator=g) * torch.logspace(0, -1.5, k) for k in (d, n))
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g))
    H, G = X.T @ X / len(X), Q @ (Y.T @ Y) @ Q.T / len(Y)
    spec = FactorSpec(method=method, bits_per_weight=3.0)
    plain, directed = (factorize(W, spec, H=H, G=given, generator=torch.Generator().manual_seed(0)) for given in (None, G))

    def loss(f: Factorization) -> float:
        E = (W - f.dequantize()).double()
        return float(torch.trace(G.double() @ E @ H.double() @ E.T))

    assert directed.stored_bits() == plain.stored_bits() or method == "auto"
    if method in ("ldlq", "auto"):
        assert loss(directed) < 0.9 * loss(plain)
    else:
        assert torch.equal(directed.dequantize(), plain.dequantize())


def test_an_output_metric_that_drives_the_rounding_away_is_left_out() -> None:
    """Where the error would exceed the matrix itself, in the metric of the certificate."""
    n, d = 64, 24
    W = torch.randn(n, d, generator=torch.Generator().manual_seed(2))
    G = torch.full((n, n), 1.0) + 1e-6 * torch.eye(n)
    H = torch.full((d, d), 1.0) + 1e-4 * torch.eye(d)
    for bits in (1.0, 1.5, 2.0):
        spec = FactorSpec(method="ldlq", bits_per_weight=bits)
        f = factorize(W, spec, H=H, G=G, generator=torch.Generator().manual_seed(0))
        E = (W - f.dequantize()).double()
        assert torch.trace(E @ H.double() @ E.T) <= torch.trace(W.double() @ H.double() @ W.double().T) * (1 + 1e-6)
