"""Losses by autograd and by Fenchel's inequality, which holds for every pair and is an equality at theta = -grad f only."""

from __future__ import annotations

import math

import pytest
import torch
from convex.oracles import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex.losses import LOSSES, smoothness

names = pytest.mark.parametrize("name", LOSSES)


def data(name: str, seed: int, n: int = 7, C: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    Y = random_problem(seed, name, n=n, C=C).Y
    return 2 * torch.randn(Y.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64), Y


def plain(name: str, Z: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    if name == "squared":
        return (Z - Y).square().sum() / (2 * len(Y))
    if name == "logistic":
        return torch.log(1 + torch.exp(-Y * Z)).sum() / len(Y)
    return -(Y * torch.log_softmax(Z, 1)).sum() / len(Y)


@names
def test_value_and_gradient(name):
    Z, Y = data(name, 0)
    Z.requires_grad_()
    expected = plain(name, Z, Y)
    (gradient,) = torch.autograd.grad(expected, Z)
    assert LOSSES[name].value(Z.detach(), Y) == pytest.approx(expected.item(), rel=1e-12)
    assert (LOSSES[name].gradient(Z.detach(), Y) - gradient).abs().max() < 1e-12


@names
@given(seed=st.integers(0, 999), scale=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=30, deadline=None)
def test_fenchel(name, seed, scale):
    loss = LOSSES[name]
    Z, Y = data(name, seed)
    theta = -loss.gradient(scale * Z, Y)
    other = scale * data(name, seed + 1)[0]
    dual = loss.dual_value(theta, Y)
    assert dual == pytest.approx(loss.value(scale * Z, Y) + (theta * scale * Z).sum().item(), rel=1e-9, abs=1e-12)
    assert dual <= loss.value(other, Y) + (theta * other).sum().item() + 1e-12


@names
def test_smoothness_is_the_largest_curvature(name):
    worst = 0.0
    for seed in range(20):
        Z, Y = data(name, seed, n=2, C=2)
        hessian = torch.autograd.functional.hessian(lambda z, Y=Y: plain(name, z, Y), 0.1 * Z)
        worst = max(worst, torch.linalg.eigvalsh(hessian.reshape(Z.numel(), Z.numel()))[-1].item())
    bound = smoothness(LOSSES[name], 2)
    assert 0.95 * bound < worst <= bound * (1 + 1e-12)


@pytest.mark.parametrize("name, theta", [("logistic", [[0.6], [0.0]]), ("logistic", [[-0.1], [0.0]]), ("softmax", [[0.1, 0.1]])])
def test_outside_of_the_dual_domain_the_bound_is_void(name, theta):
    theta = torch.tensor(theta, dtype=torch.float64)
    Y = torch.ones_like(theta) if name == "logistic" else torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert LOSSES[name].dual_value(theta, Y) == -math.inf


@names
@given(seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_centred_dual_points_stay_in_the_domain(name, seed):
    loss = LOSSES[name]
    Z, Y = data(name, seed, n=9)
    theta = loss.centred(-loss.gradient(Z, Y), Y)
    assert theta.sum(0).abs().max() < 1e-15 * 9
    assert math.isfinite(loss.dual_value(theta, Y))
    assert (loss.centred(theta, Y) - theta).abs().max() < 1e-15


@names
@given(seed=st.integers(0, 999), shift=st.sampled_from([0.0, 5.0, -40.0]))
@settings(max_examples=30, deadline=None)
def test_the_best_intercept(name, seed, shift):
    loss = LOSSES[name]
    Z, Y = data(name, seed, n=12)
    Z[:, 0] += shift
    b = loss.intercept(Z, Y)
    assert loss.gradient(Z + b, Y).sum(0).abs().max() < 1e-10  # Newton ends when its decrement is below rounding
    assert (loss.intercept(Z, Y, b + 0.1) - b).abs().max() < 1e-6  # conditioning: curvature may be small at the optimum


def test_large_scores_do_not_overflow():
    Y = torch.tensor([[1.0], [-1.0]])
    assert LOSSES["logistic"].value(torch.tensor([[-500.0], [-500.0]]), Y) == pytest.approx(250.0, rel=1e-12)
    assert torch.isfinite(LOSSES["logistic"].gradient(torch.tensor([[-500.0], [500.0]]), Y)).all()


def test_the_intercept_of_nearly_separated_classes_takes_few_evaluations(monkeypatch):
    """Near the optimum a decrease is below the rounding of the value: once it took 1,388 evaluations a call."""
    draw = torch.Generator().manual_seed(0)
    Y = torch.nn.functional.one_hot(torch.randint(3, (30,), generator=draw), 3).double()
    Z = 12 * Y + torch.randn(30, 3, generator=draw, dtype=torch.float64)
    loss, calls = LOSSES["softmax"], []
    value = type(loss).value
    monkeypatch.setattr(type(loss), "value", lambda self, *given: calls.append(1) or value(self, *given))
    b = loss.intercept(Z, Y)
    assert len(calls) <= 30
    assert loss.gradient(Z + b, Y).sum(0).abs().max() <= 1e-15


@pytest.mark.parametrize("name", ["logistic", "softmax"])
def test_an_intercept_of_any_size_is_found(name):
    Z, Y = data(name, 3)
    shift = torch.tensor([1e4] if name == "logistic" else [1e3, 0.0, -1e3], dtype=torch.float64)
    b = LOSSES[name].intercept(Z + shift, Y)
    assert LOSSES[name].gradient(Z + shift + b, Y).sum(0).abs().max() <= 1e-10  # Z is rounded
