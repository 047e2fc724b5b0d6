"""One door to all solvers: checks the input, picks a method, returns a certified Solution.

newton   Newton's method on the lengths of the weights: gated, moderate n, any gap
fista    restarted FISTA: gated of any size, moderate gaps
admm     CRONOS repaired, then Newton: the ReLU's cones
cronos   CRONOS as published, for comparison
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lplr.convex.admm import admm
from lplr.convex.certificate import column_norms
from lplr.convex.cronos import cronos
from lplr.convex.fista import fista
from lplr.convex.losses import LOSSES
from lplr.convex.newton import newton
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem, centred_targets, check
from lplr.convex.reduce import compact, expand, recertified
from lplr.convex.solution import Callback, Run, Solution
from lplr.errors import RecipeError, choose

Solver = Callable[..., Solution]
METHODS: dict[str, Solver] = {"newton": newton, "fista": fista, "admm": admm, "cronos": cronos}
DENSE = {"cpu": 6000, "cuda": 30_000}  # samples up to which n x n factors are the faster way
WIDE = 2  # features a sample from which the programme is solved on an n x n factor of X (`reduce`)


@torch.no_grad()
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
    Y, means = centred_targets(problem)
    moved = replace(problem, Y=Y.to(problem.Y.dtype)) if means.any() else problem
    if warm is not None:
        warm = replace(warm, b=warm.b.double() - means if problem.intercept else torch.zeros_like(warm.b))
    zero = _zero(moved, penalty, tol, callback)
    settings = {"tol": tol, "max_iter": max_iter, "callback": callback}
    found = _solve(moved, penalty, solver, warm, method == "auto", settings) if zero is None else zero
    if not means.any():
        return found
    found = replace(found, b=(found.b.double() + means).to(found.b.dtype))
    return found if problem.Y.dtype == torch.float64 else recertified(found, problem, penalty, tol, "float32 leaves rounding")


def _solve(
    problem: Problem, penalty: Penalty, solver: Solver, warm: Solution | None, auto: bool, settings: dict[str, Any]
) -> Solution:
    """On a factor of X where features are many; on X of moderate entries for the splitting, whose penalties have a unit."""
    (n, d), start, tol = problem.X.shape, time.perf_counter(), settings["tol"]
    if solver in (newton, fista) and problem.activation == "gated" and warm is None and d >= WIDE * n and n <= DENSE["cpu"]:
        small, factor = compact(problem)
        found = expand(_descended(small, penalty, solver, None, auto, settings), factor, problem, penalty, tol)
    elif solver is admm and (unit := _unit(problem.X)) != 1:
        small, scaled = replace(problem, X=problem.X / unit), Penalty(penalty.lam / unit, penalty.norm)
        found = solver(small, scaled, warm=None if warm is None else replace(warm, U=warm.U * unit), **settings)
        found = recertified(replace(found, U=found.U / unit), problem, penalty, tol, "X of this size leaves rounding")
    else:
        return _descended(problem, penalty, solver, warm, auto, settings)
    return replace(found, seconds=time.perf_counter() - start)


def _descended(
    problem: Problem, penalty: Penalty, solver: Solver, warm: Solution | None, auto: bool, settings: dict[str, Any]
) -> Solution:
    """What the solver finds; where Newton's method that `auto` picked is stuck, FISTA goes on from there."""
    found = solver(problem, penalty, warm=warm, **settings)
    if not auto or solver is not newton or found.status in ("converged", "stopped") or settings["max_iter"] is not None:
        return found
    other = fista(problem, penalty, warm=found, **settings)
    if not other.gap < found.gap:
        return found
    history, count = found.history + other.history, found.iterations + other.iterations
    return replace(other, history=history, iterations=count, seconds=found.seconds + other.seconds)


def _unit(X: Tensor) -> float:
    """A power of two that makes the root mean square of X about one; 1 where it is between 1/4 and 4."""
    size = X.double().norm().item() / X.numel() ** 0.5
    return 1.0 if size == 0 or 0.25 <= size <= 4 else 2.0 ** round(math.log2(size))


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


@torch.no_grad()
def lambda_max(problem: Problem, penalty: Penalty | str) -> float:
    """The least lam at which no gate is active, max_i ||A_i^T theta_0||_* at U = 0 with the best intercept; exact.

    Takes a Penalty, of which the norm counts, or the norm's name.
    """
    choose(LOSSES, problem.loss, "loss")
    norm = penalty if isinstance(penalty, str) else penalty.norm
    pulled = problem.adjoint(_residual(problem)[0])
    sizes = column_norms(problem, pulled) if problem.activation == "relu" else Penalty(1.0, norm).dual_norm(pulled)
    return sizes.max().item()


def _residual(problem: Problem) -> tuple[Tensor, Tensor]:
    """theta_0 (n, C) and b (C,) at zero weights, in float64."""
    loss, (Y, means) = LOSSES[problem.loss], centred_targets(problem)
    Z = torch.zeros_like(Y)
    b = loss.intercept(Z, Y) if problem.intercept else Z[0]
    return -loss.gradient(Z + b, Y), b + means


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
    if tuple(warm.U.shape) != shape or tuple(warm.theta.shape) != tuple(problem.Y.shape) or tuple(warm.b.shape) != (C,):
        raise RecipeError(f"warm has weights {tuple(warm.U.shape)}, this problem {shape}: warm starts need equal shapes")
    if not all(bool(torch.isfinite(part).all()) for part in (warm.U, warm.b, warm.theta)):
        raise RecipeError("warm holds NaN or Inf: start from another Solution, or from none")
