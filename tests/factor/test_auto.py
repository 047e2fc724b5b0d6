"""`auto` with several methods: within the budget, no worse than any of them, each in its own bases, and its bound still holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lplr.errors import RecipeError
from lplr.factor import Factorization, error_bound, factorize, layout, plan
from lplr.factor.certificates import certify
from lplr.factor.curves import CURVED
from lplr.factor.rank import BACKBONE_FROM, FACTORS_BELOW, exchanges, made_by
from lplr.kernels.hadamard import rotate, rotation_signs
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.recipe import FactorSpec, QuantSpec

sizes = st.integers(3, 70)
low = st.floats(0.15, 1.7)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(n: int, d: int, decay: float, calibrated: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix whose singular values fall like i^-decay, and second moments of which a few directions carry most."""
    g = seeded(seed)
    U, V = (torch.linalg.qr(torch.randn(size, min(n, d), generator=g))[0] for size in (n, d))
    W = (U * torch.arange(1, min(n, d) + 1) ** -decay) @ V.T
    X = torch.randn(3 * d, d, generator=g) * torch.logspace(0, -1, d) @ torch.randn(d, d, generator=g)
    return W, X.T @ X / len(X) if calibrated else None


def error(W: torch.Tensor, f: Factorization, H: torch.Tensor | None) -> float:
    """||E C||_F of what is decoded, in the basis of W."""
    E = W.double() - f.dequantize(torch.float64)
    return float((E if H is None else E @ cholesky_factor(damped(H)).double()).norm())


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, low, st.floats(0, 2), st.booleans(), st.integers(0, 2))
def test_within_the_budget_and_no_worse_than_each_alone(
    n: int, d: int, bits: float, decay: float, calibrated: bool, alternations: int
) -> None:
    W, H = case(n, d, decay, calibrated)
    spec = FactorSpec(bits_per_weight=bits, alternations=alternations)
    plans = exchanges((n, d), spec)
    assume(plans[0].rank or plans[0].q is not None)
    f = factorize(W, spec, H=H, generator=seeded(1))
    assert f.stored_bits() <= layout((n, d), plans[0]).stored_bits() <= bits * n * d
    g = seeded(1)  # drawn from in the same order
    alone = [factorize(W, planned, H=H, generator=g) for planned in plans]
    errors = [error(W, each, H) for each in alone]
    # chosen by norms in float32, of sums of at most 70 products
    assert error(W, f, H) <= min(errors) * (1 + 1e-5)
    assert any(f.format == each.format and f.dequantize().equal(each.dequantize()) for each in alone)
    assert made_by((n, d), spec, f.format) in [planned.method for planned in plans]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.02, 4))
def test_plans_take_no_more_than_the_first(n: int, d: int, bits: float) -> None:
    for method in ("auto", "caldera"):
        spec = FactorSpec(method=method, bits_per_weight=bits)
        plans = exchanges((n, d), spec)
        assert plans[0] == plan((n, d), spec)
        most = layout((n, d), plans[0]).stored_bits()
        assert most <= bits * n * d or not (plans[0].rank or plans[0].q)
        for planned in plans:
            fmt = layout((n, d), planned)
            assert fmt.stored_bits() <= most and exchanges((n, d), planned) == [planned]
            assert made_by((n, d), spec, fmt) == planned.method


@pytest.mark.parametrize(
    ("bits", "more", "methods"),
    [
        (2.0, {}, ["ldlq"]),
        (FACTORS_BELOW, {}, ["ldlq"]),
        (1.0, {}, ["ldlq", "double_binary"]),
        (BACKBONE_FROM, {"grid": "uniform"}, ["ldlq", "double_binary"]),
        (0.4, {}, ["double_binary", "lplr", "ldlq"]),
        (1.0, {"grid": "lattice"}, ["ldlq"]),
        (1.0, {"rounding": "stochastic"}, ["ldlq"]),
        (1.0, {"l": QuantSpec(bits=2)}, ["ldlq"]),
        (0.4, {"l": QuantSpec(bits=2)}, ["lplr"]),
        (0.4, {"rounding": "stochastic"}, ["lplr"]),
        (1.0, {"rank": 3}, ["lplr"]),
        (0.4, {"q": QuantSpec(bits=1, ranges="tensor")}, ["ldlq"]),
        (1.0, {"rank": 3, "q": QuantSpec(bits=1, ranges="tensor")}, ["caldera"]),
    ],
)
def test_what_is_tried(bits: float, more: dict[str, object], methods: list[str]) -> None:
    plans = exchanges((256, 192), FactorSpec(bits_per_weight=bits, **more))  # type: ignore[arg-type]
    assert [planned.method for planned in plans] == methods


def test_a_budget_to_be_allocated_starts_from_a_backbone() -> None:
    for bits in (BACKBONE_FROM, 1, 2, 4):
        assert plan((576, 576), FactorSpec(bits_per_weight=bits)).method in CURVED


def test_lplr_where_the_scales_of_double_binary_do_not_fit() -> None:
    """64 x 64 at 0.5 bits: 2048 bits, of which three scales take 16 (64 + 64 + r)."""
    shape, spec = (64, 64), FactorSpec(bits_per_weight=0.5)
    assert not plan(shape, spec.model_copy(update={"method": "double_binary"})).rank
    assert [planned.method for planned in exchanges(shape, spec)] == ["lplr", "ldlq"]


def test_nothing_fits() -> None:
    """A backbone is tried beside factors below BACKBONE_FROM, never in place of them: allocation could not give it its bits."""
    for shape, bits in (((16, 16), 0.4), ((576, 576), 0.001)):
        spec = FactorSpec(bits_per_weight=bits)
        assert [(planned.rank, planned.q) for planned in exchanges(shape, spec)] == [(0, None)]
        with pytest.raises(RecipeError, match=f"fits {bits} bits"):
            factorize(torch.ones(shape), spec, generator=seeded())


@pytest.mark.parametrize("calibrated", [False, True])
def test_each_side_wins_where_it_should_and_stands_in_its_own_bases(calibrated: bool) -> None:
    """A matrix of low rank wants factors, as W stands; a flat one the rotated backbone."""
    made = {}
    for decay in (3.0, 0.0):
        W, H = case(96, 128, decay, calibrated)
        spec = FactorSpec(bits_per_weight=1.2, alternations=2)
        f = factorize(W, spec, H=H, generator=seeded(1))
        made[decay] = made_by((96, 128), spec, f.format)
        again = Factorization.from_tensors(f.format, f.tensors())
        # P (Q + L R) O^T from the parts and the seeds of the plan that was taken, by hand
        inside = f.q.dequantize() if f.q is not None else f.l.dequantize() @ f.r.dequantize()  # type: ignore[union-attr]
        by_hand = inside
        if f.rotation:
            by_hand = rotate(by_hand, rotation_signs(f.rotation, 128), inverse=True)
        if f.output_rotation:
            by_hand = rotate(by_hand.T, rotation_signs(f.output_rotation, 96), inverse=True).T
        torch.testing.assert_close(again.dequantize(), by_hand)
        chosen = next(p for p in exchanges((96, 128), spec) if p.method == made[decay])
        assert (f.rotation, f.output_rotation) == (chosen.rotation, chosen.output_rotation)
        assert (f.rotation > 0) == (made[decay] == "ldlq")
        assert error(W, f, H) < 0.8 * error(W, _zeroed(f), H)
    assert made == {3.0: "double_binary", 0.0: "ldlq"}


def _zeroed(f: Factorization) -> Factorization:
    return Factorization(f.l, None if f.r is None else f.r.zeroed(), None if f.q is None else f.q.zeroed())


@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_scale_and_zero(exponent: int) -> None:
    W, _ = case(40, 48, 3.0, False)
    spec = FactorSpec(bits_per_weight=1.2, alternations=1)
    plain, scaled = (factorize(X, spec, generator=seeded(1)) for X in (W, W * 2.0**exponent))
    torch.testing.assert_close(scaled.dequantize(torch.float64), plain.dequantize(torch.float64) * 2.0**exponent, rtol=0, atol=0)
    nothing = factorize(torch.zeros(40, 48), spec, generator=seeded(1))
    assert not nothing.dequantize().any()
    assert made_by((40, 48), spec, nothing.format) == plan((40, 48), spec).method  # the first of equals


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, low, st.floats(0, 2), st.booleans(), st.integers(0, 1), st.sampled_from([None, "uniform"]))
def test_the_bound_of_the_first_plan_holds_for_what_is_taken(
    n: int, d: int, bits: float, decay: float, calibrated: bool, alternations: int, grid: str | None
) -> None:
    W, H = case(n, d, decay, calibrated)
    spec = FactorSpec(bits_per_weight=bits, alternations=alternations, grid=grid)  # type: ignore[arg-type]
    first = plan((n, d), spec)
    assume(first.rank or first.q is not None)
    f = factorize(W, spec, H=H, generator=seeded(2))
    for asked in (spec, first):  # the driver hands over the plan
        bound = error_bound(W, asked, H=H)
        if bound.holds == "certain":
            assert error(W, f, H) <= bound.rms  # type: ignore[operator]
        facts = certify(W, f, asked, H, seeded(3))
        assert facts["error"] <= facts["certificate"]
        if bound.holds == "certain" and facts["bound"] is not None:
            assert facts["error"] <= facts["bound"]
    if first.method in ("ldlq", "double_binary"):
        assert bound.holds == "certain"
