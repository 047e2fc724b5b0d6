"""Alternating refinement: never worse than one round, never worse than nothing; the scale that R absorbs."""

from __future__ import annotations

import pytest
import torch

from lplr.factor import factorize, measured_error
from lplr.factor.alternating import quantize_l, quantize_r
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.recipe import FactorSpec, QuantSpec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", ["lplr", "lplr_svd"])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("calibrated", [False, True])
def test_refinement_never_increases_the_error(method: str, bits: int, calibrated: bool) -> None:
    W = torch.randn(32, 26, generator=seeded(1))
    X = torch.randn(90, 26, generator=seeded(2)) * torch.logspace(0, -1, 26)
    H = X.T @ X / 90 if calibrated else None
    C = torch.eye(26).double() if H is None else cholesky_factor(damped(H)).double()
    quant = QuantSpec(bits=bits)
    for seed in range(4):
        errors = []
        for alternations in (0, 1, 3):
            spec = FactorSpec(method=method, rank=8, l=quant, r=quant, alternations=alternations)
            f = factorize(W, spec, H=H, generator=seeded(seed))
            errors.append(float(((W.double() - f.dequantize(torch.float64)) @ C).norm()))
        # float32 decides which round is kept
        assert errors[1] <= errors[0] * (1 + 1e-6) and errors[2] <= errors[1] * (1 + 1e-6)
        assert errors[2] <= float((W.double() @ C).norm()) * (1 + 1e-6)


def test_falls_back_to_zero_where_rounding_destroys() -> None:
    """The identity at one bit and low rank: both factors are spread over all entries, and cannot but harm."""
    quant = QuantSpec(bits=1, ranges="tensor", clip="max", rounding="stochastic")
    spec = FactorSpec(method="lplr", rank=4, l=quant, r=quant)
    W = torch.eye(24)
    once = factorize(W, spec, generator=seeded(3))
    refined = factorize(W, spec.model_copy(update={"alternations": 1}), generator=seeded(3))
    assert measured_error(W, once) > 24**0.5
    assert measured_error(W, refined) <= 24**0.5
    assert refined.format == once.format  # the layout does not tell


@pytest.mark.parametrize("ranges", ["tensor", "row", "rank", "both"])
@pytest.mark.parametrize("bits", [2, 8])
def test_what_l_leaves_out_r_absorbs(ranges: str, bits: int) -> None:
    L = torch.randn(20, 6, generator=seeded(1)) * torch.logspace(0, -2, 6)
    quant = QuantSpec(bits=bits, ranges=ranges, clip="max")  # type: ignore[arg-type]
    q, left_out = quantize_l(L, quant, seeded())
    assert q.col_scale is None and left_out.shape in ((6,), (1,))
    step = 1.01 / (2**bits - 1)
    error = (L - q.dequantize() * left_out).abs()
    reach = {"tensor": L.abs().max(), "row": L.abs().amax(1, keepdim=True), "rank": L.abs().amax(0), "both": L.abs().max()}[
        ranges
    ]
    assert ranges == "both" or bool((error <= step * reach).all())
    R = quantize_r(L.T.contiguous(), quant, seeded())
    scales = {"tensor": ((1,), None), "row": (None, (20,)), "rank": ((6,), None), "both": ((6,), (20,))}[ranges]
    assert tuple(None if s is None else tuple(s.shape) for s in (R.row_scale, R.col_scale)) == scales
