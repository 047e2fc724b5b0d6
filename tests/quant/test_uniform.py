"""The uniform grid: unbiased, of bounded variance, truly nearest, never saturated with `max`, optimal for normal data."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.errors import RecipeError
from lplr.kernels.levels import BY_COLUMN, nearest, packed_shape
from lplr.kernels.pack import pack, unpack
from lplr.quant import QTensor, quantize
from lplr.quant.qtensor import round_scale
from lplr.quant.uniform import round_to_grid, scales

AXES = ("tensor", "row", "column", "both")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 23, d: int = 17) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(1), dtype=torch.float64) ** 3


def half_steps(q: QTensor) -> torch.Tensor:
    out = torch.ones(q.shape, dtype=torch.float64)
    if q.row_scale is not None:
        out *= q.row_scale.double()[:, None]
    return out if q.col_scale is None else out * q.col_scale.double()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_stochastic_rounding_is_unbiased_with_bounded_variance(bits: int, axis: str) -> None:
    """600 draws; each entry's mean within 5.5 standard errors of its half step (391 entries), its variance below s^2."""
    x, g, draws = data(), seeded(bits), 600
    sample = torch.stack(
        [
            quantize(x, bits, axis=axis, rounding="stochastic", clip="max", generator=g).dequantize(torch.float64)  # type: ignore[arg-type]
            for _ in range(draws)
        ]
    )
    s = half_steps(quantize(x, bits, axis=axis, clip="max"))  # type: ignore[arg-type]
    assert bool(((sample.mean(0) - x).abs() <= 5.5 * s / draws**0.5).all())
    # the law is on two points 2 s apart: the sample's variance cannot exceed s^2 but for the factor n / (n - 1)
    assert bool((sample.var(0) <= s.square() * draws / (draws - 1) * (1 + 1e-9)).all())
    assert bool(((sample - x).abs() <= 2 * s * (1 + 1e-12)).all())
    distance = (x / s + (1 << bits) - 1) / 2
    exact = 4 * s.square() * (distance - distance.floor()) * (distance.floor() + 1 - distance)
    assert float(sample.var(0).sum()) == pytest.approx(float(exact.sum()), rel=0.05)


@pytest.mark.parametrize(("bits", "axis", "clip"), [*product((1, 2, 3, 5), AXES, ("max", "mse"))])
def test_nearest_is_the_nearest_point(bits: int, axis: str, clip: str) -> None:
    x = data(11, 13)
    q = quantize(x, bits, axis=axis, clip=clip)  # type: ignore[arg-type]
    s = half_steps(q)
    levels = torch.arange(1 << bits, dtype=torch.float64) * 2 - ((1 << bits) - 1)
    distances = (x[..., None] - s[..., None] * levels).abs()
    found = (x - q.dequantize(torch.float64)).abs()
    assert bool((found <= distances.amin(-1) + 1e-12 * x.abs()).all())


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from(AXES),
    st.sampled_from(["nearest", "stochastic"]),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.floats(-30, 30),
)
def test_max_never_saturates(bits: int, axis: str, rounding: str, n: int, d: int, seed: int, decade: float) -> None:
    g = seeded(seed)
    x = torch.randn(n, d, generator=g) * 10.0**decade
    q = quantize(x, bits, axis=axis, rounding=rounding, clip="max", generator=g)  # type: ignore[arg-type]
    s = half_steps(q)
    top = (1 << bits) - 1
    assert bool((x.double().abs() <= top * s * (1 + 1e-6)).all())
    if axis != "both":
        largest = x.double().abs().amax({"tensor": (0, 1), "row": 1, "column": 0}[axis], keepdim=True)  # type: ignore[arg-type]
        assert bool((top * s <= largest * (1 + 2.0**-7) * (1 + 1e-6)).all())
    error = (x.double() - q.dequantize(torch.float64)).abs()
    assert bool((error <= (1 if rounding == "nearest" else 2) * s * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("bits", "error"), {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001041, 7: 3.035e-4, 8: 8.714e-5}.items()
)
def test_mse_range_reaches_the_optimum_for_normal_data(bits: int, error: float) -> None:
    """Max 1960, table II (1 to 5 bits; 6 to 8 from the same equations); 2 * 10^5 samples: about 1 % at eight bits."""
    x = torch.randn(4, 50000, generator=seeded(bits))
    q = quantize(x, bits, axis="row", clip="mse")
    found = float((x - q.dequantize()).square().mean() / x.square().mean())
    assert found == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("axis", AXES)
def test_mse_is_no_worse_than_zero_and_usually_than_max(axis: str) -> None:
    x = data(40, 30)
    for bits in range(1, 9):
        least = float((x - quantize(x, bits, axis=axis, clip="mse").dequantize(torch.float64)).square().sum())  # type: ignore[arg-type]
        widest = float((x - quantize(x, bits, axis=axis, clip="max").dequantize(torch.float64)).square().sum())  # type: ignore[arg-type]
        assert least <= float(x.square().sum()) * (1 if axis != "both" else 2)
        assert bits > 3 or least < widest


@pytest.mark.parametrize(("axis", "clip", "rounding"), [*product(AXES, ("max", "mse"), ("nearest", "stochastic"))])
def test_zero_rows_and_columns_stay_zero(axis: str, clip: str, rounding: str) -> None:
    x = data(9, 7).float()
    x[3], x[:, 2] = 0, 0
    for bits in (1, 2, 8):
        q = quantize(x, bits, axis=axis, clip=clip, rounding=rounding, generator=seeded()).dequantize()  # type: ignore[arg-type]
        assert bool(torch.isfinite(q).all())
        if axis in ("row", "both"):
            assert not q[3].any()
        if axis in ("column", "both"):
            assert not q[:, 2].any()
        zero = quantize(torch.zeros(3, 4), bits, axis=axis, clip=clip, rounding=rounding, generator=seeded())  # type: ignore[arg-type]
        assert not zero.dequantize().any()


@pytest.mark.parametrize("up", [False, True])
def test_scales_survive_bfloat16(up: bool) -> None:
    x = torch.cat([torch.logspace(-37, 38, 5000), torch.tensor([0.0, 1.0, 1 + 2.0**-8, 1 + 2.0**-9, 2 - 2.0**-20])])
    s = round_scale(x, up=up)
    assert s.dtype == torch.bfloat16 and bool(torch.isfinite(s).all())
    ratio = (s.double() / x.double())[x > 0]
    low, high = (1.0, 1 + 2.0**-7) if up else (1 - 2.0**-8, 1 + 2.0**-8)
    assert float(ratio.min()) >= low and float(ratio.max()) <= high
    assert float(s[x == 0]) == 0
    assert torch.equal(round_scale(s.float(), up=up), s)  # idempotent


def test_scales_beyond_the_range_are_kept_inside() -> None:
    s = round_scale(torch.tensor([1e-45, 3.4e38, float("inf")]), up=True)
    assert bool(torch.isfinite(s).all()) and float(s[0]) == 2.0**-126


def test_ranges_per_axis() -> None:
    x = data(6, 5)
    shapes = {"tensor": ((1,), None), "row": ((6,), None), "column": (None, (5,)), "both": ((6,), (5,))}
    for axis, clip in product(AXES, ("max", "mse")):
        found = scales(x, 3, axis=axis, clip=clip)  # type: ignore[arg-type]
        assert tuple(None if s is None else tuple(s.shape) for s in found) == shapes[axis]
    row, _ = scales(x, 1, axis="row", clip="mse")
    assert row is not None
    torch.testing.assert_close(row.double(), x.abs().mean(1), rtol=2.0**-8, atol=0)  # the best scale of signs


def test_one_bit_is_the_sign() -> None:
    x = data()
    q = quantize(x, 1, axis="row")
    assert torch.equal(unpack(q.codes, 1, 17).bool(), x > 0)


def test_randomness_is_the_argument() -> None:
    x = data()
    state = torch.get_rng_state()
    first, again, other = (quantize(x, 2, rounding="stochastic", clip="max", generator=seeded(seed)).codes for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    before = x.clone()
    round_to_grid(x, 2, None, None, None)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("grid", "bits"), [("trellis", 0.5), ("trellis", 3), ("lattice", 2), ("normal_float", 4), ("uniform", 2)]
)
@pytest.mark.parametrize("axis", AXES)
def test_any_grid(grid: str, bits: float, axis: str) -> None:
    """Codes decode to the nearest points of what the scales leave, and a normal matrix is as far away as the grid promises."""
    x = torch.randn(150, 90, generator=seeded(4), dtype=torch.float64)
    q = quantize(x, bits, axis=axis, grid=grid)  # type: ignore[arg-type]
    assert q.grid == grid and q.codes.shape == packed_shape((150, 90), grid, bits)
    points, _ = nearest((x / half_steps(q)).T.contiguous(), grid, bits)
    assert torch.equal(q.codes, points if grid in BY_COLUMN else pack(points.T.contiguous(), int(bits)))
    error = float((x - q.dequantize(torch.float64)).square().mean())
    assert 2 ** (-2 * bits) < error < {0.5: 0.6, 2: 0.13, 3: 0.025, 4: 0.012}[bits]
    zero = quantize(torch.zeros(9, 5), bits, axis=axis, grid=grid)  # type: ignore[arg-type]
    assert not zero.dequantize().any()
    if grid != "uniform":
        with pytest.raises(RecipeError, match="uniform grid"):
            quantize(x, bits, grid=grid, rounding="stochastic", generator=seeded())
