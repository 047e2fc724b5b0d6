"""Counter-based random words: published values, and the sketch and the rounding that are made of them."""

from __future__ import annotations

import torch

from lplr.kernels.pack import unpack
from lplr.kernels.philox import words
from lplr.kernels.round_pack import round_and_pack
from lplr.kernels.sketch import reference, sign_sketch


def test_the_first_word_of_the_published_vectors() -> None:
    # known answers of the authors' Random123 library, philox4x32 with 10 rounds: counter 0, key 0
    assert int(words(0, 1, 1)[0, 0]) == 0x6627E8D5
    w = words((1 << 62) + 5, 300, 200)
    assert len(w.unique()) > 59000 and int(w.max()) < 1 << 32  # of 60000 words of 32 bits less than one pair is expected to agree
    bits = (w[:, :, None] >> torch.arange(32)) & 1
    assert (bits.double().mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / 60000**0.5  # five standard deviations
    assert torch.equal(words(3, 5, 7), words(3, 9, 11)[:5, :7])


def test_sketch_is_unbiased() -> None:
    d, m = 6, 40000
    S = reference.signs(d, m, 1, torch.zeros(0, dtype=torch.float64)) * m**-0.5
    # an entry of S S^T off the diagonal has standard deviation m^-1/2; five of them
    assert (S @ S.T - torch.eye(d)).abs().max() < 5 * m**-0.5
    torch.testing.assert_close(sign_sketch(torch.eye(d, dtype=torch.float64), m, 1), S)


def test_rounding_is_to_the_nearest_point_or_unbiased() -> None:
    X, one = torch.linspace(-3, 3, 101).expand(20000, 101), torch.ones(101)
    half = torch.full((20000,), 0.5)
    nearest = 2.0 * unpack(round_and_pack(X[:1], 2, half[:1], one), 2, 101) - 3
    assert (nearest - X[:1]).abs().max() <= 1 + 2.0**-20  # half a step of 2; float32
    mean = (2.0 * unpack(round_and_pack(X, 2, half, one, seed=5), 2, 101) - 3).mean(0)
    assert (mean - X[0]).abs().max() < 5 * 20000**-0.5  # the variance of a point is at most 1
