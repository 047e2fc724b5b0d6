"""The exchange of bits between Q and L R: no worse than Q alone, better where there is a low-rank part, within the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.errors import RecipeError
from lplr.factor import factorize, layout, plan
from lplr.factor.rank import exchanges
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.recipe import WIDTHS, FactorSpec, QuantSpec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(W: torch.Tensor, spec: FactorSpec, H: torch.Tensor | None) -> float:
    f = factorize(W, spec, H=H, generator=seeded(1))
    assert f.stored_bits() <= (spec.bits_per_weight or 0) * W.numel()
    E = W.double() - f.dequantize(torch.float64)
    return float((E if H is None else E @ cholesky_factor(damped(H)).double()).norm())


@pytest.mark.parametrize("grid", [None, *WIDTHS])
@pytest.mark.parametrize("bits", [1.3, 2.2, 4.7])
@pytest.mark.parametrize("spikes", [0, 3])
def test_never_worse_than_q_alone(grid: str | None, bits: float, spikes: int) -> None:
    g = seeded(2)
    W = torch.randn(48, 72, generator=g)
    W += 4 * torch.randn(48, spikes, generator=g) @ torch.randn(spikes, 72, generator=g)
    X = torch.randn(300, 72, generator=g) * torch.logspace(0, -1, 72)
    for H in (None, X.T @ X / 300):
        common = {"bits_per_weight": bits, "grid": grid, "alternations": 1, "power_iterations": 1}
        free, alone = (error(W, FactorSpec(method=m, **common), H) for m in ("caldera", "ldlq"))  # type: ignore[arg-type]
        assert free <= alone * (1 + 1e-6)  # chosen by float32 norms
        if spikes and grid is None and bits > 2:
            assert free < 0.9 * alone


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.05, 16), st.sampled_from([None, *WIDTHS]))
def test_every_plan_keeps_to_the_budget(n: int, d: int, budget: float, grid: str | None) -> None:
    spec = FactorSpec(method="caldera", bits_per_weight=budget, grid=grid)  # type: ignore[arg-type]
    plans = exchanges((n, d), spec)
    assert plans[0] == plan((n, d), spec)
    for planned in plans:
        if planned.rank or planned.q is not None:
            assert layout((n, d), planned).stored_bits() <= budget * n * d
        assert exchanges((n, d), planned) == [planned]  # a plan is planned


def test_a_rank_or_a_backbone_that_is_given_is_obeyed() -> None:
    W, q = torch.randn(40, 40, generator=seeded(3)), QuantSpec(bits=2, ranges="row")
    for more in ({"rank": 3}, {"q": q}, {"q": q, "rank": 2}):
        spec = FactorSpec(method="caldera", bits_per_weight=4.5, **more)  # type: ignore[arg-type]
        f = factorize(W, spec, generator=seeded())
        assert len(exchanges((40, 40), spec)) == 1 and f.format == layout((40, 40), plan((40, 40), spec))
        assert f.stored_bits() <= 4.5 * 1600
        assert "rank" not in more or f.rank == more["rank"]
        assert "q" not in more or (f.format.q_bits, f.format.q_grid) == (2, "uniform")


def test_stochastic_rounding_of_a_backbone_with_narrow_columns_is_refused() -> None:
    q = QuantSpec(bits=2, ranges="row", rounding="stochastic", clip="max")
    with pytest.raises(RecipeError, match="3 narrow columns to nearest only"):
        factorize(torch.ones(9, 9), FactorSpec(method="caldera", rank=1, q=q, q_narrow=3), generator=seeded())
