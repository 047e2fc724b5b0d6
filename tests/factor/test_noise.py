"""The grid's error: variances, worst cases and means over a random rotation, against samples and quadrature."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate

from lplr.factor.alternating import quantize_l
from lplr.factor.noise import expected_max, noise_energy, sphere_distortion, worst_case
from lplr.linalg.range_finder import random_rotation
from lplr.quant.uniform import NORMAL_SCALE, quantize, scales
from lplr.recipe import QuantSpec

GRIDS = {
    "stochastic": {"rounding": "stochastic", "clip": "max"},
    "nearest max": {"rounding": "nearest", "clip": "max"},
    "nearest mse": {"rounding": "nearest", "clip": "mse"},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quant(bits: int, ranges: str, grid: str = "stochastic") -> QuantSpec:
    return QuantSpec(bits=bits, ranges=ranges, **GRIDS[grid])  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("clip", ["max", "mse"])
def test_worst_case_is_never_exceeded(rounding: str, clip: str) -> None:
    x = torch.randn(40, 30, generator=seeded(1)) ** 3
    for bits in (1, 3, 8):
        spec = QuantSpec(bits=bits, rounding=rounding, clip=clip, ranges="row")  # type: ignore[arg-type]
        rows, _ = scales(x, bits, axis="row", clip=spec.clip)
        assert rows is not None
        bound = worst_case(x.double(), rows.double(), torch.ones(30, dtype=torch.float64), spec)
        found = quantize(x, bits, axis="row", rounding=spec.rounding, clip=spec.clip, generator=seeded(2))
        error = (x.double() - found.dequantize(torch.float64)).abs()
        # the code is chosen in float32: a tie may fall either way by 1e-6 of the range
        assert bool((error <= bound + 1e-5 * x.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ranges", ["tensor", "row", "rank"])
def test_noise_energy(ranges: str, grid: str) -> None:
    """E||Y - Q(Y)||^2 for Y = M O, O a random rotation: rows of unequal length, one of them zero."""
    M = torch.randn(24, 10, generator=seeded(1)) * torch.logspace(0, -2, 24)[:, None]
    M[5] = 0
    g = seeded(2)
    for bits in (1, 2, 3, 6):
        spec = quant(bits, ranges, grid)
        squares = []
        for _ in range(150):
            Y = M @ random_rotation(10, M, g)
            packed, left_out = quantize_l(Y, spec, g)
            squares.append(float((Y - packed.dequantize() * left_out).square().sum()))
        bound = noise_energy(spec, float(M.square().sum()), M.square().sum(1), 10)
        assert bound is not None
        # rows of two or three bits attain it but for the second Lloyd step
        assert np.mean(squares) - 4 * np.std(squares) / math.sqrt(150) <= bound
    assert noise_energy(quant(2, "both"), 1.0, torch.ones(3), 3) is None


def test_expected_max_bounds_the_mean_of_the_maximum() -> None:
    variances = torch.logspace(0, -3, 40)
    g = torch.randn(4000, 40, generator=seeded(0), dtype=torch.float64)
    sample = (g.square() * variances).amax(1)
    bound = expected_max(variances, 1)
    assert float(sample.mean()) + 4 * float(sample.std()) / 63 <= bound <= 4 * float(sample.mean())
    assert expected_max(torch.zeros(3), 5) == 0.0
    assert expected_max(2 * variances, 7) == pytest.approx(2 * expected_max(variances, 7))


@pytest.mark.parametrize("m", [2, 3, 16, 200])
def test_sphere_distortion_against_quadrature(m: int) -> None:
    """Adaptive quadrature between the grid's thresholds, in phi with x = sqrt(m) cos(phi)."""
    for bits in (1, 2, 4):
        half, top = NORMAL_SCALE[bits], 2**bits - 1
        edges = [0.0, *(2 * half * j for j in range(1, top // 2 + 1) if 2 * half * j < math.sqrt(m)), math.sqrt(m)]
        total = 0.0
        for j, (low, high) in enumerate(pairwise(edges)):
            level = (2 * j + 1) * half
            a, b = math.acos(min(1, high / math.sqrt(m))), math.acos(low / math.sqrt(m))
            total += integrate.quad(lambda p, v=level: (math.sqrt(m) * math.cos(p) - v) ** 2 * math.sin(p) ** (m - 2), a, b)[0]
        norm = integrate.quad(lambda p: math.sin(p) ** (m - 2), 0, math.pi / 2)[0]
        assert total / norm <= sphere_distortion(bits, m) <= total / norm * 1.0003


def test_sphere_distortion_of_one_entry_and_limit() -> None:
    assert sphere_distortion(2, 1) == pytest.approx((3 * 0.4978 - 1) ** 2, rel=1e-3)  # 1 lies above the threshold 2 * 0.4978
    # Max 1960, table II: the mean squared errors for a normal variable
    for bits, error in {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495}.items():
        assert sphere_distortion(bits, 20000) == pytest.approx(error, rel=3e-3)
