"""lplr.evaluate.certificate: the bound holds, by simulation and against the theorem written out; what it bounds is bounded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lplr.evaluate.certificate import SMOOTHING, certify, upper_bound
from lplr.metrics import kl_divergence


@given(st.lists(st.floats(0, 3), min_size=2, max_size=40), st.floats(0.5, 0.999))
def test_the_bound_is_that_of_the_theorem(values: list[float], confidence: float) -> None:
    z, delta = np.array(values) / 3, 1 - confidence  # the theorem is stated for [0, 1]
    pairs = sum((a - b) ** 2 for i, a in enumerate(z) for b in z[i + 1 :])  # its V, as a sum over pairs
    n = len(z)
    expected = z.mean() + math.sqrt(2 * pairs / (n * (n - 1)) * math.log(2 / delta) / n) + 7 * math.log(2 / delta) / (3 * (n - 1))
    assert upper_bound(values, 3.0, confidence) == pytest.approx(min(3.0, 3 * expected), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("law", ["rare", "uniform", "beta"])
@pytest.mark.parametrize("n", [20, 200])
def test_the_bound_fails_no_more_often_than_it_says(law: str, n: int) -> None:
    rng = np.random.default_rng(0)
    draw, mean = {
        "rare": (lambda: (rng.random(n) < 0.05).astype(float), 0.05),  # the hard case: the mean is in a few large values
        "uniform": (lambda: rng.random(n), 0.5),
        "beta": (lambda: rng.beta(0.2, 2, n), 1 / 11),
    }[law]
    below = sum(upper_bound(draw().tolist(), 1.0, 0.9) < mean for _ in range(500))
    assert below <= 0.1 * 500


def test_misuse_of_the_bound() -> None:
    for bad in ([0.5], [], [0.1, 1.1], [-0.1, 0.2], [0.1, math.nan]):
        with pytest.raises(ValueError):
            upper_bound(bad, 1.0)
    with pytest.raises(ValueError):
        upper_bound([0.1, 0.2], 1.0, 1.0)


def test_smoothed_divergence_is_bounded_and_near(generator: torch.Generator) -> None:
    p, q = (8 * torch.randn(50, 31, generator=generator) for _ in range(2))
    q[0] = -1e4 * torch.arange(31)  # all but one token have no probability left
    p[0] = q[0].flip(0)
    kl, smoothed = kl_divergence(p, q), kl_divergence(p, q, smoothing=SMOOTHING)
    pp, qq = p.double().softmax(-1), (1 - SMOOTHING) * q.double().softmax(-1) + SMOOTHING / 31
    expected = (pp * (pp / qq).clamp_min(1e-300).log()).sum(-1)
    # float32 sums over 31 tokens
    torch.testing.assert_close(smoothed.double(), expected, rtol=1e-4, atol=1e-5)
    assert smoothed.max() <= math.log(31 / SMOOTHING) + 1e-5 < kl[0]
    assert bool((smoothed <= kl - math.log(1 - SMOOTHING) + 1e-5).all())


def test_certificate_of_windows() -> None:
    measured = {"smoothed_kl": [0.1, 0.3, 0.2], "smoothed_excess": [0.2, -0.1, 0.3], "top1": [0.9, 0.8, 1.0]}
    found = certify(measured, 100)
    assert found is not None and found.windows == 3
    assert found.kl == pytest.approx(0.2) and found.disagreement == pytest.approx(0.1)
    assert found.ratio == pytest.approx(math.exp(0.5 / 3))  # the window on which the model is better counts as equal
    assert found.range == pytest.approx(math.log(100 / SMOOTHING)) and found.kl_bound == found.range
    assert found.ratio_bound == pytest.approx(100 / SMOOTHING) and found.disagreement_bound == 1
    assert found.lag1 == pytest.approx(-0.5)
    many = certify({k: v * 2000 for k, v in measured.items()}, 100)
    assert many is not None and found.kl < many.kl_bound < 0.25 and many.ratio < many.ratio_bound < 1.3


def test_no_certificate_from_one_window_or_nan() -> None:
    one = {"smoothed_kl": [0.1], "smoothed_excess": [0.1], "top1": [1.0]}
    assert certify(one, 10) is None
    assert certify({"smoothed_kl": [0.1, math.nan], "smoothed_excess": [0.1, 0.1], "top1": [1.0, 1.0]}, 10) is None
    flat = certify({k: v * 2 for k, v in one.items()}, 10)
    assert flat is not None and flat.lag1 is None
