"""The group Lasso on a dictionary of features that is too large to be held, with a certificate for all of it.

    minimise  f(F Z + 1 t^T; Y) + lam sum_k ||Z_k||    over Z (K, C), t (C,) with `intercept`, else zero;    F (n, K)

One row of Z a feature, ||Z_k|| its length: with one output the Lasso.  Only a working set of columns is held: its programme is
solved (`solve`: Newton's method or FISTA), then one pass over all columns, made anew block by block, tells ||F_k^T theta||.  The
largest of them scales theta to a dual point of the whole programme, whose gap is the certificate; columns that violate the dual
join, and those without weights and far from the boundary leave.  The objective never rises, so it ends.
Squared loss: with F_W = Q R of the working set, centred where there is an intercept,

    1/(2n) ||F_W Z - Y||^2 = 1/(2n) ||R Z - Q^T Y||^2 + const,    |W| rows in place of n.

Source: Tibshirani, JRSS B 1996; Johnson, Guestrin, "Blitz", ICML 2015 (working sets with duality gaps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.convex.certificate import Certificate, scaled
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem, centred_targets
from lplr.convex.solution import Callback, Run, Solution
from lplr.convex.solve import solve
from lplr.errors import RecipeError

FIRST = 100  # columns of the first working set
NEAR = 0.95  # of the dual's boundary: columns that stay without weights
ENTRIES = 1 << 22  # of a block of columns
MAX_ITER = 50


@dataclass(frozen=True)
class Lasso:
    """columns(chosen): the columns (n, k) of F with the numbers chosen (k,); count: K; Y (n, C), loss: as in `Problem`."""

    columns: Callable[[Tensor], Tensor]
    count: int
    Y: Tensor
    loss: str = "squared"
    intercept: bool = False

    def part(self, chosen: Tensor) -> Problem:
        """The programme on some columns: gates that are features, over the constant 1."""
        F = self.columns(chosen).to(self.Y)
        return Problem(torch.ones_like(self.Y[:, :1]), self.Y, F, self.loss, "gated", self.intercept)

    def adjoint(self, T: Tensor) -> Tensor:
        """F^T T (K, C) of all columns, T (n, C)."""
        blocks = torch.arange(self.count).split(max(1, ENTRIES // len(T)))
        return torch.cat([self.columns(chosen).to(T).T @ T for chosen in blocks])


def lambda_max(lasso: Lasso) -> float:
    """The least lam at which all weights are zero."""
    theta, _ = _start(lasso)
    return lasso.adjoint(theta).norm(dim=1).max().item()


@torch.no_grad()
def solve_lasso(
    lasso: Lasso,
    lam: float,
    *,
    tol: float = 1e-6,
    max_iter: int = MAX_ITER,
    warm: Solution | None = None,
    callback: Callback | None = None,
) -> Solution:
    """The optimum to a relative duality gap `tol` of the whole dictionary, in at most max_iter working sets; in float64.

    U (K, 1, C) are the weights Z.  warm: the Solution at another lam.  callback(dict) is told of every working set; True ends the
    run.  Raises RecipeError as `solve` does, and for an empty dictionary; trouble with the numbers is the Solution's status.
    """
    if lasso.count < 1:
        raise RecipeError("the dictionary is empty: give features")
    if not 0 < tol < 1 or max_iter < 1:
        raise RecipeError(f"tol is {tol}, max_iter {max_iter}: give a relative gap between 0 and 1, and 1 or more working sets")
    if warm is not None and warm.U.shape != (lasso.count, 1, lasso.Y.shape[1]):
        raise RecipeError(f"warm has weights {tuple(warm.U.shape)}, the dictionary {lasso.count} columns: start from none")
    lasso, penalty = replace(lasso, Y=lasso.Y.double()), Penalty(lam)
    theta, b = _start(lasso)
    sizes = lasso.adjoint(theta).norm(dim=1)
    if not torch.isfinite(sizes).all():
        at = int((~torch.isfinite(sizes)).nonzero()[0])
        raise RecipeError(f"Y or column {at} of the dictionary holds NaN or Inf: drop these samples or features")
    U = torch.zeros(lasso.count, 1, lasso.Y.shape[1], dtype=torch.float64) if warm is None else warm.U.double()
    if warm is not None:
        sizes = lasso.adjoint(warm.theta.double()).norm(dim=1)
    chosen = (U != 0).flatten(1).any(1)
    chosen[sizes.topk(min(FIRST, lasso.count)).indices] = True
    run = Run(lasso.part(torch.zeros(1, dtype=torch.long)), penalty, tol, max_iter, callback)
    within = max(tol / 2, 1e-3)
    while not run.over:
        at = chosen.nonzero()[:, 0]
        problem = lasso.part(at)
        weights, b, theta = _solved(problem, penalty, within, Start(U[at], b))
        U = torch.zeros_like(U)
        U[at] = weights
        run.count += 1
        proof, sizes = _certified(lasso, penalty, U, b, problem.fit(weights, b), theta)
        run.take(U, b, proof)
        active = (U != 0).flatten(1).any(1)
        run.record(primal=run.primal, dual=run.dual, columns=len(at), active=int(active.sum()))
        outside = ~chosen & (sizes > lam * (1 + tol / 2))
        run.stalled = not outside.any() and within <= tol / 2 and not run.reached
        if run.stalled:
            break
        within = tol / 2 if not outside.any() else max(tol / 2, min(within, 0.1 * proof.gap / abs(proof.primal)))
        most = max(FIRST, 2 * int(active.sum()))
        if outside.sum() > most:
            outside &= sizes >= torch.where(outside, sizes, 0.0).topk(most).values[-1]
        chosen = active | (chosen & (sizes >= NEAR * lam)) | outside
    return run.finish("raise max_iter or tol")


@dataclass(frozen=True)
class Start:
    """Weights (k, 1, C) and intercept (C,) to begin from."""

    U: Tensor
    b: Tensor


def _start(lasso: Lasso) -> tuple[Tensor, Tensor]:
    """theta (n, C) and the intercept (C,) of zero weights."""
    Y, loss = lasso.Y.double(), LOSSES[lasso.loss]
    Z = torch.zeros_like(Y)
    b = loss.intercept(Z, Y) if lasso.intercept else Z[0]
    return -loss.gradient(Z + b, Y), b


def _certified(
    lasso: Lasso, penalty: Penalty, U: Tensor, b: Tensor, Z: Tensor, theta: Tensor | None
) -> tuple[Certificate, Tensor]:
    """The certificate of weights U (K, 1, C) with fit Z (n, C), and ||F_k^T theta|| (K,) of its theta before that was scaled.

    The residual, or a solver's own theta if that is better, in one pass.
    """
    problem = lasso.part(torch.zeros(1, dtype=torch.long))
    loss, (Y, means) = LOSSES[lasso.loss], centred_targets(problem)
    Z = Z - means
    duals = [-loss.gradient(Z, Y)] + ([theta] if theta is not None else [])
    if lasso.intercept:
        duals = [loss.centred(T, Y) for T in duals]
    pulled = lasso.adjoint(torch.cat(duals, 1)).unflatten(1, (len(duals), -1))  # (K, 1 or 2, C)
    kkt = (U - penalty.prox(U + pulled[:, :1], 1.0)).flatten(1).norm(dim=1).max().item()
    primal = loss.value(Z, Y) + penalty.value(U)
    found = []
    for T, sizes in zip(duals, pulled.norm(dim=2).T, strict=True):
        found.append((*scaled(lasso.loss, Y, T, penalty.lam / sizes.amax(0, keepdim=True).clamp_min(1e-300)), sizes))
    best, dual, sizes = max(found, key=lambda candidate: candidate[1])
    return Certificate(primal, best, dual, kkt), sizes


def _solved(problem: Problem, penalty: Penalty, tol: float, start: Start) -> tuple[Tensor, Tensor, Tensor | None]:
    """U, b and theta of the programme on a working set.

    Squared loss: theta is the residual, and with fewer columns than samples the factor R takes the place of the columns.
    """
    n, k = problem.D.shape
    if problem.loss != "squared" or k >= n:
        found = solve(problem, penalty, tol=tol, warm=_warm(problem, start))
        return found.U, found.b, found.theta if problem.loss != "squared" else None
    Y, means = centred_targets(problem)
    offsets = problem.D.mean(0) if problem.intercept else torch.zeros_like(problem.D[0])
    Q, R = torch.linalg.qr(problem.D - offsets)
    unit = (k / n) ** 0.5  # of R: 1 / (2 k) in place of 1 / (2 n)
    small = Problem(torch.ones_like(R[:, :1]), unit * (Q.T @ Y), unit * R)
    found = solve(small, penalty, tol=tol, warm=_warm(small, start))
    return found.U, means - offsets @ found.U[:, 0] if problem.intercept else torch.zeros_like(means), None


def _warm(problem: Problem, start: Start) -> Solution | None:
    """A Solution that is no more than a start."""
    if not start.U.any():
        return None
    unknown = {"primal": 0.0, "dual": 0.0, "gap": 0.0, "kkt": 0.0, "iterations": 0, "seconds": 0.0}
    return Solution(start.U, start.b, torch.zeros_like(problem.Y), **unknown, status="stopped", message="")
