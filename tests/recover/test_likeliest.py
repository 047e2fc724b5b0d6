"""The divergence on the likeliest tokens: against the whole divergence in float64, and by pieces against at once."""

from __future__ import annotations

import pytest
import torch

from lplr.recover import distill
from lplr.recover.distill import Likeliest, divergence, taught


def both(v: int = 40, t: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(t, v, generator=generator), 3 * torch.randn(t, v, generator=generator)


def full(base: torch.Tensor, model: torch.Tensor) -> float:
    p, q = base.double().log_softmax(-1), model.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def test_all_tokens_give_the_divergence_itself():
    base, model = both()
    assert float(divergence(model, Likeliest.of(base, 40))) == pytest.approx(full(base, model), rel=1e-5)
    assert float(divergence(model, Likeliest.of(base, 999))) == pytest.approx(full(base, model), rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 39])
def test_fewer_tokens_give_the_divergence_with_the_rest_as_one(k):
    base, model = both(seed=k)
    told = Likeliest.of(base, k)
    p, q = base.double().softmax(-1), model.double().softmax(-1)
    total = 0.0
    for i in range(len(p)):
        top = set(p[i].topk(k).indices.tolist())
        assert set(told.index[i].tolist()) == top
        rest = [j for j in range(p.shape[1]) if j not in top]
        groups = [(float(p[i, j]), float(q[i, j])) for j in top] + [(float(p[i, rest].sum()), float(q[i, rest].sum()))]
        total += sum(a * float(torch.tensor(a / b).log()) for a, b in groups)
    found = float(divergence(model, told))
    assert found == pytest.approx(total, rel=1e-4)
    assert found <= full(base, model) + 1e-5  # the data processing inequality
    assert float(divergence(base, told)) == pytest.approx(0.0, abs=1e-5)


def test_pieces_give_the_same_value_and_gradients(monkeypatch):
    monkeypatch.setattr(distill, "TOKENS_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 10, 8, generator=generator, requires_grad=True)
    head = torch.randn(40, 8, generator=generator, requires_grad=True)
    told = Likeliest.of(torch.randn(2, 10, 40, generator=generator), 5)
    value = taught(hidden, lambda x: x @ head.T, told)
    found = torch.autograd.grad(value, (hidden, head))
    whole = divergence(hidden @ head.T, told) / 20
    wanted = torch.autograd.grad(whole, (hidden, head))
    assert float(value.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_certain_distributions_give_finite_gradients():
    logits = torch.zeros(3, 10)
    logits[:, 2] = 200.0
    model = torch.zeros(3, 10, requires_grad=True)
    (gradient,) = torch.autograd.grad(divergence(model, Likeliest.of(logits, 4)), model)
    assert bool(torch.isfinite(gradient).all())
    (gradient,) = torch.autograd.grad(divergence(logits.requires_grad_(), Likeliest.of(torch.zeros(3, 10), 4)), logits)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("k", [1, 3, 11, 12])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_gradient_is_that_of_the_formula(k, scale):
    """Against autograd on the formula of the module's docstring, in float64; one token's rest is below SMALLEST at scale 30."""
    generator = torch.Generator().manual_seed(k)
    base, z = (scale * torch.randn(7, 12, generator=generator) for _ in range(2))
    told = Likeliest.of(base, k)
    wide = z.double().requires_grad_()
    p, log_q = told.log_p.double(), wide.log_softmax(-1).gather(-1, told.index.long())
    want = (p.exp() * (p - log_q)).sum()
    if k < 12:
        # from the float32 numbers that the code has: 1 - sum p is all rounding where the rest is tiny
        left_p = (1 - told.log_p.exp().sum(-1)).clamp_min(distill.SMALLEST).double()
        left_q = (1 - log_q.exp().sum(-1)).clamp_min(distill.SMALLEST)
        want = want + (left_p * (left_p.log() - left_q.log())).sum()
    (wanted,) = torch.autograd.grad(want, wide)
    narrow = z.clone().requires_grad_()
    value = divergence(narrow, told)
    (found,) = torch.autograd.grad(2 * value, narrow)
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    # 1e-7 of float32 over a rest of 1e-6 at least
    torch.testing.assert_close(found.double(), 2 * wanted, rtol=1e-3, atol=1e-2 if scale > 1 else 1e-5)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_large_logits_cost_no_digits(offset):
    """Failed once: the rest q' was 1e-6 to 1e-5 here, and lost in a log-sum-exp that was rounded beside logits of this size."""
    generator = torch.Generator().manual_seed(3)
    base, z = (torch.randn(200, 64, generator=generator) for _ in range(2))
    base[:, 0] += 5.0
    z[:, 0] += 14.0
    told = Likeliest.of(base, 8)
    z = (z + offset).requires_grad_()
    (found,) = torch.autograd.grad(divergence(z, told), z)
    wide = z.detach().double().requires_grad_()
    log_q = wide.log_softmax(-1).gather(-1, told.index.long())
    p, p_left = told.log_p.double(), (1 - told.log_p.exp().sum(-1)).double()
    left = 1 - log_q.exp().sum(-1)
    assert float(left.detach().min()) > distill.SMALLEST
    (wanted,) = torch.autograd.grad((p.exp() * (p - log_q)).sum() + (p_left * (p_left.log() - left.log())).sum(), wide)
    # 1 - sum q has an error of 1e-7 of float32, its rest is 2e-6 at least: p'/q' is good to a few per cent
    torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=1e-4)
