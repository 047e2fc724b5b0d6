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
from lplr.recipe import LOW_RANK, WIDTHS, FactorSpec, Grid, QuantSpec

grids = st.sampled_from([None, *WIDTHS])
sides = st.one_of(st.integers(1, 40), st.integers(41, 12000))
quants = st.one_of(
    st.none(), st.builds(QuantSpec, bits=st.integers(1, 8), ranges=st.sampled_from(["tensor", "row", "rank", "both"]))
)


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.floats(0.01, 16), st.sampled_from([*METHODS, "auto"]), quants, quants, grids)
def test_never_above_the_budget(
    n: int, d: int, budget: float, method: str, left: QuantSpec | None, right: QuantSpec | None, grid: Grid | None
) -> None:
    grid = grid if method not in ("lplr_feedback", "double_binary") else None
    spec = plan((n, d), FactorSpec(method=method, bits_per_weight=budget, l=left, r=right, grid=grid))
    assert spec.method in METHODS and spec.rank is not None and 0 <= spec.rank <= min(n, d)
    if not spec.rank and spec.q is None:
        assert method != "naive" or grid not in (None, "uniform") or n * ((d + 7) // 8 * 8 + 16) > budget * n * d
        return
    fmt = layout((n, d), spec)
    assert fmt.stored_bits() <= budget * n * d and fmt.bits_per_weight <= budget
    assert plan((n, d), spec) == spec  # a plan is planned
    assert spec.q is None or spec.q.grid == (grid or spec.q.grid)
    if spec.method in LOW_RANK and spec.rank < min(n, d):
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
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.5, 8), grids)
def test_ldlq_fills_the_budget(n: int, d: int, budget: float, grid: Grid | None) -> None:
    spec = plan((n, d), FactorSpec(method="ldlq", bits_per_weight=budget, grid=grid))
    assume(spec.q is not None and spec.q_narrow)
    assert spec.q is not None
    wider = layout((n, d), spec.model_copy(update={"q_narrow": spec.q_narrow - 1}))
    assert wider.stored_bits() > budget * n * d


@pytest.mark.parametrize(
    ("shape", "bits", "grid"),
    [
        ((576, 1536), 2.0, "trellis"),
        ((576, 1536), 0.8, "trellis"),
        ((1536, 576), 6.3, "trellis"),
        ((576, 1536), 6.5, "uniform"),
        ((4096, 4096), 8.0, "uniform"),
        ((1, 4096), 4.0, "uniform"),  # a column of one row takes a byte
        ((2, 4096), 8.0, "uniform"),
    ],
)
def test_the_grid_of_a_backbone(shape: tuple[int, int], bits: float, grid: str) -> None:
    spec = plan(shape, FactorSpec(method="ldlq", bits_per_weight=bits))
    assert spec.q is not None and (spec.q.grid, spec.q.ranges) == (grid, "tensor")
    assert spec.rotation and spec.output_rotation and spec.rotation != spec.output_rotation
    fmt = layout(shape, spec)
    assert fmt.scales == (("q_row_scale", 1),)
    if min(shape) > 100 and bits != 6.3:  # all but one scale and less than the step of a column goes into the codes
        assert bits - 0.01 < fmt.bits_per_weight <= bits


def test_what_the_user_says_of_q_is_obeyed() -> None:
    q = QuantSpec(bits=3, ranges="row")
    spec = plan((40, 50), FactorSpec(method="ldlq", bits_per_weight=2, q=q, grid="trellis", rotation=0, output_rotation=0))
    assert (spec.q, spec.q_narrow, spec.rotation, spec.output_rotation) == (q, 0, 0, 0)


@pytest.mark.parametrize("method", ["lplr_feedback", "double_binary"])
def test_feedback_knows_the_uniform_grid_alone(method: str) -> None:
    for more in ({"grid": "lattice"}, {"l": QuantSpec(grid="lattice")}):
        with pytest.raises(RecipeError, match="not to lattice: choose one of lplr"):
            plan((9, 9), FactorSpec(method=method, bits_per_weight=2, **more))  # type: ignore[arg-type]


def test_widths_of_double_binary() -> None:
    found = {}
    for shape, bits in (((40, 30), 1), ((30, 40), 1), ((30, 40), 2)):
        spec = plan(shape, FactorSpec(method="double_binary", bits_per_weight=bits))
        assert spec.l and spec.r and (spec.l.ranges, spec.r.ranges) == ("row", "both")
        found[shape, bits] = spec.l.bits, spec.r.bits
    assert list(found.values()) == [(1, 1), (2, 1), (2, 2)]


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
