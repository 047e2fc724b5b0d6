"""NormalFloat against bitsandbytes, the construction with scipy, and quadrature of its error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from lplr.kernels.normal_float import levels, normal_scale, round_to_levels

WIDTHS = (2, 3, 4)


@pytest.mark.filterwarnings("ignore")
def test_four_bits_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    table = functional.create_normal_map()
    table = torch.cat([table[table < 0], torch.zeros(1), table[table > 0]])  # it is padded with zeros to 256
    assert torch.equal(levels(4), table)
    assert torch.equal(levels(4), functional.get_4bit_type("nf4", device="cpu").flatten()[:16])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [64, 256])
def test_codes_are_those_of_bitsandbytes(block: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(128, block, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(x, blocksize=block, quant_type="nf4")
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(128, block)
    codes, values = round_to_levels(x / state.absmax[:, None], 4)
    assert torch.equal(codes, theirs)
    torch.testing.assert_close(values * state.absmax[:, None], functional.dequantize_4bit(packed, state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_quantiles(bits: int) -> None:
    """To float32 rounding of the probabilities, whose error the quantile's slope at the largest level, about 13, multiplies."""
    offset = 1 - 0.5 * (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2))
    positive = norm.ppf(np.linspace(offset, 0.5, 2 ** (bits - 1) + 1)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 2 ** (bits - 1))[:-1])
    expected = np.sort(np.concatenate([negative, [0.0], positive])) / positive.max()
    np.testing.assert_allclose(levels(bits).numpy(), expected, rtol=0, atol=13 * 2.0**-24 + 1e-7)
    assert levels(bits).dtype == torch.float32 and levels(bits).shape == (2**bits,)
    assert float(levels(bits)[0]) == -1 and float(levels(bits)[-1]) == 1 and bool((levels(bits).diff() > 0).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_normal_scale_is_the_best(bits: int) -> None:
    """Error by quadrature cell by cell; the minimum is flat, so a bounded search finds the scale to about 1e-4."""
    points = levels(bits).double().numpy()

    def error(scale: float) -> float:
        v = points * scale
        edges = np.concatenate([[-12.0], (v[1:] + v[:-1]) / 2, [12.0]])
        cells = zip(edges[:-1], edges[1:], v, strict=True)
        return sum(quad(lambda t, p=p: (t - p) ** 2 * norm.pdf(t), a, b)[0] for a, b, p in cells)

    best = minimize_scalar(error, bounds=(1.0, 4.0), method="bounded", options={"xatol": 1e-5})
    assert normal_scale(bits) == pytest.approx(best.x, rel=1e-4)
    assert error(normal_scale(bits)) <= best.fun * (1 + 1e-9)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    measured = float((x - round_to_levels(x / normal_scale(bits), bits)[1] * normal_scale(bits)).square().mean())
    assert measured == pytest.approx(best.fun, rel=0.02)  # 2e5 samples: below 0.5 %


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WIDTHS), st.integers(1, 40), st.integers(0, 10**6), st.floats(-4, 30), st.sampled_from(["float32", "float64"])
)
def test_rounding_is_to_the_nearest_level(bits: int, n: int, seed: int, decade: float, dtype: str) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=getattr(torch, dtype)) * 10.0**decade
    codes, values = round_to_levels(x, bits)
    assert codes.dtype == torch.uint8 and values.dtype == x.dtype and codes.shape == values.shape == x.shape
    assert torch.equal(values, levels(bits).to(x.dtype)[codes.long()])
    nearest = (x.double()[..., None] - levels(bits).double()).abs().amin(-1)
    # midpoints are rounded once in x's type
    assert bool(((x.double() - values.double()).abs() <= nearest + 2 * torch.finfo(x.dtype).eps).all() or decade > 6)
    assert torch.equal(round_to_levels(values, bits)[0], codes)


def test_ends_zero_and_ties() -> None:
    for bits in WIDTHS:
        top = (1 << bits) - 1
        codes, values = round_to_levels(torch.tensor([-1e30, -1.0, 0.0, 1.0, 1e30, float("inf")]), bits)
        assert codes.tolist() == [0, 0, (1 << (bits - 1)) - 1, top, top, top]
        assert values.tolist() == [-1, -1, 0, 1, 1, 1]
    assert round_to_levels(torch.tensor([-0.5, 0.5]).double(), 2)[1].tolist()[0] == -1  # in the middle: the lower
    assert round_to_levels(torch.empty(0, 3), 3)[0].shape == (0, 3)


def test_wrong_bits() -> None:
    for bits in (1, 5, 2.5):
        with pytest.raises(ValueError, match="2, 3, 4"):
            levels(bits)
