"""CRONOS-AM: head steps never raise the objective, features learn, worse heads are rejected, draws are the generator's alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lplr.convex import Penalty, cones, gaussian, solve
from lplr.convex.am import DIFFERENTIABLE, Head, cronos_am, extract, head_problem
from lplr.convex.certificate import certify
from lplr.convex.losses import LOSSES
from lplr.errors import RecipeError


def module(d: int = 2, width: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, width), nn.Tanh()).to(dtype)


def rings(n: int = 120, loss: str = "logistic") -> tuple[torch.Tensor, torch.Tensor]:
    """Three rings, classes by turns: no line separates them."""
    draw = torch.Generator().manual_seed(1)
    radius = torch.randint(3, (n,), generator=draw)
    angle = 2 * math.pi * torch.rand(n, generator=draw, dtype=torch.float64)
    X = (1.0 + radius)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    X = X + 0.1 * torch.randn(n, 2, generator=draw, dtype=torch.float64)
    if loss == "softmax":
        return X, nn.functional.one_hot(radius, 3).double()
    return X, torch.where(radius == 1, 1.0, -1.0).double()[:, None]


@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
def test_no_head_step_raises_the_objective_and_the_features_learn(loss):
    X, y = rings(60, loss)
    features = module()
    found = cronos_am(features, X, y, loss=loss, lam=3e-3, gates=6, epochs=8, batch=15, head_every=4)
    heads = [line for line in found.history if line["kind"] == "head"]
    assert len(heads) == 3 and len(found.history) == 11
    assert all(line["accepted"] == (line["after"] <= line["before"]) for line in heads)
    kept = [min(line["before"], line["after"]) for line in heads]
    assert all(after <= line["before"] for line, after in zip(heads, kept, strict=True))
    assert all(line["before"] < after for line, after in zip(heads[1:], kept, strict=False))  # what the features learned
    H = extract(features, X)
    assert (
        found.objective == pytest.approx(found.head.objective(H, y, loss, 3e-3), rel=1e-12) == pytest.approx(kept[-1], rel=1e-12)
    )
    assert found.objective < 0.8 * kept[0]
    scores = found(X)
    right = scores.argmax(1) == y.argmax(1) if loss == "softmax" else (scores > 0) == (y > 0)
    assert right.double().mean() > 0.9


@given(seed=st.integers(0, 1000), C=st.integers(1, 3), gates=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_the_present_head_is_a_feasible_point_of_its_programme(seed, C, gates):
    draw = torch.Generator().manual_seed(seed)
    H = torch.randn(15, 4, generator=draw, dtype=torch.float64)
    V = torch.randn(2, 5, 4, C, generator=draw, dtype=torch.float64) * (torch.rand(2, 5, 1, C, generator=draw) < 0.6)
    head = Head(V, torch.randn(C, generator=draw, dtype=torch.float64))
    y = torch.randn(15, C, generator=draw, dtype=torch.float64)
    problem, warm = head_problem(head, H, y, "squared", 10 * gates, True, draw)
    assert cones.violation(warm.U, H, problem.D) < 1e-12
    torch.testing.assert_close(problem.fit(warm.U, warm.b), head(H))
    assert certify(problem, Penalty(0.01, "columns"), warm.U, warm.b).primal <= head.objective(H, y, "squared", 0.01) * (
        1 + 1e-12
    )
    few, _ = head_problem(head, H, y, "squared", 1, True, draw)
    assert few.D.shape[1] <= 5  # the four longest neurons and a fresh gate


def test_the_network_of_a_solution_has_its_objective():
    X, y = rings(40)
    H = extract(module(), X)
    problem, _ = head_problem(
        Head(H.new_zeros(2, 1, 6, 1), H.new_zeros(1)), H, y, "logistic", 12, True, torch.Generator().manual_seed(0)
    )
    found = solve(problem, Penalty(1e-2, "columns"), tol=1e-8)
    head = Head(found.U, found.b)
    assert head.objective(H, y, "logistic", 1e-2) == pytest.approx(found.primal, rel=1e-8)
    torch.testing.assert_close(head(H), problem.fit(found.U, found.b), rtol=1e-7, atol=1e-8)


def test_a_worse_head_is_rejected():
    X, y = rings(60)
    calls = []

    def spoil(problem, penalty, **options):
        found = solve(problem, penalty, **options)
        calls.append(options["warm"])
        return found if len(calls) == 1 else replace(found, U=3 * found.U)

    found = cronos_am(module(), X, y, gates=6, epochs=2, batch=20, lam=1e-2, head_solver=spoil)
    heads = [line for line in found.history if line["kind"] == "head"]
    assert [line["accepted"] for line in heads] == [True, False, False]
    assert calls[0] is None and calls[1] is not None
    assert all(line["after"] > line["before"] for line in heads[1:])
    assert found.objective == heads[-1]["before"]
    first = cronos_am(module(), X, y, gates=6, epochs=0, lam=1e-2)
    torch.testing.assert_close(found.head.V, first.head.V)


def test_the_generator_decides():
    X, y = rings(30)

    def run(seed: int):
        features = module()
        torch.manual_seed(seed + 100)  # the global state must not count
        return cronos_am(features, X, y, gates=3, epochs=2, batch=20, head_every=2, generator=torch.Generator().manual_seed(seed))

    one, again, other = run(0), run(0), run(1)
    assert torch.equal(one.head.V, again.head.V) and torch.equal(one(X), again(X)) and one.objective == again.objective
    assert one.objective != other.objective


def test_the_limits_of_lam():
    X, y = rings(60)
    nothing = cronos_am(module(), X, y, lam=1e3, epochs=2, batch=30)
    assert not nothing.head.V.any() and torch.equal(nothing(X), nothing.head.b.expand(60, 1))
    little = cronos_am(module(), X, y, loss="squared", lam=1e-5, epochs=0, gates=16)
    assert little.objective < 0.5 * cronos_am(module(), X, y, loss="squared", lam=1e-1, epochs=0, gates=16).objective


def test_modes_types_callbacks_and_refusals():
    X, y = rings(40)
    dropout = nn.Sequential(module(dtype=torch.float32), nn.Dropout(0.5))
    seen: list[dict] = []
    found = cronos_am(dropout, X.float(), y.float(), gates=4, epochs=5, callback=lambda line: seen.append(line) or len(seen) == 4)
    assert [line["kind"] for line in found.history] == ["head", "features", "head", "features"] and dropout.training
    assert found.head.V.dtype == torch.float32 and torch.equal(found(X.float()), found(X.float()))  # no dropout in scores
    for change, message in (
        ({"loss": "hinge"}, "unknown loss"),
        ({"gates": 0}, "start at 1"),
        ({"features": nn.Identity()}, "no parameters"),
        ({"y": y[:-1]}, "one row a sample"),
        ({"features": nn.Sequential(module(), nn.Unflatten(1, (2, 3)))}, "Flatten"),
    ):
        with pytest.raises(RecipeError, match=message):
            cronos_am(**{"features": module(), "X": X, "y": y, "epochs": 1, **change})


@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_that_are_differentiated_are_those_that_are_solved(loss):
    _, y = rings(20, loss)
    Z = gaussian(20, y.shape[1], torch.Generator().manual_seed(0)).requires_grad_()
    value = DIFFERENTIABLE[loss](Z, y)
    value.backward()
    assert value.item() == pytest.approx(LOSSES[loss].value(Z.detach(), y), rel=1e-12)
    torch.testing.assert_close(Z.grad, LOSSES[loss].gradient(Z.detach(), y))


def test_modes_are_put_back_and_the_objective_is_that_of_the_end():
    X, y = rings(40)
    features = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh()).double()
    features[1].eval()
    extract(features, X)
    assert features.training and not features[1].training
    made = cronos_am(module(), X, y, gates=4, epochs=2, head_every=5, callback=lambda line: line["kind"] == "features")
    assert made.history[-1]["kind"] == "features"
    H = extract(made.features, X)
    assert made.objective == pytest.approx(made.head.objective(H, y, "logistic", 1e-3), rel=1e-12)
