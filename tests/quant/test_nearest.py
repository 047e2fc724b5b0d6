"""`nearest_of`: the same layout with the codes nearest to other points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.kernels.levels import WIDTHS, narrower
from lplr.quant.ldlq import ldlq
from lplr.quant.nearest import nearest_of
from lplr.quant.uniform import quantize

CASES = [(grid, bits) for grid in WIDTHS for bits in WIDTHS[grid]]


def packed(grid: str, bits: float, n: int = 37, d: int = 11, narrow: int = 0):
    X = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return ldlq(X, bits, torch.eye(d), grid=grid, narrow=narrow)


@pytest.mark.parametrize(("grid", "bits"), CASES)
@pytest.mark.parametrize("narrow", [0, 5])
def test_a_matrix_is_the_nearest_to_its_own_points(grid, bits, narrow):
    q = packed(grid, bits, narrow=narrow)
    found, points = nearest_of(q, q.levels())
    # two code words may stand for the same points (0.5-bit trellis): what is decoded counts
    assert torch.equal(found.levels(), q.levels())
    assert torch.equal(points, q.levels())
    assert found.row_scale is q.row_scale
    assert found.stored_bits() == q.stored_bits()


@pytest.mark.parametrize(("grid", "bits"), CASES)
@pytest.mark.parametrize("narrow", [0, 4])
def test_the_points_told_are_those_that_the_codes_stand_for(grid, bits, narrow):
    q = packed(grid, bits, narrow=narrow)
    x = q.levels() + 0.7 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    found, points = nearest_of(q, x)
    assert torch.equal(found.levels(), points)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_uniform_points_are_nearest_by_brute_force(bits):
    q = packed("uniform", bits, narrow=3)
    x = 3 * torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    _, points = nearest_of(q, x)
    wide = 2 * torch.arange(1 << bits) - ((1 << bits) - 1)
    lower, ratio = narrower("uniform", bits)
    few = ratio * (2 * torch.arange(1 << int(lower)) - ((1 << int(lower)) - 1)) if lower else torch.zeros(1)
    for columns, grid in ((slice(3, None), wide.float()), (slice(0, 3), few)):
        distance = (x[:, columns, None] - grid).abs()
        assert torch.allclose((x[:, columns] - points[:, columns]).abs(), distance.amin(-1))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 6), seed=st.integers(0, 99), at=st.sampled_from([1.0, 1.5, 2.0]))
def test_the_trellis_is_never_farther_than_what_was_there(n, d, seed, at):
    generator = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(n, d, generator=generator), at, axis="tensor", grid="trellis")
    x = q.levels() + torch.randn(n, d, generator=generator)
    _, points = nearest_of(q, x)
    before, after = ((x - v).double().square().sum(0) for v in (q.levels(), points))  # by column: each is a path of its own
    assert bool((after <= before * (1 + 1e-6)).all())  # float32 sums of the encoder


def test_another_shape_is_an_error():
    q = packed("uniform", 2)
    with pytest.raises(ValueError, match="shape"):
        nearest_of(q, torch.zeros(3, 3))
