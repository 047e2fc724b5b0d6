"""Singular values against numpy, by both routes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from lplr.factor import optimal_error, spectrum
from lplr.factor.spectrum import EXACT_UP_TO


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (1, 5), (5, 1), (6, 6)])
def test_small(shape: tuple[int, int], generator: torch.Generator) -> None:
    W = torch.randn(*shape, generator=generator)
    found = spectrum(W)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), np.linalg.svd(W.double().numpy(), compute_uv=False), rtol=1e-12)


@pytest.mark.parametrize("shape", [(90, 40), (40, 90)])
def test_gram_route(shape: tuple[int, int], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lplr.factor.spectrum"]
    monkeypatch.setattr(module, "EXACT_UP_TO", 8)
    monkeypatch.setattr(module, "_BLOCK", 1000)
    W = torch.randn(*shape, generator=generator)
    W[:, 3] = W[:, 4]
    exact = np.linalg.svd(W.double().numpy(), compute_uv=False)
    found = spectrum(W)
    assert EXACT_UP_TO == 256 and found.shape == (40,)
    np.testing.assert_allclose(found.numpy() ** 2, exact**2, atol=1e-13 * exact[0] ** 2)
    assert bool((found[:-1] >= found[1:]).all()) and float(found[-1]) >= 0


def test_optimal_error(generator: torch.Generator) -> None:
    W = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    for rank in range(10):
        truncated = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        assert optimal_error(spectrum(W), rank) == pytest.approx(float((W - truncated).norm()), abs=1e-12)
