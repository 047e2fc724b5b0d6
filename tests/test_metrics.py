"""lplr.metrics against float64 oracles, extreme logits and torch's own cross entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lplr import metrics
from lplr.metrics import kl_divergence, perplexity, token_nll, top1_agreement


def nll_oracle(logits: Tensor, targets: Tensor) -> Tensor:
    """log sum_i exp(x_i - x_t), in float64, row by row."""
    flat, t = logits.double().reshape(-1, logits.shape[-1]), targets.reshape(-1)
    rows = [torch.logsumexp(row - row[k], dim=0) for row, k in zip(flat, t, strict=True)]
    return torch.stack(rows).reshape(targets.shape)


def kl_oracle(base: Tensor, other: Tensor) -> Tensor:
    """sum_i p_i log(p_i / q_i) in float64 by torch.distributions."""
    kl = torch.distributions.kl_divergence
    categorical = torch.distributions.Categorical
    return kl(categorical(logits=base.double()), categorical(logits=other.double()))


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 7, 11), (2, 5, 1), (1, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_nll_matches_float64(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(shape, generator=generator)).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    found = token_nll(logits, targets)
    assert found.dtype == torch.float32 and found.shape == targets.shape
    if targets.numel():
        # float32 sums of at most 11 terms of logits below 30: a few units of 30 * 2^-24
        torch.testing.assert_close(found.double(), nll_oracle(logits, targets), atol=1e-5, rtol=1e-5)


def test_chunks_cover_every_row(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = (torch.randn(2, 13, 9, generator=generator) for _ in range(2))
    targets = torch.randint(9, (2, 13), generator=generator)
    whole = token_nll(base, targets), kl_divergence(base, other)
    kept = base.clone(), other.clone()
    for elements in (1, 9, 40, 9 * 13):
        monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", elements)
        torch.testing.assert_close((token_nll(base, targets), kl_divergence(base, other)), whole)
    assert torch.equal(base, kept[0]) and torch.equal(other, kept[1])  # the inputs are read only


def test_large_logits_keep_their_digits() -> None:
    logits = torch.tensor([[10000.0, 9999.0], [-1e30, 1e30], [3e38, -3e38]])
    found = token_nll(logits, torch.tensor([1, 1, 0]))
    assert found[0].item() == pytest.approx(math.log(1 + math.e), rel=1e-6)
    assert found[1:].tolist() == [0.0, 0.0]


def test_minus_infinity_is_probability_zero() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, 0.0], [0.0, -inf, 0.0], [-inf, -inf, -inf]])
    found = token_nll(logits, torch.tensor([0, 1, 0]))
    assert found[0].item() == pytest.approx(math.log(2)) and found[1].item() == inf and found[2].isnan()
    other = torch.tensor([[1.0, -inf, 0.0], [0.0, -inf, -inf], [0.0, 0.0, 0.0]])
    kl = kl_divergence(logits, other)
    p = 1 / (1 + math.exp(-1))  # q of the first token; both p are one half
    assert kl[0].item() == pytest.approx(-math.log(2) - 0.5 * math.log(p) - 0.5 * math.log(1 - p), rel=1e-5)
    assert kl[1].item() == inf and kl[2].isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_told_not_hidden(bad: float) -> None:
    good = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    logits = good.clone()
    logits[0, 0] = bad
    targets = torch.tensor([0, 0])
    assert token_nll(logits, targets).isnan().tolist() == [True, False]
    assert kl_divergence(good, logits).isnan().tolist() == [True, False]
    assert kl_divergence(logits, good).isnan().tolist() == [True, False]
    assert top1_agreement(logits, logits).tolist() == [not math.isnan(bad), True]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_kl_divergence_matches_float64(generator: torch.Generator, scale: float) -> None:
    base, other = (scale * torch.randn(3, 4, 17, generator=generator) for _ in range(2))
    found = kl_divergence(base, other)
    # log-probabilities up to 30 * 10 carry an absolute error of 300 * 2^-24; at 1e-3 the sum of order 1e-6 cancels
    torch.testing.assert_close(found.double(), kl_oracle(base, other), atol=2e-7, rtol=2e-5)
    assert (found >= 0).all()


def test_kl_divergence_of_equal_models_is_zero(generator: torch.Generator) -> None:
    logits = torch.randn(5, 1000, generator=generator)
    assert kl_divergence(logits, logits.clone()).abs().max() == 0
    # adding a constant changes no probability; float32 keeps it within rounding
    assert kl_divergence(logits, logits + 7).max() < 1e-6


def test_kl_divergence_has_a_direction() -> None:
    sharp, flat = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_divergence(sharp, flat).item() == pytest.approx(kl_oracle(sharp, flat).item(), rel=1e-5)
    assert kl_divergence(sharp, flat).item() != pytest.approx(kl_divergence(flat, sharp).item(), rel=0.1)


def test_top1_agreement_counts_equal_winners() -> None:
    base = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0], [0.0, 3.0, 2.0]])
    other = torch.tensor([[0.0, 1.0, 9.0], [1.0, 5.0, 2.0], [0.0, 3.0, -math.inf]])
    assert top1_agreement(base, other).tolist() == [True, False, True]


def test_perplexity_of_uniform_is_the_vocabulary() -> None:
    nll = token_nll(torch.zeros(6, 50), torch.arange(6))
    assert perplexity(nll.double().sum().item(), 6) == pytest.approx(50, rel=1e-6)
    assert perplexity(0.0, 3) == 1.0
    assert perplexity(1e9, 3) == math.inf and perplexity(math.inf, 3) == math.inf
    assert math.isnan(perplexity(math.nan, 3))


def test_misuse_is_an_exception() -> None:
    with pytest.raises(ValueError, match="at least one"):
        perplexity(1.0, 0)
    with pytest.raises(ValueError, match="do not fit"):
        token_nll(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    for function in (kl_divergence, top1_agreement):
        with pytest.raises(ValueError, match="one vocabulary"):
            function(torch.zeros(2, 3), torch.zeros(2, 4))
