"""Norms against their definitions; prox against its optimality conditions, which no other point fulfils."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex.penalty import NORMS, Penalty
from lplr.errors import RecipeError

cases = given(
    norm=st.sampled_from(NORMS),
    P=st.integers(1, 4),
    d=st.integers(1, 5),
    C=st.integers(1, 4),
    step=st.sampled_from([1e-3, 0.3, 5.0]),
    seed=st.integers(0, 99),
)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gate_norm(U: torch.Tensor, norm: str) -> float:
    if norm == "group":
        return U.square().sum().sqrt().item()
    if norm == "columns":
        return sum(u.square().sum().sqrt().item() for u in U.T)
    return torch.linalg.svdvals(U).sum().item()


@cases
@settings(max_examples=60, deadline=None)
def test_value_prox_and_dual_norm(norm, P, d, C, step, seed):
    penalty, U = Penalty(0.7, norm), random(seed, P, d, C)
    assert penalty.value(U) == pytest.approx(0.7 * sum(gate_norm(u, norm) for u in U), rel=1e-12)
    V = penalty.prox(U, step)
    rest = U - V  # prox: rest / step is a subgradient of the penalty at V: in the dual ball, and aligned with V
    assert (penalty.dual_norm(rest) <= step * 0.7 * (1 + 1e-7)).all()  # nuclear: square roots of eigenvalues
    assert (rest * V).sum().item() == pytest.approx(step * penalty.value(V), rel=1e-9, abs=1e-12)


@cases
@settings(max_examples=60, deadline=None)
def test_the_dual_norm_is_the_largest_product_with_a_unit_ball(norm, P, d, C, step, seed):
    penalty, T = Penalty(1.0, norm), random(seed, P, d, C)
    sizes = penalty.dual_norm(T)
    others = random(seed + 1, 50, P, d, C)
    lengths = torch.tensor([[gate_norm(v, norm) for v in row] for row in others], dtype=torch.float64)
    products = (others * T).sum((-2, -1)) / lengths
    assert (products.max(0).values <= sizes * (1 + 1e-9)).all()
    best = penalty.prox(T, sizes.min().item() * (1 - 1e-4))[sizes.argmin()]  # what is left of the smallest is aligned with it
    reached = (best * T[sizes.argmin()]).sum() / gate_norm(best, norm)
    assert reached.item() == pytest.approx(sizes.min().item(), rel=2e-4)


def test_weights_with_a_sign_in_front():
    penalty, V = Penalty(0.5, "columns"), random(0, 2, 3, 4, 2)
    assert penalty.value(V) == pytest.approx(penalty.value(V[0]) + penalty.value(V[1]), rel=1e-12)
    assert torch.equal(penalty.prox(V, 0.3)[1], penalty.prox(V[1], 0.3))


@pytest.mark.parametrize("norm", NORMS)
def test_zero_weights_stay_zero(norm):
    zero = torch.zeros(2, 3, 2)
    assert Penalty(1.0, norm).value(zero) == 0 and torch.equal(Penalty(1.0, norm).prox(zero, 0.1), zero)
    assert torch.equal(Penalty(1.0, norm).dual_norm(zero), torch.zeros(2))


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan"), float("inf")])
def test_lam_is_positive(lam):
    with pytest.raises(RecipeError, match="positive"):
        Penalty(lam)


def test_unknown_norm():
    with pytest.raises(RecipeError, match="group, columns, nuclear"):
        Penalty(1.0, "l1")
