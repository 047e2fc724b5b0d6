"""The Lasso on dictionaries against Clarabel, scikit-learn and its own optimality conditions, computed without it."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from lplr.convex import lasso as module
from lplr.convex.certificate import certify, screen
from lplr.convex.lasso import Lasso, lambda_max, solve_lasso
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.errors import RecipeError

SOLVED = 1e-6  # relative: Clarabel's own default tolerance is 1e-8


def example(seed: int, loss: str, n: int = 30, K: int = 50, C: int = 1) -> tuple[Tensor, Tensor]:
    """Hinges, highly correlated, and targets."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=draw, dtype=torch.float64)
    w = torch.randn(2, K, generator=draw, dtype=torch.float64)
    F = (x @ w + torch.randn(K, generator=draw, dtype=torch.float64)).clamp_min(0)
    Z = torch.cat([x.sum(1, keepdim=True).sin(), x], 1)[:, :C] + 0.3 * torch.randn(n, C, generator=draw, dtype=torch.float64)
    if loss == "logistic":
        return F, torch.where(Z > 0, 1.0, -1.0).double()
    return F, torch.nn.functional.one_hot(Z.argmax(1), C).double() if loss == "softmax" else Z + 5


def of(F: Tensor, Y: Tensor, loss: str = "squared", intercept: bool = True) -> Lasso:
    return Lasso(lambda chosen: F[:, chosen], F.shape[1], Y, loss, intercept)


def optimum(F: Tensor, Y: Tensor, loss: str, intercept: bool, lam: float) -> float:
    (n, K), C = F.shape, Y.shape[1]
    U, b = cp.Variable((K, C)), cp.Variable((1, C))
    Z = F.numpy() @ U + (np.ones((n, 1)) @ b if intercept else 0)
    y = Y.numpy()
    value = {
        "squared": lambda: cp.sum_squares(Z - y) / (2 * n),
        "logistic": lambda: cp.sum(cp.logistic(cp.multiply(-y, Z))) / n,
        "softmax": lambda: (cp.sum(cp.log_sum_exp(Z, axis=1)) - cp.sum(cp.multiply(y, Z))) / n,
    }[loss]()
    found = cp.Problem(cp.Minimize(value + lam * cp.sum(cp.norm(U, 2, axis=1))))
    return float(found.solve(solver=cp.CLARABEL))  # type: ignore[arg-type]


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("loss, C", [("squared", 1), ("squared", 3), ("logistic", 1), ("softmax", 3)])
@pytest.mark.parametrize("share", [0.3, 0.01])
def test_the_optimum(loss: str, C: int, intercept: bool, share: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FIRST", 5)  # several working sets
    monkeypatch.setattr(module, "ENTRIES", 200)  # and blocks
    F, Y = example(1, loss, C=C)
    problem = of(F, Y, loss, intercept)
    lam = share * lambda_max(problem)
    found = solve_lasso(problem, lam, tol=1e-8)
    assert found.converged and found.relative_gap <= 1e-8 and found.iterations >= 1
    assert found.primal == pytest.approx(optimum(F, Y, loss, intercept, lam), rel=SOLVED)
    whole = Problem(torch.ones_like(Y[:, :1]), Y, F, loss, "gated", intercept)  # the certificate, by the general code
    proof = certify(whole, Penalty(lam), found.U, found.b, found.theta)
    assert proof.primal == pytest.approx(found.primal, rel=1e-12) and proof.gap <= 1e-8 * proof.primal
    assert (F.T @ found.theta).norm(dim=1).max() <= lam * (1 + 1e-12)
    assert not intercept or found.theta.sum(0).abs().max() < 1e-12


def test_scikit_learn_agrees():
    linear_model = pytest.importorskip("sklearn.linear_model")
    F, Y = example(2, "squared", n=200, K=80)
    problem = of(F, Y)
    lam = 0.02 * lambda_max(problem)
    peer = linear_model.Lasso(alpha=lam, tol=1e-12, max_iter=1_000_000).fit(F.numpy(), Y[:, 0].numpy())
    found = solve_lasso(problem, lam, tol=1e-10)
    value = 0.5 * np.mean((peer.predict(F.numpy()) - Y[:, 0].numpy()) ** 2) + lam * np.abs(peer.coef_).sum()
    assert found.primal <= value * (1 + 1e-10) and found.primal == pytest.approx(value, rel=1e-6)
    assert F @ found.U[:, 0] + found.b == pytest.approx(torch.from_numpy(peer.predict(F.numpy()))[:, None], abs=1e-3)


def test_lambda_max_is_where_weights_begin():
    F, Y = example(3, "squared")
    top = lambda_max(of(F, Y))
    assert top == pytest.approx((F.T @ (Y - Y.mean(0))).abs().max().item() / len(Y), rel=1e-12)
    assert not solve_lasso(of(F, Y), top * (1 + 1e-9)).U.any() and solve_lasso(of(F, Y), 0.99 * top).U.any()


def test_a_warm_start_finds_the_same():
    F, Y = example(4, "squared", n=60, K=400)
    problem = of(F, Y)
    lam = 0.05 * lambda_max(problem)
    before = solve_lasso(problem, 2 * lam)
    warm, cold = solve_lasso(problem, lam, tol=1e-9, warm=before), solve_lasso(problem, lam, tol=1e-9)
    assert warm.primal == pytest.approx(cold.primal, rel=2e-9) and warm.converged
    with pytest.raises(RecipeError, match="start from none"):
        solve_lasso(of(F[:, :9], Y), lam, warm=before)


def test_what_it_tells_and_how_it_ends():
    F, Y = example(5, "squared", n=60, K=300)
    lam = 0.01 * lambda_max(of(F, Y))
    seen: list[dict[str, float]] = []
    found = solve_lasso(of(F, Y), lam, callback=lambda line: bool(seen.append(line)) or len(seen) == 1)
    assert found.status == "stopped" and set(seen[0]) >= {"primal", "dual", "columns", "active"}
    short = solve_lasso(of(F, Y), lam, tol=1e-9, max_iter=1)
    assert short.status == "max_iterations" and short.primal >= short.dual
    best = solve_lasso(of(F, Y), lam, tol=1e-9)
    assert short.dual <= best.primal <= short.primal * (1 + 1e-9)


def test_hard_dictionaries():
    F, Y = example(6, "squared")
    lam = 0.05 * lambda_max(of(F, Y))
    alone = solve_lasso(of(F, Y), lam, tol=1e-8)
    twice = solve_lasso(of(torch.cat([F, F, 0 * F], 1), Y), lam, tol=1e-8)  # columns that are equal, or zero
    assert twice.converged and twice.primal == pytest.approx(alone.primal, rel=2e-8)
    huge = solve_lasso(of(1e6 * F, 1e6 * Y), 1e12 * lam, tol=1e-8)  # units
    assert huge.converged and huge.primal == pytest.approx(1e12 * alone.primal, rel=2e-8)
    constant = solve_lasso(of(F, torch.full_like(Y, 3.0)), 0.1)
    assert constant.converged and not constant.U.any() and constant.b.item() == pytest.approx(3)
    nothing = solve_lasso(of(0 * F, Y), 0.1)
    assert nothing.converged and not nothing.U.any()
    broken = F.clone()
    broken[3, 7] = torch.nan
    with pytest.raises(RecipeError, match="column 7 of the dictionary holds NaN"):
        solve_lasso(of(broken, Y), lam)
    for more in ({"tol": 0.0}, {"tol": 1.0}, {"max_iter": 0}):
        with pytest.raises(RecipeError, match="give a relative gap"):
            solve_lasso(of(F, Y), lam, **more)
    with pytest.raises(RecipeError, match="empty"):
        solve_lasso(of(F[:, :0], Y), lam)


def test_screening_of_features_is_safe():
    """Features of any size: what `screen` says is zero is zero at the optimum."""
    F, Y = example(7, "squared")
    F = F * torch.logspace(-2, 2, F.shape[1], dtype=torch.float64)
    problem = Problem(torch.ones_like(Y), Y, F, "squared", "gated", True)
    penalty = Penalty(0.1 * lambda_max(of(F, Y)))
    rough, best = (solve_lasso(of(F, Y), penalty.lam, tol=tol) for tol in (1e-2, 1e-10))
    kept = screen(problem, penalty, rough.primal, rough.theta)
    assert not best.U[~kept].any() and not kept.all()
