"""Solutions for a row of penalties, from the least lambda without active gates down, each begun where the last one ended.

    lambda_k = lambda_max * ratio^{k / (steps - 1)},  k = 0 .. steps - 1

The optimal value is concave and increasing in lambda, with slope the optimal sum ||U_i||; at lambda_max it is that of the best
constant.  Every solution has its own certificate.
Screening: from lambda' to the next lambda only gates near the dual's boundary, ||A_i^T theta'|| >= 0.97 lambda', and those active
before, are handed to the solver: a guess.  The certificate is for all gates: where it is not small enough, the gates that
violate the dual are added and the programme is solved again, so nothing is lost.
Cross-validation walks down such a path on all folds at once and ends where the validation loss has stopped to fall.
Source: Friedman, Hastie, Tibshirani, J. Stat. Softw. 2010 (the grid); Tibshirani et al., "Strong rules for discarding predictors
in lasso-type problems", JRSS B 2012 (a guess, checked afterwards).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.convex.certificate import column_norms
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem, check
from lplr.convex.reduce import Factor, compact, expand
from lplr.convex.solution import Run, Solution
from lplr.convex.solve import DENSE, WIDE, lambda_max, solve
from lplr.errors import RecipeError

NEAR = 0.97  # of the dual's boundary: gates beyond it may become active at the next lambda
FEW = 0.7  # of the gates: where more are likely to be active, all are handed to the solver
PATIENCE = 4  # steps of a cross-validation without a lower loss
NOISE = 1e-13  # of ||X|| ||Y|| / n: a lambda_max below this is rounding


@dataclass(frozen=True)
class Path:
    """lams, descending, and the Solution of each."""

    lams: tuple[float, ...]
    solutions: tuple[Solution, ...]

    def __len__(self) -> int:
        return len(self.lams)

    def __iter__(self) -> Iterator[tuple[float, Solution]]:
        return zip(self.lams, self.solutions, strict=True)


@dataclass(frozen=True)
class CrossValidation:
    """Losses (steps, folds) of the samples left out, at descending lams; fewer than asked for where the walk ended early."""

    lams: tuple[float, ...]
    losses: Tensor
    weights: Tensor  # (folds,): shares of the samples

    @property
    def mean(self) -> Tensor:
        """(steps,)."""
        return self.losses @ self.weights

    @property
    def best(self) -> int:
        """The step of the least mean loss, the first of equal ones."""
        return int(self.mean.argmin())


def path(
    problem: Problem,
    norm: str = "group",
    *,
    lams: Sequence[float] | None = None,
    steps: int = 20,
    ratio: float = 1e-3,
    tol: float = 1e-6,
    method: str = "auto",
    max_iter: int | None = None,
    callback: Callable[[float, Solution], object] | None = None,
) -> Path:
    """Minimise f + lam sum ||U_i|| for every lam of `lams`, or of the grid of `steps` from lambda_max to ratio lambda_max.

    Each to a relative duality gap `tol`; trouble with the numbers is the status of a Solution.  callback(lam, solution) that
    returns True ends the path there.  Raises RecipeError as `solve` does, and for a grid out of range.
    """
    check(problem)
    chosen = grid(problem, norm, steps, ratio) if lams is None else sorted(map(float, lams), reverse=True)
    if not chosen:
        raise RecipeError("lams is empty: give one penalty or more, or None for a grid")
    small, way = shrink(problem)
    found: list[Solution] = []
    for lam, solution in zip(chosen, walk(small, norm, chosen, tol=tol, method=method, max_iter=max_iter), strict=True):
        found.append(solution if way is None else expand(solution, way, problem, Penalty(lam, norm), tol))
        if callback is not None and callback(lam, found[-1]) is True:
            break
    return Path(tuple(chosen[: len(found)]), tuple(found))


def shrink(problem: Problem) -> tuple[Problem, Factor | None]:
    """The programme on a factor of X where features are many (`reduce`), else the same."""
    n, d = problem.X.shape
    if problem.activation == "relu" or d < WIDE * n or n > DENSE["cpu"] or not problem.X.any():
        return problem, None
    return compact(problem)


def grid(problem: Problem, norm: str = "group", steps: int = 20, ratio: float = 1e-3) -> list[float]:
    """`steps` penalties from lambda_max to ratio lambda_max, equal factors apart; one alone where targets ask for no weights."""
    if steps < 1 or not 0 < ratio < 1:
        raise RecipeError(f"steps is {steps}, ratio {ratio}: give at least one step, and a ratio between 0 and 1")
    top, floor = lambda_max(problem, norm), rounding(problem)
    if top <= floor:
        return [max(floor, torch.finfo(torch.float64).tiny)]
    return [top * ratio ** (k / max(steps - 1, 1)) for k in range(steps)]


def rounding(problem: Problem) -> float:
    """What a lambda_max that is zero in exact arithmetic may be computed as."""
    X = math.sqrt(sum(problem.rows(rows, torch.float64).square().sum().item() for rows in problem.blocks()))
    eps = torch.finfo(problem.X.dtype).eps / torch.finfo(torch.float64).eps
    return NOISE * eps * X * problem.Y.double().norm().item() / len(problem.X)


def walk(
    problem: Problem,
    norm: str,
    lams: Sequence[float],
    *,
    tol: float = 1e-6,
    method: str = "auto",
    max_iter: int | None = None,
) -> Iterator[Solution]:
    """The solutions of descending lams, one at a time."""
    last: tuple[float, Solution] | None = None
    for lam in lams:
        penalty = Penalty(lam, norm)
        if last is None:
            solution = solve(problem, penalty, method=method, tol=tol, max_iter=max_iter)
        else:
            solution = _next(problem, penalty, *last, tol, method, max_iter)
        yield solution
        last = lam, solution


def _next(
    problem: Problem, penalty: Penalty, lam: float, warm: Solution, tol: float, method: str, max_iter: int | None
) -> Solution:
    """The solution at penalty from the one at lam, on the gates that are likely to be active where those are few."""
    start, gates = time.perf_counter(), 1 if problem.activation == "relu" else 0
    kept = (warm.U != 0).movedim(gates, 0).flatten(1).any(1) | (_sizes(problem, penalty, warm.theta) >= NEAR * lam)
    while kept.any() and kept.double().mean() <= FEW:
        part = replace(problem, D=problem.D[:, kept])
        short = replace(warm, U=warm.U.movedim(gates, 0)[kept].movedim(0, gates).contiguous())
        found = solve(part, penalty, method=method, tol=tol / 2, max_iter=max_iter, warm=short if short.U.any() else None)
        warm = _all_gates(problem, penalty, found, kept, tol, gates)
        missing = ~kept & (_sizes(problem, penalty, found.theta) > penalty.lam)
        if warm.converged or not missing.any():
            return replace(warm, seconds=time.perf_counter() - start)
        kept = kept | missing
    return solve(problem, penalty, method=method, tol=tol, max_iter=max_iter, warm=warm if warm.U.any() else None)


def _sizes(problem: Problem, penalty: Penalty, theta: Tensor) -> Tensor:
    """||A_i^T theta||_* (P,)."""
    pulled = problem.adjoint(theta.double())
    return column_norms(problem, pulled).amax(1) if problem.activation == "relu" else penalty.dual_norm(pulled)


def _all_gates(problem: Problem, penalty: Penalty, found: Solution, kept: Tensor, tol: float, gates: int) -> Solution:
    """A solution for the gates kept, certified for all of them."""
    shape = list(found.U.shape)
    shape[gates] = len(kept)
    U = found.U.new_zeros(shape)
    U.movedim(gates, 0)[kept] = found.U.movedim(gates, 0)
    run = Run(problem, penalty, tol, found.iterations + (found.status != "max_iterations"), None)
    run.count, run.history, run.stalled = found.iterations, found.history, not found.converged
    run.certify(U, found.b, found.theta)
    return run.finish("raise max_iter or tol")


def deal(n: int, folds: int, generator: torch.Generator, classes: Tensor | None = None) -> Tensor:
    """The fold (n,) that leaves each sample out: 0 .. folds - 1, or -1 for the only sample of a class, which all folds need.

    classes (n,): every class is dealt out evenly.  Raises RecipeError where folds cannot be had.
    """
    if folds < 2:
        raise RecipeError(f"{folds} folds: cross-validation needs at least 2, or give a number for lam")
    order = torch.randperm(n, generator=generator)
    found, at = torch.full((n,), -1), 0
    for group in [order] if classes is None else [order[classes[order] == c] for c in classes.unique()]:
        if len(group) > 1:
            found[group] = (at + torch.arange(len(group))) % folds
            at += len(group)
    if at < 2:
        raise RecipeError(f"n_samples = {n} with no two of a class: cross-validation needs more, or give a number for lam")
    return found


def cross_validate(
    problem: Problem,
    norm: str,
    folds: Tensor,
    *,
    lams: Sequence[float],
    tol: float = 1e-3,
    method: str = "auto",
    max_iter: int | None = None,
    callback: Callable[[int], object] | None = None,
) -> CrossValidation:
    """Mean losses of left-out samples along a path; folds (n,): the number of the fold that leaves a sample out, -1 for none.

    The same gates in every fold.  Ends PATIENCE steps after the least mean loss.  callback(steps done) is told of every step.
    """
    numbers = [int(k) for k in folds.unique() if k >= 0]
    if not numbers:
        raise RecipeError("no fold leaves a sample out: give folds with numbers from 0 on, or a fixed lam")
    parts, walks = [], []
    for k in numbers:
        parts.append(_rows(problem, folds == k))
        walks.append(walk(_rows(problem, folds != k), norm, lams, tol=tol, method=method, max_iter=max_iter))
    weights = torch.tensor([float(len(part.X)) for part in parts], dtype=torch.float64)
    found = CrossValidation((), torch.empty(0, len(parts), dtype=torch.float64), weights / weights.sum())
    for lam in lams:
        row = [LOSSES[p.loss].value(p.fit(s.U, s.b), p.Y) for p, s in ((p, next(w)) for p, w in zip(parts, walks, strict=True))]
        losses = torch.cat([found.losses, torch.tensor([row], dtype=torch.float64)])
        found = replace(found, lams=(*found.lams, lam), losses=losses)
        if callback is not None:
            callback(len(found.lams))
        if len(found.lams) - 1 - found.best >= PATIENCE:
            break
    return found


def _rows(problem: Problem, kept: Tensor) -> Problem:
    return replace(problem, X=problem.X[kept], Y=problem.Y[kept], D=problem.D[kept])
