"""Plans from shapes and budgets: never above the budget, and the next rank would be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lplr.errors import RecipeError
from lplr.factor import factorize, layout, plan
from lplr.factor.methods import METHODS
from lplr.factor.rank import largest_rank
from lplr.recipe import FactorSpec, QuantSpec

sides = st.one_of(st.integers(1, 40), st.integers(41, 12000))
quants = st.one_of(
    st.none(), st.builds(QuantSpec, bits=st.integers(1, 8), ranges=st.sampled_from(["tensor", "row", "rank", "both"]))
)


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.floats(0.01, 16), st.sampled_from([*METHODS, "auto"]), quants, quants)
def test_never_above_the_budget(
    n: int, d: int, budget: float, method: str, left: QuantSpec | None, right: QuantSpec | None
) -> None:
    spec = plan((n, d), FactorSpec(method=method, bits_per_weight=budget, l=left, r=right))
    assert spec.method in METHODS and spec.rank is not None and 0 <= spec.rank <= min(n, d)
    if not spec.rank and spec.q is None:
        assert method != "naive" or n * ((d + 7) // 8 * 8 + 16) > budget * n * d
        return
    fmt = layout((n, d), spec)
    assert fmt.stored_bits() <= budget * n * d and fmt.bits_per_weight <= budget
    assert plan((n, d), spec) == spec  # a plan is planned
    if spec.method in ("lplr", "lplr_svd", "direct_svd") and spec.rank < min(n, d):
        wider = layout((n, d), spec.model_copy(update={"rank": spec.rank + 1}))
        assert wider.stored_bits() > budget * n * d


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.floats(0.3, 14), st.sampled_from([*METHODS, "auto"]), st.booleans())
def test_plan_is_what_factorize_makes(n: int, d: int, budget: float, method: str, stochastic: bool) -> None:
    rounding = "stochastic" if stochastic else "nearest"
    spec = plan((n, d), FactorSpec(method=method, bits_per_weight=budget, rounding=rounding))  # type: ignore[arg-type]
    assume(spec.rank or spec.q is not None)
    W = torch.randn(n, d, generator=torch.Generator().manual_seed(n * d))
    f = factorize(W, spec, generator=torch.Generator().manual_seed(1))
    assert f.format == layout((n, d), spec)
    assert f.stored_bits() <= budget * n * d


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.5, 8))
def test_ldlq_fills_the_budget(n: int, d: int, budget: float) -> None:
    spec = plan((n, d), FactorSpec(method="ldlq", bits_per_weight=budget))
    assume(spec.q is not None and spec.q_narrow)
    assert spec.q is not None
    wider = layout((n, d), spec.model_copy(update={"q_narrow": spec.q_narrow - 1}))
    assert wider.stored_bits() > budget * n * d


def test_by_hand() -> None:
    """16 x 24 at 2 bits: 768 bits.  Rank r costs 16 * 8 ceil(2 r / 8) + r (48 + 16): 4 -> 128 + 256, 8 -> 256 + 512."""
    quant = QuantSpec(bits=2)
    spec = FactorSpec(method="lplr", bits_per_weight=2.0, l=quant, r=quant)
    assert largest_rank((16, 24), spec) == 8
    assert layout((16, 24), plan((16, 24), spec)).stored_bits() == 768
    assert plan((16, 24), spec.model_copy(update={"bits_per_weight": 1.999})).rank == 7
    assert plan((16, 24), FactorSpec(method="lplr", rank=99)).rank == 16


def test_scales_are_counted_where_they_are_stored() -> None:
    costs = {"tensor": 16, "row": 16 * (10 + 7), "rank": 16 * 3, "both": 16 * (10 + 3 + 7)}
    for ranges, cost in costs.items():
        quant = QuantSpec(bits=8, ranges=ranges)  # type: ignore[arg-type]
        fmt = layout((10, 7), plan((10, 7), FactorSpec(method="lplr", rank=3, l=quant, r=quant)))
        assert fmt.stored_bits() - 8 * (30 + 21) == cost


def test_neither_budget_nor_rank() -> None:
    with pytest.raises(RecipeError, match="bits_per_weight or a rank"):
        plan((4, 4), FactorSpec(method="lplr"))
