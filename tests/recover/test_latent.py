"""Latents: the packed matrix to the bit at first, gradients straight through the rounding, what is exported is what was used."""

from __future__ import annotations

import pytest
import torch

from lplr.factor import factorize
from lplr.factor.factorization import rotated
from lplr.recipe import FactorSpec, QuantSpec
from lplr.recover import Latent
from lplr.recover import latent as latent_module
from lplr.recover.latent import Applied

SPECS = {
    "ldlq trellis": FactorSpec(method="ldlq", bits_per_weight=1.2),
    "ldlq uniform": FactorSpec(method="ldlq", bits_per_weight=2.3, grid="uniform"),
    "ldlq lattice": FactorSpec(method="ldlq", bits_per_weight=2.6, grid="lattice"),
    "naive normal_float": FactorSpec(method="naive", bits_per_weight=4.9, grid="normal_float"),
    "lplr": FactorSpec(method="lplr", bits_per_weight=3.0),
    "double_binary": FactorSpec(method="double_binary", bits_per_weight=2.6),
    "caldera": FactorSpec(method="caldera", rank=4, q=QuantSpec(grid="trellis", bits=1.5), bits_per_weight=4.0),
}


def factorization(name: str, n: int = 48, d: int = 40):
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(n, d, generator=generator)
    return factorize(W, SPECS[name], generator=generator)


def formed(latent: Latent) -> torch.Tensor:
    """W, float32, from the tensors of a latent: P (Q + L R) O^T, every product written out."""
    tensors, dense = latent.tensors(), {}
    for name in ("q", "l", "r"):
        if name in tensors:
            one = torch.ones(1)
            row, col = (tensors.get(f"{name}_{scale}", one) for scale in ("row_scale", "col_scale"))
            dense[name] = row[:, None] * tensors[name].float() * col
    out = dense.get("q", 0) + (dense["l"] @ dense["r"] if "l" in dense else 0)
    return rotated(out, *latent.rotations, inverse=True)


@pytest.mark.parametrize("name", SPECS)
def test_a_latent_begins_as_the_matrix_that_was_packed(name):
    f = factorization(name)
    latent = Latent(f)
    # the order of three float32 products differs, nothing else
    torch.testing.assert_close(formed(latent), f.dequantize(), rtol=1e-5, atol=1e-5)
    again = latent.factorization()
    assert again.format == f.format
    assert torch.equal(again.dequantize(), f.dequantize())


@pytest.mark.parametrize("name", SPECS)
def test_what_is_packed_is_what_was_multiplied_with(name):
    latent = Latent(factorization(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*latent.codes(), *latent.scales()]:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    torch.testing.assert_close(formed(latent).detach(), latent.factorization().dequantize(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["ldlq trellis", "ldlq uniform", "naive normal_float"])
def test_gradients_pass_the_rounding_as_if_it_were_not_there(name):
    """d<G, W>/dX = scale times the rotated G, by hand in float64."""
    f = factorization(name)
    latent = Latent(f)
    G = torch.randn(f.shape, generator=torch.Generator().manual_seed(2))
    (formed(latent) * G).sum().backward()
    assert f.q is not None and f.q.row_scale is not None
    turned = f.rotated(G.double())
    torch.testing.assert_close(latent.points["q"].grad.double(), turned * f.q.row_scale.double()[:, None], rtol=1e-4, atol=1e-5)
    # d/dlog(scale) = sum of the rotated G times Q
    wanted = (turned * f.q.dequantize(torch.float64)).sum(1)
    wanted = wanted if f.q.row_scale.numel() > 1 else wanted.sum().view(1)
    torch.testing.assert_close(latent.gains["q_row_scale"].grad.double(), wanted, rtol=1e-3, atol=1e-3)


def test_factors_get_gradients_of_the_product():
    f = factorization("lplr")
    latent = Latent(f)
    G = torch.randn(f.shape, generator=torch.Generator().manual_seed(2))
    (formed(latent) * G).sum().backward()
    assert f.l is not None and f.r is not None
    L, R = f.l.dequantize(torch.float64), f.r.dequantize(torch.float64)
    assert f.r.row_scale is not None
    torch.testing.assert_close(latent.points["l"].grad.double(), G.double() @ R.T, rtol=1e-4, atol=1e-4)
    wanted = (L.T @ G.double()) * f.r.row_scale.double()[:, None]
    torch.testing.assert_close(latent.points["r"].grad.double(), wanted, rtol=1e-4, atol=1e-4)


def test_fixed_codes_have_scales_alone():
    f = factorization("ldlq trellis")
    latent = Latent(f, fixed=torch.float32)
    assert latent.codes() == [] and len(latent.scales()) == 1
    with torch.no_grad():
        latent.scales()[0] += 0.1
    made = latent.factorization()
    assert made.q is not None and f.q is not None
    assert torch.equal(made.q.codes, f.q.codes)
    # bfloat16 scales have eight bits
    ratio = float(made.q.row_scale.float()[0] / f.q.row_scale.float()[0])
    assert ratio == pytest.approx(2.718281828**0.1, rel=2**-8)


def test_fixed_parts_stand_in_the_bases_of_the_layer_where_one_scale_lets_them():
    for name in SPECS:
        f = factorization(name)
        latent = Latent(f, fixed=torch.bfloat16)
        scales = [s for part in (f.q, f.l, f.r) if part is not None for s in (part.row_scale, part.col_scale) if s is not None]
        single = all(s.numel() == 1 for s in scales)
        assert latent.rotations == ((0, 0) if single else (f.rotation, f.output_rotation))
        # eight bits of a rotated entry where it stands in bfloat16: 2^-9 at most, and no error of them is like another's
        assert torch.linalg.vector_norm(formed(latent) - f.dequantize()) <= 2**-9 * torch.linalg.vector_norm(f.dequantize())
        assert torch.equal(latent.factorization().dequantize(), f.dequantize())


@pytest.mark.parametrize("fixed", [None, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_applied_is_the_product_with_the_matrix(name, bias, fixed):
    """y, and the gradients of x, latents and scales, are those of x W^T + b with W formed; float32 sums in another order."""
    latent = Latent(factorization(name), fixed=fixed)
    n, d = latent.made.shape
    generator = torch.Generator().manual_seed(5)
    x, b, dy = (torch.randn(*shape, generator=generator) for shape in ((2, 3, d), (n,), (2, 3, n)))
    x.requires_grad_()
    tensors = latent.tensors() | ({"bias": b} if bias else {})
    y = torch.func.functional_call(Applied(latent, bias=bias), tensors, (x,))
    leaves = [x, *latent.codes(), *latent.scales()]
    found = torch.autograd.grad(y, leaves, dy)
    want = x @ formed(latent).T + (b if bias else 0)
    wanted = torch.autograd.grad(want, leaves, dy)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    for a, c in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-3 * float(c.abs().max()))


def test_rounding_is_done_again_when_a_latent_has_moved_and_only_then(monkeypatch):
    calls = []
    original = latent_module.nearest_of
    monkeypatch.setattr(latent_module, "nearest_of", lambda *args: calls.append(1) or original(*args))
    latent = Latent(factorization("ldlq trellis"))
    latent.tensors(), latent.factorization(), latent.tensors()
    assert len(calls) == 1
    with torch.no_grad():
        latent.codes()[0].add_(torch.randn(latent.codes()[0].shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(formed(latent).detach(), latent.factorization().dequantize(), rtol=1e-5, atol=1e-4)
    assert len(calls) == 2


def test_a_zero_matrix_stays_zero():
    f = factorize(torch.zeros(16, 16), SPECS["ldlq trellis"], generator=torch.Generator().manual_seed(0))
    latent = Latent(f)
    (formed(latent) ** 2).sum().backward()
    with torch.no_grad():
        for p in [*latent.codes(), *latent.scales()]:
            assert bool(torch.isfinite(p.grad).all())
            p -= p.grad
    assert not formed(latent).any()
