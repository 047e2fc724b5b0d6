"""One door to all solvers: checks the input, picks a method, returns a certified Solution.

newton   Newton's method on the lengths of the weights: gated, moderate n, any gap
fista    restarted FISTA: gated of any size, moderate gaps
admm     CRONOS repaired, then Newton: the ReLU's cones
cronos   CRONOS as published, for comparison
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lplr.convex.admm import admm
from lplr.convex.certificate import column_norms
from lplr.convex.cronos import cronos
from lplr.convex.fista import fista
from lplr.convex.losses import LOSSES
from lplr.convex.newton import newton
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem, check
from lplr.convex.reduce import compact, expand
from lplr.convex.solution import Callback, Run, Solution
from lplr.errors import RecipeError, choose

METHODS: dict[str, Callable[..., Solution]] = {"newton": newton, "fista": fista, "admm": admm, "cronos": cronos}
DENSE = {"cpu": 6000, "cuda": 30_000}  # samples up to which n x n factors are the faster way
WIDE = 2  # features a sample from which the programme is solved on an n x n factor of X (`reduce`)


def solve(
    problem: Problem,
    penalty: Penalty,
    *,
    method: str = "auto",
    tol: float = 1e-6,
    max_iter: int | None = None,
    warm: Solution | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Minimise f(Z; Y) + penalty to a relative duality gap `tol` (a number in (0, 1)), certified whatever the method.

    warm: a Solution of a problem of the same shapes.  callback(dict) sees every line of history; returning True ends the run.
    Raises RecipeError for input that cannot be fitted, combinations a method does not take, and unknown names; trouble with the
    numbers is the status of the Solution.
    """
    choose(LOSSES, problem.loss, "loss")
    check(problem)
    if not 0 < tol < 1:
        raise RecipeError(f"tol is {tol}: give a relative duality gap between 0 and 1, e.g. 1e-6")
    if max_iter is not None and max_iter < 0:
        raise RecipeError(f"max_iter is {max_iter}: give 0 or more, or None for the method's own limit")
    if problem.activation == "relu" and penalty.norm != "columns" and problem.Y.shape[1] > 1:
        raise RecipeError(f"the cones of relu are per output, norm {penalty.norm!r} couples outputs: use norm='columns'")
    if warm is not None:
        _fits(problem, warm)
    solver = choose(METHODS, pick(problem, penalty) if method == "auto" else method, "method")
    zero = _zero(problem, penalty, tol, callback)
    if zero is not None:
        return zero
    n, d = problem.X.shape
    if solver in (newton, fista) and problem.activation == "gated" and warm is None and d >= WIDE * n and n <= DENSE["cpu"]:
        start = time.perf_counter()
        small, factor = compact(problem)
        found = solver(small, penalty, tol=tol, max_iter=max_iter, callback=callback)
        return replace(expand(found, factor, problem, penalty, tol), seconds=time.perf_counter() - start)
    return solver(problem, penalty, tol=tol, max_iter=max_iter, warm=warm, callback=callback)


def pick(problem: Problem, penalty: Penalty) -> str:
    """The method of "auto"."""
    if problem.activation == "relu":
        return "admm"
    n, C = problem.Y.shape
    limit = DENSE.get(problem.Y.device.type, DENSE["cpu"])
    if problem.loss == "softmax":  # C + 1 factors and C inverses a step: FISTA was faster on 1,797 samples of 10 classes
        limit /= 3 * C**0.5
    dense = n <= limit and (C == 1 or penalty.norm != "nuclear")
    return "newton" if dense else "fista"


def lambda_max(problem: Problem, penalty: Penalty | str) -> float:
    """The least lam at which no gate is active, max_i ||A_i^T theta_0||_* at U = 0 with the best intercept; exact.

    Takes a Penalty, of which the norm counts, or the norm's name.
    """
    norm = penalty if isinstance(penalty, str) else penalty.norm
    pulled = problem.adjoint(_residual(problem)[0])
    sizes = column_norms(problem, pulled) if problem.activation == "relu" else Penalty(1.0, norm).dual_norm(pulled)
    return sizes.max().item()


def _residual(problem: Problem) -> tuple[Tensor, Tensor]:
    """theta_0 (n, C) and b (C,) at zero weights, in float64."""
    loss, Y = LOSSES[problem.loss], problem.Y.double()
    Z = torch.zeros_like(Y)
    b = loss.intercept(Z, Y) if problem.intercept else Z[0]
    return -loss.gradient(Z + b, Y), b


def _zero(problem: Problem, penalty: Penalty, tol: float, callback: Callback | None) -> Solution | None:
    """The zero solution where lam >= lambda_max, else None."""
    if lambda_max(problem, penalty) > penalty.lam * (1 + 1e-12):
        return None
    P, d, C = problem.shape
    U = torch.zeros((2, P, d, C) if problem.activation == "relu" else (P, d, C), dtype=problem.Y.dtype, device=problem.Y.device)
    run = Run(problem, penalty, tol, 0, callback)
    run.certify(U, _residual(problem)[1].to(U.dtype))
    found = run.finish("raise tol")
    return replace(
        found, message=f"lam {penalty.lam:.3g} is at least lambda_max, so no gate is active: lower lam; {found.message}"
    )


def _fits(problem: Problem, warm: Solution) -> None:
    P, d, C = problem.shape
    shape = (2, P, d, C) if problem.activation == "relu" else (P, d, C)
    if tuple(warm.U.shape) != shape or tuple(warm.theta.shape) != tuple(problem.Y.shape):
        raise RecipeError(f"warm has weights {tuple(warm.U.shape)}, this problem {shape}: warm starts need equal shapes")
