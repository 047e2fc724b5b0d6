"""Optimal sets against brute-force objectives, cvxpy, enumerated vertices and sets that are known in closed form."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from convex.oracles import optimum, random_problem, value
from convex.test_polytope import vertices
from scipy.optimize import nnls

from lplr.convex import Gates, Penalty, Problem, Solution, clean, lambda_max, patterns, solve
from lplr.convex.losses import LOSSES
from lplr.convex.network import export
from lplr.convex.optimal_set import OptimalSet, extended, optimal_set, optimal_sets, subsampled
from lplr.errors import RecipeError

float64 = torch.float64
# activation, loss, norm, intercept, outputs, seed; in two dimensions with all patterns, so that gates are complementary
PROGRAMMES = [
    ("gated", "squared", "group", False, 1, 3),
    ("gated", "squared", "group", True, 2, 1),
    ("gated", "squared", "columns", False, 2, 3),
    ("gated", "squared", "columns", True, 2, 5),
    ("gated", "logistic", "group", True, 1, 2),
    ("gated", "softmax", "columns", True, 3, 4),
    ("gated", "softmax", "group", False, 3, 4),
    ("relu", "squared", "columns", False, 1, 3),
    ("relu", "squared", "columns", True, 1, 3),
    ("relu", "squared", "columns", True, 2, 6),
]
programmes = pytest.mark.parametrize("activation, loss, norm, intercept, C, seed", PROGRAMMES)


def gaussian_problem(
    activation: str, loss: str, intercept: bool, C: int, seed: int, n: int = 10, P: int = 60
) -> tuple[Problem, Gates]:
    base = random_problem(seed, loss, n=n, d=2, P=P, C=C)
    draw = torch.Generator().manual_seed(seed)
    _, G = torch.randn(n, 2, generator=draw, dtype=float64), torch.randn(2, P, generator=draw, dtype=float64)
    kept = clean(base.D)
    assert torch.equal(patterns(base.X, G), base.D)
    gates = Gates(G[:, kept], torch.zeros(len(kept), dtype=float64))
    return replace(base, D=base.D[:, kept], activation=activation, intercept=intercept), gates


def solved(problem: Problem, norm: str, ratio: float = 0.1) -> tuple[Penalty, Solution, OptimalSet]:
    penalty = Penalty(ratio * lambda_max(problem, norm), norm)
    solution = solve(problem, penalty, tol=1e-13)
    return penalty, solution, optimal_set(problem, penalty, solution)


def elements(found: OptimalSet) -> list[Solution]:
    samples = found.polytope.sample(3, torch.Generator().manual_seed(0))
    lengths = [found.least_norm(), found.sparsest(), found.polytope.vertex(found.polytope.centre), *samples]
    return [found.solution(one) for one in lengths]


@programmes
def test_the_objective_is_constant_over_the_set_and_optimal(activation, loss, norm, intercept, C, seed):
    problem, _ = gaussian_problem(activation, loss, intercept, C, seed)
    penalty, solution, found = solved(problem, norm)
    assert len(found.blocks) > 0 and found.slack < 1e-9
    fits = []
    for one in elements(found):
        assert one.converged and found.contains(one.U, one.b)
        assert value(problem, penalty, one.U, one.b) == pytest.approx(solution.primal, rel=1e-9)
        fits.append(problem.fit(one.U, one.b))
        if loss == "softmax":
            fits[-1] = fits[-1] - fits[-1].mean(1, keepdim=True)
        assert fits[-1] == pytest.approx(fits[0], abs=1e-9)
    assert solution.primal == pytest.approx(optimum(problem, penalty), rel=1e-6)  # Clarabel's accuracy
    assert found.contains(solution.U, solution.b, 1e-5)
    assert not found.contains(1.01 * solution.U, solution.b) and not found.contains(solution.U + 0.01, solution.b)
    if intercept:
        assert not found.contains(solution.U, solution.b + torch.arange(1.0, 1 + len(solution.b)))


@programmes
def test_directions_from_two_optima_agree(activation, loss, norm, intercept, C, seed):
    problem, _ = gaussian_problem(activation, loss, intercept, C, seed)
    _, _, found = solved(problem, norm)
    pulled = [problem.adjoint(-LOSSES[loss].gradient(problem.fit(one.U, one.b), problem.Y)) for one in elements(found)]
    for other in pulled[1:]:
        assert other == pytest.approx(pulled[0], abs=1e-9)
    for k in range(len(found.blocks)):
        sign, gate, direction = float(found.blocks.sign[k]), int(found.blocks.gate[k]), found.blocks.direction[k]
        output = None if found.blocks.output is None else int(found.blocks.output[k])
        a = sign * pulled[0][gate] if output is None else sign * pulled[0][gate, :, output, None]
        if activation == "relu":  # its projection onto the cone: a + G^T rho, rho >= 0 of least length
            G = (2 * problem.D[:, gate, None] - 1.0) * problem.X
            a = a + G.T @ torch.from_numpy(nnls(G.T.numpy(), -a[:, 0].numpy())[0])[:, None]
        assert direction == pytest.approx(
            a / a.norm(), abs=1e-5 if activation == "relu" else 1e-9
        )  # what weights in cones solve to


@pytest.mark.parametrize("activation, loss, norm, intercept, C, seed", [p for p in PROGRAMMES if p[1] == "squared"])
def test_the_support_and_the_fewest_blocks_are_those_of_all_vertices(activation, loss, norm, intercept, C, seed):
    problem, _ = gaussian_problem(activation, loss, intercept, C, seed)
    _, _, found = solved(problem, norm)
    if len(found.blocks) > 12:
        pytest.skip("too many blocks to enumerate")
    columns = []  # fits of unit blocks, written once more
    for k in range(len(found.blocks)):
        products = problem.D[:, found.blocks.gate[k], None] * (problem.X @ found.blocks.direction[k]) * found.blocks.sign[k]
        fit = torch.zeros_like(problem.Y)
        fit[:, slice(None) if found.blocks.output is None else [int(found.blocks.output[k])]] = products
        columns.append((fit - fit.mean(0) if intercept else fit).flatten())
    F = torch.stack(columns, 1).numpy()
    corners = np.array(vertices(F, F @ found.polytope.point.numpy()))
    assert (found.support.numpy() == (corners.max(0) > 0)).all()
    assert found.unique == (len(corners) == 1) and found.unique >= found.independent
    fewest = found.sparsest()
    assert int((fewest > 0).sum()) == (corners > 0).sum(1).min()
    ranges = found.polytope.ranges().numpy()
    assert ranges == pytest.approx(np.stack([corners.min(0), corners.max(0)], 1), abs=1e-6 * corners.max())
    assert found.polytope.point.sum().item() == pytest.approx(corners.sum(1), rel=1e-9)  # sum alpha is constant


def matchings() -> tuple[Problem, Penalty]:
    """X = I, gates: all pairs of four samples, equal targets: optima are the perfect matchings of four points, and mixtures."""
    D = torch.zeros(4, 6, dtype=torch.bool)
    for k, pair in enumerate(itertools.combinations(range(4), 2)):
        D[list(pair), k] = True
    return Problem(torch.eye(4, dtype=float64), torch.ones(4, 1, dtype=float64), D), Penalty(0.1)


def test_a_set_in_closed_form():
    problem, penalty = matchings()
    found = optimal_set(problem, penalty, solve(problem, penalty, tol=1e-12))
    # theta = t 1 with t sqrt(2) = lam, Z = (1 - 4 t) 1: every sample gets alpha / sqrt(2) from the pairs it is in
    length = 2**0.5 * (1 - 4 * 0.1 / 2**0.5)
    assert found.theta == pytest.approx(torch.full((4, 1), 0.1 / 2**0.5, dtype=float64), rel=1e-9)
    assert len(found.blocks) == 6 and found.support.all() and not found.unique and found.polytope.dimension == 2
    assert found.polytope.ranges() == pytest.approx(torch.tensor([[0.0, length]] * 6), abs=1e-6)
    assert found.least_norm() == pytest.approx(torch.full((6,), length / 3, dtype=float64), rel=1e-6)
    fewest = found.sparsest()
    assert sorted(fewest.tolist()) == pytest.approx([0, 0, 0, 0, length, length], abs=1e-9)
    weights = found.solution(fewest).U
    assert weights.abs().amax(0) == pytest.approx(torch.full((4, 1), length / 2**0.5, dtype=float64), rel=1e-9)
    target = torch.tensor(
        [[1.0, 2, 3, 4]], dtype=float64
    )  # validation sample: outputs are sums of x_j over the pairs of one gate
    other = replace(problem, X=target, Y=torch.tensor([[0.0]], dtype=float64), D=torch.tensor([[True] + [False] * 5]))
    assert found.outputs(found.best_on(other), other).item() == pytest.approx(0, abs=1e-6)
    other = replace(other, Y=torch.tensor([[100.0]], dtype=float64))
    assert found.best_on(other)[0].item() == pytest.approx(length, rel=1e-6)


@programmes
def test_outputs_are_those_of_the_exported_network(activation, loss, norm, intercept, C, seed):
    problem, gates = gaussian_problem(activation, loss, intercept, C, seed)
    penalty, _, found = solved(problem, norm)
    X = torch.randn(40, 2, generator=torch.Generator().manual_seed(9), dtype=float64)
    other = replace(problem, X=X, Y=problem.Y[:1].expand(40, -1), D=gates.patterns(X))
    nets = []
    for lengths in (found.polytope.centre, found.sparsest()):
        network = export(found.solution(lengths), gates)
        with torch.no_grad():
            nets.append(network(X))
        assert found.outputs(lengths, other) == pytest.approx(nets[-1], abs=1e-9)
    same = bool((nets[0] - nets[1]).abs().max() < 1e-6)
    assert same or not found.same_network  # one network: all outputs agree everywhere


def test_relu_weights_on_the_faces_of_cells_are_one_network():
    problem, gates = gaussian_problem("relu", "squared", False, 1, 3)
    _, _, found = solved(problem, "columns")
    assert not found.unique and found.same_network
    nets = [export(found.solution(a), gates) for a in (found.sparsest(), found.polytope.centre)]
    X = torch.randn(50, 2, generator=torch.Generator().manual_seed(2), dtype=float64)
    with torch.no_grad():
        assert nets[0](X) == pytest.approx(nets[1](X), abs=1e-8)  # new samples too, off the hyperplanes of the old


@pytest.mark.parametrize("seed", range(3))
def test_fewer_gates_give_stationary_points_of_the_network_with_all(seed: int):
    problem, gates = gaussian_problem("gated", "squared", False, 1, seed)
    penalty = Penalty(0.1 * lambda_max(problem, "group"))
    kept = torch.arange(0, len(gates), 3)
    small = subsampled(problem, kept)
    one = extended(solve(small, penalty, tol=1e-13), kept, problem, penalty)
    U = one.U[kept][:, :, 0]
    assert one.U.count_nonzero() == U.count_nonzero()
    sizes = U.norm(dim=1, keepdim=True)
    first = (U / sizes.clamp_min(1e-300).sqrt()).requires_grad_()
    second = sizes.sqrt().requires_grad_()
    Z = (problem.X @ first.T) * small.D @ second
    objective = (Z - problem.Y).square().mean() / 2 + penalty.lam / 2 * (first.square().sum() + second.square().sum())
    gradients = torch.autograd.grad(objective, (first, second))
    assert max(g.abs().max().item() for g in gradients) < 1e-8  # the root of a length that is 1e-16 by rounding
    assert objective.item() == pytest.approx(one.primal, rel=1e-9)
    whole = solve(problem, penalty, tol=1e-13)
    assert one.primal >= whole.primal and one.gap >= one.primal - whole.primal - 1e-12
    active = whole.U.flatten(1).norm(dim=1) > 0
    again = extended(solve(subsampled(problem, active), penalty, tol=1e-13), active, problem, penalty)
    assert again.converged and again.primal == pytest.approx(whole.primal, rel=1e-9)


def test_sets_along_a_path():
    problem, _ = gaussian_problem("gated", "squared", False, 1, 3)
    top = lambda_max(problem, "group")
    lams = [1.001 * top, 0.5 * top, 0.1 * top]
    found = list(optimal_sets(problem, lams=lams))
    assert [one.penalty.lam for one in found] == lams
    assert found[0].unique and not found[0].polytope.point.any()
    for lam, one in zip(lams[1:], found[1:], strict=True):
        assert one.solution(one.least_norm()).primal == pytest.approx(optimum(problem, Penalty(lam)), rel=1e-6)


def test_what_cannot_be_told_is_said():
    problem = random_problem(0, "squared", C=2)
    penalty = Penalty(0.1 * lambda_max(problem, "group"), "group")
    loose, tight = solve(problem, penalty, tol=1e-2), solve(problem, penalty, tol=1e-12)
    with pytest.raises(RecipeError, match=r"gap is .*: solve to tol=1e-10"):
        optimal_set(problem, penalty, replace(loose, gap=0.01 * loose.primal))
    with pytest.raises(RecipeError, match="in use"):
        optimal_set(problem, penalty, replace(loose, gap=0.0), tol=1e-9)
    nuclear = Penalty(penalty.lam, "nuclear")
    with pytest.raises(RecipeError, match="spectrahedron"):
        optimal_set(problem, nuclear, tight)
    one = random_problem(0, "squared", C=1)
    chosen = Penalty(0.1 * lambda_max(one, "group"), "nuclear")  # for one output the same as group
    assert len(optimal_set(one, chosen, solve(one, chosen, tol=1e-12)).blocks)


def test_nothing_is_learnt_above_lambda_max():
    for activation in ("gated", "relu"):
        problem = random_problem(1, "squared", C=1, activation=activation, intercept=True)
        penalty = Penalty(1.1 * lambda_max(problem, "columns"), "columns")
        found = optimal_set(problem, penalty, solve(problem, penalty))
        assert found.unique and found.same_network and len(found.blocks) == 0
        one = found.solution(found.least_norm())
        assert not one.U.any() and one.b == pytest.approx(problem.Y.mean(0))
        assert found.outputs(found.sparsest(), problem) == pytest.approx(problem.Y.mean(0).expand(12, 1))


def test_a_pattern_that_is_there_twice_adds_a_dimension():
    problem, _ = matchings()
    D = torch.cat([problem.D, torch.tensor([[True], [True], [False], [False]])], 1)  # a pair twice
    nearly = replace(problem, D=D)
    found = optimal_set(nearly, Penalty(0.1), solve(nearly, Penalty(0.1), tol=1e-12))
    assert len(found.blocks) == 7 and found.polytope.dimension == 3
