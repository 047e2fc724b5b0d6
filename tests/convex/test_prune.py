"""Pruning against fits and objectives computed apart, brute force, and the losses that are to be minimised."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from convex.oracles import value
from convex.test_optimal_set import gaussian_problem, matchings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lplr.convex import Gates, Penalty, Problem, lambda_max, patterns, solve
from lplr.convex.network import GatedNetwork, ReluNetwork, export
from lplr.convex.optimal_set import optimal_set
from lplr.convex.prune import (
    Sized,
    by_size,
    contributions,
    exact,
    least_squares,
    minimal,
    refit,
    rescaled,
    shrink,
    smallest,
    two_layers,
)
from lplr.errors import RecipeError

float64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=float64)


def mlp(seed: int, d: int = 3, m: int = 12, C: int = 1, bias: bool = True) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(d, m, bias=bias), nn.ReLU(), nn.Linear(m, C, bias=bias)).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(normal(seed + k, *p.shape))
    return net


def gated(seed: int, d: int = 3, m: int = 12, C: int = 1) -> GatedNetwork:
    net = GatedNetwork(nn.Linear(d, m), nn.Linear(d, m * C), nn.Linear(d, C)).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(normal(seed + k, *p.shape))
    return net


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("make", [mlp, gated])
def test_contributions_add_up_to_the_outputs(make, C: int):
    network, X = two_layers(make(1, C=C)), normal(7, 9, 3)
    Z = contributions(network, X)
    assert Z.shape == (9, C, 12)
    with torch.no_grad():
        rest = network.skip(X) if isinstance(network, GatedNetwork) else network.layers[1].bias
        assert Z.sum(2) + rest == pytest.approx(network(X), abs=1e-12)
        for b in (0, 7):  # without neuron b
            less = rescaled(network, torch.ones(12, dtype=float64).index_fill(0, torch.tensor([b]), 0), X)
            moved = network(X) - Z[:, :, b] + Z[:, :, b].mean(0)
            assert less.shape == (11, 3, C) and less(X) == pytest.approx(moved, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 8), C=st.integers(1, 3), m=st.integers(1, 20), gates=st.booleans())
def test_exact_pruning_leaves_the_outputs_and_ends_with_independent_contributions(seed: int, n: int, C: int, m: int, gates: bool):
    network, X = two_layers((gated if gates else mlp)(seed, m=m, C=C)), normal(seed + 50, n, 3)
    c = exact(contributions(network, X))
    pruned = rescaled(network, c, X)
    with torch.no_grad():
        before, after = network(X), pruned(X)
    assert (after - before).abs().max() <= 1e-8 * (1 + before.abs().max())
    Z = contributions(pruned, X)
    F = (Z - Z.mean(0)).flatten(0, 1)
    assert pruned.shape[0] <= (n - 1) * C  # Caratheodory, means apart
    if F.shape[1]:
        assert torch.linalg.matrix_rank(F / F.norm(dim=0), rtol=1e-8) == F.shape[1]


@pytest.mark.parametrize("activation, norm", [("gated", "group"), ("gated", "columns"), ("relu", "columns")])
def test_a_minimal_solution_has_the_objective_the_fit_and_independent_blocks(activation: str, norm: str):
    C = 2 if norm == "columns" and activation == "gated" else 1
    problem, gates = gaussian_problem(activation, "squared", False, C, 3)
    penalty = Penalty(0.1 * lambda_max(problem, norm), norm)
    every = optimal_set(problem, penalty, solve(problem, penalty, tol=1e-13))
    solution = every.solution(every.polytope.centre)  # uses all blocks that any optimum uses
    found = minimal(problem, penalty, solution)
    assert found.converged and value(problem, penalty, found.U, found.b) == pytest.approx(solution.primal, rel=1e-8)
    assert problem.fit(found.U, found.b) == pytest.approx(problem.fit(solution.U, solution.b), abs=1e-7)
    lengths = found.U.norm(dim=-2).flatten() if activation == "relu" or norm == "columns" else found.U.flatten(1).norm(dim=1)
    before = solution.U.norm(dim=-2).flatten() if activation == "relu" or norm == "columns" else solution.U.flatten(1).norm(dim=1)
    assert (lengths > 0).sum() < (before > 0).sum()  # there is something to prune in these
    # the network's blocks are independent, and no sub-set has the same fit with other lengths (brute force)
    fits = []
    for index in found.U.flatten(-2).any(-1).nonzero() if norm == "group" and activation == "gated" else []:
        alone = torch.zeros_like(found.U)
        alone[tuple(index)] = found.U[tuple(index)]
        fits.append(problem.fit(alone, torch.zeros_like(found.b)).flatten())
    if fits:
        F = torch.stack(fits, 1)
        assert torch.linalg.matrix_rank(F) == F.shape[1] <= len(problem.X) * C
        goal = F.sum(1)
        for subset in itertools.combinations(range(F.shape[1]), F.shape[1] - 1):
            part = F[:, list(subset)]
            best = part @ torch.linalg.lstsq(part, goal[:, None]).solution[:, 0]
            assert (best - goal).norm() > 1e-6 * goal.norm()


def test_pruning_a_stationary_network_keeps_its_weight_decay():
    """The objective of the ordinary ReLU network, with weights split between neurons by hand."""
    problem, gates = gaussian_problem("relu", "squared", False, 1, 3)
    penalty = Penalty(0.1 * lambda_max(problem, "columns"), "columns")
    network = export(solve(problem, penalty, tol=1e-13), gates)
    first, second = network.layers
    W, a = first.weight.detach(), second.weight.detach()
    split = ReluNetwork(nn.Linear(1, 1), nn.Linear(1, 1))
    thirds = torch.tensor([1 / 3, 2 / 3], dtype=float64).sqrt()
    split.layers[0].weight, split.layers[1].weight = (
        nn.Parameter(torch.cat([W * t for t in thirds])),
        nn.Parameter(torch.cat([a * t for t in thirds], 1)),
    )
    split.layers[0].bias = nn.Parameter(torch.zeros(2 * len(W), dtype=float64))
    split.layers[1].bias = nn.Parameter(torch.zeros(1, dtype=float64))
    pruned = rescaled(split, exact(contributions(split, problem.X).flatten(0, 1)), problem.X)

    def objective(net: ReluNetwork) -> float:
        with torch.no_grad():
            fit = (net(problem.X) - net.layers[1].bias - problem.Y).square().mean() / 2
            return float(fit + penalty.lam / 2 * (net.layers[0].weight.square().sum() + net.layers[1].weight.square().sum()))

    assert pruned.shape[0] <= len(W) and split.shape[0] == 2 * len(W)
    assert isinstance(pruned, ReluNetwork) and objective(split) == pytest.approx(objective(network), rel=1e-12)
    assert objective(pruned) == pytest.approx(objective(network), rel=1e-8)


def test_the_fewest_may_be_fewer_than_minimal():
    problem, penalty = matchings()
    found = minimal(problem, penalty, solve(problem, penalty, tol=1e-12))
    assert 2 <= int(found.U.flatten(1).any(1).sum()) <= 3  # perfect matchings are the vertices: two pairs, here all the same
    assert int(found.U.flatten(1).any(1).sum()) == 2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), C=st.integers(1, 2), m=st.integers(2, 8))
def test_least_squares_takes_the_neuron_the_others_stand_in_for_best(seed: int, C: int, m: int):
    Z = normal(seed, 12, C, m) * 10.0 ** torch.randint(-2, 2, (m,), generator=torch.Generator().manual_seed(seed))
    F = (Z - Z.mean(0)).flatten(0, 1).numpy()
    every = list(least_squares(Z))
    assert [int((c > 0).sum()) for c in every] == list(range(m, 0, -1))
    for c, after in itertools.pairwise(every):
        columns, residuals = F * c.numpy(), []
        for i in np.flatnonzero(c.numpy()):
            others = np.delete(columns, i, axis=1)
            best = np.linalg.lstsq(others, columns[:, i], rcond=None)[0] if others.any() else np.zeros(m - 1)
            residuals.append(np.linalg.norm(others @ best - columns[:, i]))
        change = np.linalg.norm(F @ after.numpy() - columns.sum(1))
        assert change <= min(residuals) * (1 + 1e-8)  # the paper's bound
        assert (after >= 0).all() and not ((after > 0) & (c == 0)).any()


def test_by_size_drops_the_smallest_first():
    every = list(by_size(normal(0, 5, 1, 3), torch.tensor([2.0, 1.0, 3.0])))
    assert [c.tolist() for c in every] == [[1, 1, 1], [1, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("loss, C", [("squared", 2), ("logistic", 1), ("softmax", 3)])
def test_a_refitted_relu_network_is_as_good_as_a_long_run_of_adam(loss: str, C: int):
    X = normal(3, 40, 3)
    Y = normal(4, 40, C)
    if loss == "logistic":
        Y = Y.sign()
    elif loss == "softmax":
        Y = torch.nn.functional.one_hot(Y.argmax(1), C).double()
    start = two_layers(mlp(5, m=4, C=C))
    found = refit(start, X, Y, loss=loss, lam=0.01)
    assert isinstance(found, ReluNetwork) and found.shape == (4, 3, C)

    def objective(net, parts=None) -> Tensor:
        W, b, A, c = parts or (net.layers[0].weight, net.layers[0].bias, net.layers[1].weight, net.layers[1].bias)
        Z = torch.relu(X @ W.T + b) @ A.T + c
        if loss == "squared":
            f = ((Z - Y) ** 2).sum() / 80
        elif loss == "logistic":
            f = torch.log1p(torch.exp(-Y * Z)).mean()
        else:
            f = -(torch.log_softmax(Z, 1) * Y).sum() / 40
        return f + 0.005 * ((W**2).sum() + (b**2).sum() + (A**2).sum())

    parts = [p.detach().clone().requires_grad_() for p in start.parameters()]
    adam = torch.optim.Adam(parts, lr=0.02)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 1500)
    for _ in range(1500):
        adam.zero_grad()
        objective(None, parts).backward()
        adam.step()
        fall.step()
    with torch.no_grad():  # another local minimum, as a rule; a long run of Adam is what it has to keep up with
        assert objective(found) < min(float(objective(start)), 1.03 * float(objective(None, parts)))
    W, b, A = found.layers[0].weight, found.layers[0].bias, found.layers[1].weight
    balance = W.square().sum(1) + b.square() - A.square().sum(0)  # weight decay makes both layers equally long
    assert balance.abs().max() < 1e-2 * A.square().sum()


@pytest.mark.parametrize("skip", [True, False])
def test_a_refitted_gated_network_is_the_optimum_of_its_gates(skip: bool):
    network, X, Y = gated(2, m=4), normal(3, 30, 3), normal(4, 30, 1)
    if not skip:
        nn.init.zeros_(network.skip.weight)
    found = refit(network, X, Y, lam=0.02)
    assert isinstance(found, GatedNetwork) and bool(found.skip.weight.any()) == skip
    with torch.no_grad():
        D = network.gates(X) > 0
        if skip:
            D = torch.cat([D, torch.ones(30, 1, dtype=torch.bool)], 1)
        ones = torch.cat([X, torch.ones(30, 1, dtype=float64)], 1)
        best = solve(Problem(ones, Y, D, intercept=True), Penalty(0.02), tol=1e-9)
        assert found(X) == pytest.approx(Problem(ones, Y, D, intercept=True).fit(best.U, best.b), abs=1e-2)
    with pytest.raises(RecipeError, match="columns"):
        refit(network, X, normal(1, 30, 2))
    with pytest.raises(RecipeError, match="loss"):
        refit(network, X, Y, loss="hinge")


def test_ever_smaller_networks_and_the_one_to_take():
    X = normal(1, 60, 2)
    Y = (X.relu().sum(1, keepdim=True) - 1).sign()
    start = two_layers(mlp(3, d=2, m=10))
    sizes, losses = [], []
    for network in shrink(start, X, [6, 3, 1, 3], lambda net: refit(net, X, Y, loss="logistic", lam=1e-3)):
        sizes.append(network.shape[0])
        with torch.no_grad():
            losses.append(float(torch.nn.functional.softplus(-Y * network(X)).mean()))
    assert sizes == [6, 3, 1] and losses[1] < 0.2 and losses[0] <= losses[1] + 1e-3 <= losses[2] + 1e-3
    found = [Sized(k, start, loss, 0.05) for k, loss in ((6, 0.20), (3, 0.24), (1, 0.31), (0, 0.9))]
    assert smallest(found).count == 3
    assert smallest([replace(one, error=0.0) for one in found]).count == 6
    assert smallest([replace(one, error=1.0) for one in found]).count == 0


def test_a_network_of_torch_is_pruned_and_others_are_refused():
    plain = mlp(1, bias=False)
    X = normal(2, 4, 3)
    network = two_layers(plain)
    with torch.no_grad():
        assert network(X) == pytest.approx(plain(X), abs=1e-12)
    pruned = rescaled(network, exact(contributions(network, X)), X)
    assert pruned.shape[0] <= 3
    for other in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), nn.Sequential(nn.Linear(2, 1))):
        with pytest.raises(RecipeError, match="two layers"):
            two_layers(other)


def test_dead_equal_and_no_neurons():
    network = two_layers(mlp(1, m=3))
    X = normal(2, 6, 3)
    with torch.no_grad():
        network.layers[0].bias[0] = -1e6  # never open
        network.layers[0].weight[1], network.layers[0].bias[1] = network.layers[0].weight[2], network.layers[0].bias[2]
        pruned = rescaled(network, exact(contributions(network, X)), X)
        assert pruned.shape[0] == 1 and pruned(X) == pytest.approx(network(X), abs=1e-12)
        none = rescaled(network, torch.zeros(3, dtype=float64), X)
        assert none.shape[0] == 0 and none(X) == pytest.approx(network(X).mean(0).expand(6, 1), abs=1e-12)
        assert exact(contributions(none, X)).shape == (0,) and len(list(least_squares(contributions(none, X)))) == 1
    assert refit(none, X, normal(1, 6, 1)).shape[0] == 0
    gates = Gates(torch.zeros(3, 0, dtype=float64), torch.zeros(0, dtype=float64))
    assert patterns(X, gates.vectors).shape == (6, 0)
