"""The trellis: against brute force over every path, the compiled form against the reference, and the rates of issue 3."""

from __future__ import annotations

import itertools

import pytest
import torch

from lplr.kernels import trellis
from lplr.kernels.pack import pack
from lplr.kernels.trellis import reference


@pytest.mark.parametrize("bits", trellis.WIDTHS)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_compiled_equals_reference_and_decodes(bits: float, n: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    codes, values = trellis.encode(x, bits)
    expected_codes, expected = reference.encode(x, bits)
    assert torch.equal(codes, expected_codes) and torch.equal(values, expected)
    assert codes.shape == (3, trellis.packed_width(n, bits))
    assert torch.equal(trellis.decode(codes, bits, n), values)


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.5, 2.0])
def test_encode_finds_the_best_of_all_paths(bits: float) -> None:
    c = reference.code(bits)
    steps = 8 // c.step_bits
    n = steps * c.entries
    paths = torch.tensor(list(itertools.product(range(1 << c.step_bits), repeat=steps)), dtype=torch.uint8)
    every = trellis.decode(pack(paths, c.step_bits), bits, n, torch.float64)
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    least = torch.cdist(x, every).square().min(1).values
    found = (x - trellis.encode(x, bits)[1]).square().sum(1)
    assert torch.allclose(found, least, rtol=1e-5)  # costs are summed in float32


@pytest.mark.parametrize(("bits", "limit"), [(1.0, 0.285), (2.0, 0.073)])
def test_gaussian_distortion(bits: float, limit: float) -> None:
    """Issue 3's limits; 20,000 samples have a standard error below 1.5 % of the mean."""
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(7))
    assert float((x - trellis.encode(x, bits)[1]).square().mean()) <= limit


def test_unknown_width_is_named() -> None:
    with pytest.raises(ValueError, match="1.25"):
        trellis.packed_width(8, 1.25)
