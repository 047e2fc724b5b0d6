"""Solution paths against Clarabel, cold solves and what the theory of the optimal value says; folds against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from convex.oracles import optimum, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex import Penalty, Problem, Solution, lambda_max, solve
from lplr.convex import path as module
from lplr.convex.certificate import column_norms
from lplr.convex.path import PATIENCE, cross_validate, deal, grid, path, rounding, walk
from lplr.errors import RecipeError

PROGRAMMES = [
    (loss, norm, intercept, activation)
    for loss in ("squared", "logistic", "softmax")
    for norm, intercept, activation in [("group", True, "gated"), ("columns", False, "gated"), ("columns", True, "relu")]
] + [("squared", "nuclear", True, "gated")]
programmes = pytest.mark.parametrize("loss, norm, intercept, activation", PROGRAMMES)


def dual_value(loss: str, theta: np.ndarray, Y: np.ndarray) -> float:
    """-f*(-theta), written once more."""
    n = len(Y)
    if loss == "squared":
        return float((theta * Y).sum() - n / 2 * (theta**2).sum())
    Q = n * Y * theta if loss == "logistic" else Y - n * theta
    Q = (np.concatenate([Q, 1 - Q], 1) if loss == "logistic" else Q).clip(1e-300)
    return float(-(Q * np.log(Q)).sum() / n)


def certified(problem: Problem, penalty: Penalty, found: Solution, tol: float) -> None:
    """The gap, over all gates of the problem, from theta alone."""
    X, D, theta = problem.X.double(), problem.D.double(), found.theta
    pulled = torch.stack([X.T @ (D[:, i : i + 1] * theta) for i in range(D.shape[1])])
    if problem.activation == "relu":
        sizes = column_norms(problem, pulled)
    elif penalty.norm == "nuclear":
        sizes = torch.stack([torch.linalg.svdvals(p)[0] for p in pulled])
    else:
        sizes = pulled.norm(dim=1) if penalty.norm == "columns" else pulled.norm(dim=(1, 2))
    assert sizes.max() <= penalty.lam * (1 + 1e-9)
    if problem.intercept:
        assert theta.sum(0).abs().max() < 1e-9
    dual = dual_value(problem.loss, theta.numpy(), problem.Y.double().numpy())
    assert found.dual == pytest.approx(dual, rel=1e-9, abs=1e-12)
    assert found.converged and found.primal - dual <= tol * abs(found.primal) * (1 + 1e-6)


@programmes
def test_every_solution_is_the_optimum_at_its_own_lambda(loss, norm, intercept, activation):
    problem = random_problem(2, loss, n=14, d=2, P=4, C=2, intercept=intercept, activation=activation)
    tol = 1e-6
    found = path(problem, norm, steps=4, ratio=0.03, tol=tol)
    top = lambda_max(problem, norm)
    assert found.lams == pytest.approx([top * 0.03 ** (k / 3) for k in range(4)], rel=1e-12) and len(found) == 4
    assert not found.solutions[0].U.any() and found.solutions[1].U.any()
    sums, values = [], []
    for lam, one in found:
        penalty = Penalty(lam, norm)
        certified(problem, penalty, one, tol)
        if activation == "gated" or lam == found.lams[-1]:  # one programme of cones is slow enough for Clarabel
            assert one.primal == pytest.approx(optimum(problem, penalty), rel=tol + 1e-6)  # Clarabel's own accuracy
        sums.append(penalty.lengths(one.U).sum().item())
        values.append(one.primal)
    for k in range(3):  # descending: values fall, and are below every tangent, whose slope is the sum of norms
        assert values[k] >= values[k + 1] * (1 - tol) and sums[k + 1] >= sums[k]
    for k in range(4):
        for j in range(4):
            assert values[j] <= values[k] + (found.lams[j] - found.lams[k]) * sums[k] + tol * (values[j] + values[k])


SCREENED = [("squared", "group", "gated"), ("logistic", "group", "gated"), ("softmax", "columns", "gated")]
SCREENED = [(*programme, near) for programme in SCREENED for near in (module.NEAR, 10.0, 0.5)]


@pytest.mark.parametrize("loss, norm, activation, near", [*SCREENED, ("squared", "columns", "relu", 10.0)])
def test_a_screened_path_equals_cold_solves(monkeypatch, loss, norm, activation, near):
    """near 10: only gates that were active before are handed on, so that every new one is found by its violation."""
    monkeypatch.setattr(module, "NEAR", near)
    handed: list[int] = []

    def counted(problem, *args, **options):
        handed.append(problem.D.shape[1])
        return solve(problem, *args, **options)

    monkeypatch.setattr(module, "solve", counted)
    P, n = (6, 16) if activation == "relu" else (40, 30)
    problem = random_problem(4, loss, n=n, d=3, P=P, C=2, intercept=True, activation=activation)
    found = path(problem, norm, steps=5, ratio=0.1, tol=1e-6)
    if near != 0.5:
        assert min(handed) <= module.FEW * P and (near < 10 or len(handed) > 5)
    for lam, one in found:
        penalty = Penalty(lam, norm)
        certified(problem, penalty, one, 1e-6)
        cold = solve(problem, penalty, tol=1e-6)
        assert one.primal == pytest.approx(cold.primal, rel=1e-6) and one.U.shape == cold.U.shape
        assert one.primal >= cold.dual * (1 - 1e-12) and cold.primal >= one.dual * (1 - 1e-12)


@pytest.mark.parametrize("norm", ["group", "nuclear"])
def test_many_features_are_reduced_once(monkeypatch, norm):
    problem = random_problem(1, "squared", n=10, d=30, P=5, C=2, intercept=True)
    widths: set[int] = set()

    def counted(small, *args, **options):
        widths.add(small.X.shape[1])
        return solve(small, *args, **options)

    monkeypatch.setattr(module, "solve", counted)
    found = path(problem, norm, steps=4, ratio=0.1, tol=1e-6)
    assert widths == {10}
    for lam, one in found:
        assert one.U.shape == (5, 30, 2)
        certified(problem, Penalty(lam, norm), one, 2e-6)
        assert one.primal == pytest.approx(solve(problem, Penalty(lam, norm), tol=1e-6).primal, rel=4e-6)


def test_given_penalties_are_walked_down_and_a_callback_ends_the_walk():
    problem = random_problem(0, "squared", intercept=True)
    top = lambda_max(problem, "group")
    seen: list[float] = []

    def ended(lam: float, one: Solution) -> bool:
        seen.append(lam)
        return len(seen) == 2

    lams = [0.2 * top, 0.5 * top, 0.05 * top]
    assert path(problem, lams=lams).lams == tuple(sorted(lams, reverse=True))
    found = path(problem, lams=lams, callback=ended)
    assert found.lams == tuple(seen) == (lams[1], lams[0]) and len(found.solutions) == 2
    full = path(problem, lams=lams, callback=lambda *_: 1)  # true, but not True
    assert len(full) == 3


def test_a_path_cut_short_says_so():
    problem = random_problem(0, "logistic", n=40, d=4, P=12, intercept=True)
    found = path(problem, steps=4, ratio=0.01, max_iter=1, tol=1e-10)
    assert found.solutions[0].converged
    for lam, one in list(found)[1:]:
        assert one.status == "max_iterations" and "max_iter" in one.message and one.gap > 0
        best = solve(problem, Penalty(lam), tol=1e-9)
        assert one.dual <= best.primal and one.primal >= best.dual


def test_the_grid():
    problem = random_problem(0, "softmax", C=3, intercept=True)
    for norm in ("group", "columns", "nuclear"):
        found = grid(problem, norm, 7, 1e-2)
        assert len(found) == 7 and found[0] == lambda_max(problem, norm)
        assert found[-1] == pytest.approx(1e-2 * found[0], rel=1e-12)
        assert np.diff(np.log(found)) == pytest.approx(np.full(6, np.log(1e-2) / 6), rel=1e-9)
    assert grid(problem, "group", 1) == [lambda_max(problem, "group")]


@pytest.mark.parametrize("steps, ratio", [(0, 0.1), (-3, 0.1), (5, 0.0), (5, 1.0), (5, -0.1), (5, 2.0), (5, float("nan"))])
def test_grids_out_of_range(steps, ratio):
    problem = random_problem(0, "squared")
    for call in (grid, path):
        with pytest.raises(RecipeError, match="steps is .*, ratio .*: give at least one step"):
            call(problem, "group", steps=steps, ratio=ratio)


@pytest.mark.parametrize("lams", [[], [0.1, 0.0], [0.1, -1.0], [float("nan")], [float("inf")]])
def test_penalties_out_of_range(lams):
    with pytest.raises(RecipeError, match="lam"):
        path(random_problem(0, "squared"), lams=lams)


def test_other_misuse():
    problem = random_problem(0, "squared")
    with pytest.raises(RecipeError, match="unknown norm"):
        path(problem, "max")
    with pytest.raises(RecipeError, match="X holds NaN"):
        path(replace(problem, X=problem.X * float("nan")))
    with pytest.raises(RecipeError, match="tol"):
        path(problem, tol=0.0)
    with pytest.raises(RecipeError, match="unknown method"):
        path(problem, method="adam")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_targets_that_ask_for_no_weights(dtype, scale):
    problem = random_problem(3, "squared", n=30, intercept=True, dtype=dtype)
    constant = replace(problem, Y=torch.full_like(problem.Y, 0.1 * scale))
    found = path(constant, steps=20)
    assert len(found) == 1 and not found.solutions[0].U.any() and found.solutions[0].b[0] == pytest.approx(0.1 * scale, rel=1e-6)
    zero = replace(problem, Y=torch.zeros_like(problem.Y))
    assert len(grid(zero)) == 1 and grid(zero)[0] > 0
    assert len(grid(replace(problem, Y=problem.Y * scale))) == 20 and rounding(problem) < 1e-3 * lambda_max(problem, "group")


# Cross-validation


def held_out(loss: str, Z: torch.Tensor, Y: torch.Tensor) -> float:
    Z, Y = Z.double(), Y.double()
    if loss == "squared":
        return ((Z - Y) ** 2).sum(1).mean().item() / 2
    if loss == "logistic":
        return torch.log1p(torch.exp(-Y * Z)).mean().item()
    return torch.nn.functional.cross_entropy(Z, Y.argmax(1)).item()


@pytest.mark.parametrize(
    "loss, activation", [("squared", "gated"), ("logistic", "gated"), ("softmax", "gated"), ("squared", "relu")]
)
def test_cross_validation_by_brute_force(loss, activation):
    """Few gates and many samples: the weights, hence the losses of other samples, are unique."""
    P, C = (2, 1) if activation == "relu" else (4, 2)
    problem = random_problem(6, loss, n=31, d=2, P=P, C=C, intercept=True, activation=activation)
    classes = None if loss == "squared" else problem.Y[:, 0] if loss == "logistic" else problem.Y.argmax(1)
    folds = deal(31, 3, torch.Generator().manual_seed(0), classes)
    lams = grid(problem, "columns", 3, 0.05)
    found = cross_validate(problem, "columns", folds, lams=lams, tol=1e-8)
    assert found.losses.shape == (len(found.lams), 3) and found.lams == tuple(lams[: len(found.lams)])
    wanted = torch.zeros(len(found.lams), 3, dtype=torch.float64)
    counts = torch.stack([(folds == k).sum() for k in range(3)]).double()
    for k in range(3):
        left, kept = folds == k, folds != k
        part = replace(problem, X=problem.X[kept], Y=problem.Y[kept], D=problem.D[kept])
        for i, lam in enumerate(found.lams):
            one = solve(part, Penalty(lam, "columns"), tol=1e-8)
            W = one.U[0] - one.U[1] if activation == "relu" else one.U
            Z = torch.einsum("ni,nd,idc->nc", problem.D[left].double(), problem.X[left], W) + one.b
            wanted[i, k] = held_out(loss, Z, problem.Y[left])
    assert (found.losses - wanted).abs().max() < 3e-4  # a gap of 1e-8 leaves fits, and losses, of its root
    assert torch.allclose(found.weights, counts / 31, rtol=1e-12)
    assert found.best == int((wanted * counts / 31).sum(1).argmin()) and found.mean[found.best] == found.mean.min()


def test_samples_of_no_fold_are_in_all_of_them():
    problem = random_problem(0, "squared", n=20, intercept=True)
    folds = torch.arange(20) % 3 - 1  # -1, 0, 1
    lams = grid(problem, "group", 3, 0.1)
    found = cross_validate(problem, "group", folds, lams=lams, tol=1e-8)
    assert found.losses.shape == (3, 2) and found.weights.tolist() == pytest.approx([7 / 13, 6 / 13])
    kept = folds != 1
    one = solve(replace(problem, X=problem.X[kept], Y=problem.Y[kept], D=problem.D[kept]), Penalty(lams[0]), tol=1e-8)
    left = folds == 1
    U = torch.einsum("ni,nd,idc->nc", problem.D[left].double(), problem.X[left], one.U) + one.b
    assert found.losses[0, 1].item() == pytest.approx(held_out("squared", U, problem.Y[left]), rel=1e-6)
    with pytest.raises(RecipeError, match="no fold leaves a sample out"):
        cross_validate(problem, "group", torch.full((20,), -1), lams=lams)


def test_the_walk_ends_where_the_loss_has_stopped_to_fall():
    noise = random_problem(1, "squared", n=24, d=3, P=8, intercept=True)
    noise = replace(noise, Y=torch.randn(24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    folds = deal(24, 4, torch.Generator().manual_seed(0))
    lams = grid(noise, "group", 20, 1e-2)
    found = cross_validate(noise, "group", folds, lams=lams)
    assert len(found.lams) == found.best + 1 + PATIENCE < 20
    smooth = random_problem(1, "squared", n=40, d=3, P=3, linear=True)
    smooth = replace(smooth, Y=smooth.X[:, :2])
    lams = grid(smooth, "group", 6, 1e-2)
    found = cross_validate(smooth, "group", deal(40, 4, torch.Generator().manual_seed(0)), lams=lams)
    assert found.lams == tuple(lams) and found.best == 5


def test_a_walk_is_lazy():
    problem = random_problem(0, "squared")
    steps = walk(problem, "group", [lambda_max(problem, "group") / 2, -1.0])
    assert next(steps).converged
    with pytest.raises(RecipeError, match="lam is -1"):
        next(steps)


@given(n=st.integers(2, 60), folds=st.integers(2, 70), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_folds_without_classes(n, folds, seed):
    found = deal(n, folds, torch.Generator().manual_seed(seed))
    counts = torch.bincount(found, minlength=folds)
    assert found.shape == (n,) and counts.sum() == n and len(counts) == folds and counts.max() - counts.min() <= 1
    assert torch.equal(found, deal(n, folds, torch.Generator().manual_seed(seed)))


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=50), folds=st.integers(2, 8), seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_folds_of_classes(labels, folds, seed):
    classes = torch.tensor(labels)
    sizes = {c: labels.count(c) for c in set(labels)}
    if max(sizes.values()) < 2:
        with pytest.raises(RecipeError, match="no two of a class"):
            deal(len(labels), folds, torch.Generator().manual_seed(seed), classes)
        return
    found = deal(len(labels), folds, torch.Generator().manual_seed(seed), classes)
    for c, size in sizes.items():
        of = found[classes == c]
        if size == 1:
            assert of.tolist() == [-1]
        else:
            counts = torch.bincount(of, minlength=folds)
            assert counts.sum() == size and counts.max() - counts.min() <= 1 and len(counts) == folds
    dealt = torch.bincount(found[found >= 0], minlength=folds)
    assert dealt.max() - dealt.min() <= 1
    for k in found.unique():  # who trains without a fold has still seen every class
        assert k == -1 or set(classes[found != k].tolist()) == set(labels)


@pytest.mark.parametrize("n, folds, message", [(10, 1, "1 folds"), (10, 0, "0 folds"), (1, 2, "n_samples = 1")])
def test_folds_that_cannot_be_had(n, folds, message):
    with pytest.raises(RecipeError, match=message):
        deal(n, folds, torch.Generator())
