"""Measured curves against what a whole matrix loses when it is factorized at that width."""

from __future__ import annotations

import pytest
import torch

from lplr.factor import factorize, layout, plan
from lplr.factor.curves import error_curve
from lplr.recipe import FactorSpec


def case(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different size, and inputs of which a few directions carry most: what rotations are for."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, d, generator=g) * torch.logspace(-1, 1, n)[:, None]
    X = torch.randn(4 * d, d, generator=g) * torch.logspace(0, -1.5, d)
    Q, _ = torch.linalg.qr(torch.randn(d, d, generator=g))
    X = X @ Q
    return W, X.T @ X / len(X)


def true_error(W: torch.Tensor, H: torch.Tensor | None, bits: float, grid: str) -> float:
    spec = FactorSpec(method="ldlq", bits_per_weight=bits, grid=grid)
    f = factorize(W, spec, H=H, generator=torch.Generator().manual_seed(0))
    E = (W - f.dequantize()).double()
    return float((E if H is None else E @ H.double()).mul(E).sum())


@pytest.mark.parametrize("grid", ["trellis", "uniform", "lattice", "normal_float"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_curve_is_near_the_error_of_whole_matrices(grid: str, calibrated: bool):
    W, H = case(256, 96)
    metric = H if calibrated else None
    curve = error_curve(W, FactorSpec(method="ldlq", bits_per_weight=4.1, grid=grid), H=metric)
    assert [b for b, _ in curve] == sorted(b for b, _ in curve)
    assert [e for _, e in curve] == sorted((e for _, e in curve), reverse=True)
    compared = 0
    for bits, error in curve:
        width = bits / W.numel()
        if 0.9 < width < 4.5:
            compared += 1
            # 64 of 256 rows of a normal matrix, columns a quarter as long (a fixed start state costs more), half widths by a line
            assert error == pytest.approx(true_error(W, metric, width + 1e-9, grid), rel=0.35), width
    assert compared >= 3


def test_curve_with_an_output_metric_is_near_the_error_of_whole_matrices():
    """Against the mean weight: e = tr(G E H E^T) / (tr G / n)."""
    W, H = case(256, 96)
    _, G = case(8, 256, seed=3)
    G = G + 0.02 * G.diagonal().mean() * torch.eye(256)
    spec = FactorSpec(method="ldlq", bits_per_weight=4.1, grid="trellis")
    plain, directed = (dict(error_curve(W, spec, H=H, G=given)) for given in (None, G))
    assert plain.keys() == directed.keys()
    for bits in plain:
        assert directed[bits] < 0.8 * plain[bits]
    for width in (2.0, 3.0, 4.0):
        bits = next(b for b in directed if 0 <= b / W.numel() - width < 0.02)
        f = factorize(W, spec.model_copy(update={"bits_per_weight": width + 0.02}), H=H, G=G, generator=torch.Generator())
        E = (W - f.dequantize()).double()
        error = float(torch.trace(G.double() @ E @ H.double() @ E.T) / G.double().diagonal().mean())
        # beside what holds without G: the ends of blocks on a column, and feedback from both sides that widens what is rounded
        assert error == pytest.approx(directed[bits], rel=0.5), width


def test_bits_are_those_that_the_width_will_take():
    W, H = case(72, 40)
    spec = FactorSpec(method="ldlq", bits_per_weight=3.0, grid="trellis")
    for bits, _ in error_curve(W, spec, H=H):
        again = plan((72, 40), spec.model_copy(update={"bits_per_weight": bits / W.numel() * (1 + 1e-12)}))
        assert layout((72, 40), again).stored_bits() == bits
        assert again.q_narrow == 0


def test_a_zero_matrix_has_nothing_to_lose():
    curve = error_curve(torch.zeros(16, 8), FactorSpec(method="ldlq", bits_per_weight=3.0))
    assert all(error == 0 for _, error in curve)


def test_scale_of_the_matrix_scales_the_curve():
    W, H = case(64, 32)
    spec = FactorSpec(method="ldlq", bits_per_weight=3.0, grid="trellis")
    small, large = error_curve(W, spec, H=H), error_curve(W * 1024, spec, H=H)
    for (_, a), (_, b) in zip(small, large, strict=True):
        assert b == pytest.approx(a * 1024**2, rel=1e-3)
