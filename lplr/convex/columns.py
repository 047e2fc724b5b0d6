"""Column generation over gates: from sampled patterns towards the ReLU programme with all of them.

The programme with every pattern has the dual constraint |theta_c^T (X w)_+| <= lam for all ||w|| <= 1.  A restricted programme
is solved to its optimum (fully corrective Frank-Wolfe), its theta is asked for violators, their patterns join, and gates without
weights leave; the objective falls in every round but the last.  A pattern D with a = +-X^T (D o theta_c) is violated by
||Pi_K(a)|| - lam, K its cone (`cones`), so the violators are found by

    ascent of theta^T (X w)_+ on the sphere from many starts, then from cell to cell: where the projection leans on the
    hyperplane of a sample, the pattern beyond it is tried next.

What is then known of the full programme (X w)_+ without sampled gates:
- its optimum is at most the restricted one's primal value, whose own gap is exact for the gates in it;
- "best violated gate found" is a heuristic, for the maximum over w is NP-hard in d; it proves nothing;
- "certified": theta scaled by lam / mu is dual feasible, with mu the maximum over all patterns (enumerated, rank of X <= 3), or

      mu = max over +-theta of sqrt(||theta_+||_1 lambda_max(X^T diag(theta_+) X))  >=  theta^T (X w)_+,    by Cauchy-Schwarz.

Patterns of n points of rank r, recursively: every cell of the arrangement {x_j w = 0} touches a ray on which r - 1 independent
rows vanish; the other bits are those of the ray, those of the vanishing rows are the patterns of an arrangement of rank r - 1.
Source: Pilanci, Ergen, ICML 2020 (the programme); Bach, "Breaking the curse of dimensionality with convex neural networks", JMLR
2017 (incremental gates); Jaggi, "Revisiting Frank-Wolfe", ICML 2013.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lplr.convex import cones
from lplr.convex.certificate import dual_point
from lplr.convex.gates import clean, gaussian
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Callback, Solution
from lplr.convex.solve import solve
from lplr.errors import RecipeError

ENUMERATED = 20_000  # patterns up to which all are enumerated
ASCENT, FIRST, LEAST = 60, 0.5, 1e-4  # steps on the sphere, the first length and the one at which a start rests
CLIMBS, FRONT = 20, 16  # moves from cell to cell, and the cells that move
TIED = 1e-10  # of the lengths: scores that count as zero at a ray


@dataclass(frozen=True)
class Generated:
    """solution and D (n, P), its patterns; what is known of the programme with all patterns.

    best_violation: the largest |theta^T (X w)_+| found, to be compared with lam.  bound: a certified lower bound of the optimum
    over all patterns, by `how` ("enumeration" or "Cauchy-Schwarz").  history: a line for every round.
    """

    solution: Solution
    D: Tensor
    best_violation: float
    bound: float
    how: str
    message: str
    history: list[dict[str, Any]]


def column_generation(
    problem: Problem,
    penalty: Penalty,
    *,
    tol: float = 1e-3,
    gap: float = 1e-6,
    rounds: int = 20,
    starts: int = 256,
    add: int = 32,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Generated:
    """Solve a "relu" problem, gates added until the best violation found is at most (1 + tol) lam, or for so many rounds.

    gap: the relative duality gap of every restricted solve; starts: of the search; add: patterns a round at most.  A callback
    that returns True ends the rounds.  Raises RecipeError for a gated problem, where the gates are part of the model.
    """
    if problem.activation != "relu":
        raise RecipeError("column generation is for activation='relu': gated programmes have no optimal gates to look for")
    generator = generator or torch.Generator().manual_seed(0)
    lam, history, warm, rounds = penalty.lam, [], None, max(rounds, 1)
    problem = replace(problem, D=problem.D[:, clean(problem.D)] if clean(problem.D).numel() else problem.D[:, :1])
    for number in range(1, rounds + 1):
        solution = solve(problem, penalty, tol=gap, warm=warm)
        D, values = violators(problem, solution, generator, starts)
        worst = values[0].item() if len(values) else 0.0
        entry = {"round": number, "gates": problem.D.shape[1], "primal": solution.primal, "best_violation": worst}
        history.append(entry)
        stop = callback is not None and callback(entry) is True
        fresh = _fresh(problem.D, D[:, values > (1 + tol) * lam], add)
        if worst <= (1 + tol) * lam or stop or number == rounds or not fresh.shape[1]:
            break
        active = solution.U.flatten(2).norm(dim=2).amax(0) > 0
        problem = replace(problem, D=torch.cat([problem.D[:, active], fresh], 1))
        padding = torch.zeros_like(solution.U[:, :1]).expand(-1, fresh.shape[1], -1, -1)
        warm = replace(solution, U=torch.cat([solution.U[:, active], padding], 1))
    bound, how = lower_bound(problem, penalty, solution.theta)
    message = (
        f"best violated gate found: {worst / lam:.4f} lam (heuristic); certified by {how}: the optimum over all patterns is "
    )
    message += f"between {bound:.6g} and {solution.primal:.6g}"
    return Generated(solution, problem.D, worst, bound, how, message, history)


def violators(problem: Problem, solution: Solution, generator: torch.Generator, starts: int) -> tuple[Tensor, Tensor]:
    """Patterns D (n, K) and max over outputs and signs of their ||Pi_K(+-X^T (D o theta_c))|| (K,), largest first."""
    X = problem.X.double()
    theta = solution.theta.double()
    T = torch.cat([theta, -theta], 1)  # (n, 2 C)
    random = gaussian(X.shape[1], starts, generator).to(X)
    neurons = solution.U.double().permute(2, 0, 1, 3).flatten(1)
    W = torch.cat([random, neurons[:, neurons.norm(dim=0) > 0]], 1)
    D = torch.cat([X @ ascend(X, T[:, k], W) > 0 for k in range(T.shape[1])], 1)
    D = D[:, clean(D)]
    if not D.shape[1]:
        return D, torch.zeros(0, dtype=torch.float64, device=X.device)
    D, values, pushed = _measured(X, T, D)
    front, seen = slice(0, FRONT), [D]
    best = values
    at, leaning = D[:, front], pushed[front]
    for _ in range(CLIMBS):
        near = _neighbours(at, leaning)
        near = _fresh(torch.cat(seen, 1), near, near.shape[1])
        if not near.shape[1]:
            break
        near, values, pushed = _measured(X, T, near)
        seen.append(near)
        grown = values[front] > best.max() * (1 - 0.1)
        best = torch.cat([best, values])
        at, leaning = near[:, front][:, grown], pushed[front][grown]
        if not at.shape[1]:
            break
    order = best.argsort(descending=True)
    return torch.cat(seen, 1)[:, order], best[order]


def ascend(X: Tensor, theta: Tensor, W: Tensor) -> Tensor:
    """Unit columns with theta^T (X w)_+, theta (n,), no smaller than at those of W (d, S): gradient steps, halved on failure."""
    W = W / W.norm(dim=0).clamp_min(1e-300)
    length = torch.full_like(W[0], FIRST)

    def look(W: Tensor) -> tuple[Tensor, Tensor]:
        slope = X.T @ ((X @ W > 0) * theta[:, None])
        return (slope * W).sum(0), slope / slope.norm(dim=0).clamp_min(1e-300)

    value, slope = look(W)
    for _ in range(ASCENT):
        trial = W + length * slope
        trial = trial / trial.norm(dim=0).clamp_min(1e-300)
        new, new_slope = look(trial)
        better = new > value
        W, slope = torch.where(better, trial, W), torch.where(better, new_slope, slope)
        value, length = torch.where(better, new, value), torch.where(better, length * 1.2, length / 2)
        if (length < LEAST).all():
            break
    return W


def lower_bound(problem: Problem, penalty: Penalty, theta: Tensor) -> tuple[float, str]:
    """A certified lower bound of the optimum over all patterns, and how it was found; theta (n, C) is a Solution's."""
    every = enumerated(problem.X)
    if every is not None and every.shape[1]:
        return dual_point(replace(problem, D=every), penalty, theta.double())[1], "enumeration"
    theta, loss, Y = theta.double(), LOSSES[problem.loss], problem.Y.double()
    top = max(cauchy_schwarz(problem, theta[:, c]) for c in range(theta.shape[1]))
    room = penalty.lam / max(top, 1e-300)
    best = min(1.0, room)  # of theta
    if problem.loss == "squared":
        best = min(((Y * theta).sum() / (len(Y) * theta.square().sum()).clamp_min(1e-300)).item(), room)
    return loss.dual_value(theta * best, Y), "Cauchy-Schwarz"


def cauchy_schwarz(problem: Problem, theta: Tensor) -> float:
    """An upper bound of max |theta^T (X w)_+| over ||w|| <= 1, theta (n,)."""
    X = problem.X.double()
    bounds = []
    for part in (theta.clamp_min(0), (-theta).clamp_min(0)):
        root = part.sqrt()[:, None] * X
        gram = root.T @ root if X.shape[1] <= len(X) else root @ root.T
        bounds.append((part.sum() * torch.linalg.eigvalsh(gram)[-1].clamp_min(0)).sqrt().item())
    return max(bounds) * (1 + 1e-12)


def enumerated(X: Tensor) -> Tensor | None:
    """All patterns 1(X w > 0) (n, K) but the empty one; None where the rank of X is above 3 or they are more than ENUMERATED."""
    X = X.double()
    lengths = X.norm(dim=1)
    used = lengths > 0
    _, sizes, basis = torch.linalg.svd(X[used] / lengths[used, None], full_matrices=False)
    rank = int((sizes > TIED * sizes[:1]).sum())
    n = int(used.sum())
    count = 2 * sum((1, n, n * n // 2)[:rank])
    if not 1 <= rank <= 3 or count > ENUMERATED:
        return None if rank else torch.zeros(len(X), 0, dtype=torch.bool, device=X.device)
    found = torch.tensor(sorted(_cells((X[used] @ basis[:rank].T).tolist(), rank)), dtype=torch.bool, device=X.device)
    cells = torch.zeros(len(X), len(found), dtype=torch.bool, device=X.device)
    cells[used] = found.T
    return cells[:, cells.any(0)]


def _cells(rows: list[list[float]], rank: int) -> set[tuple[bool, ...]]:
    """Patterns of the open cells of the arrangement of rows (n, rank), none of which is zero."""
    X = torch.tensor(rows, dtype=torch.float64)
    X = X / X.norm(dim=1, keepdim=True)
    if rank == 1:
        up = tuple((X[:, 0] > 0).tolist())
        return {up, tuple(not bit for bit in up)}
    cells: set[tuple[bool, ...]] = set()
    for chosen in itertools.combinations(range(len(X)), rank - 1):
        _, sizes, V = torch.linalg.svd(X[list(chosen)])
        if sizes[-1] <= TIED:
            continue
        scores = X @ V[-1]
        tied = scores.abs() <= TIED
        inner = _cells((X[tied] @ V[:-1].T).tolist(), rank - 1)
        for sign in (1, -1):
            bits = sign * scores > 0
            for cell in inner:
                bits[tied] = torch.tensor(cell)
                cells.add(tuple(bits.tolist()))
    return cells


def _measured(X: Tensor, T: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D (n, K) ordered by the largest ||Pi_K(X^T (D o T_k))||, these values, and the rows (K, n) the projections lean on."""
    pulled = torch.einsum("np,nk,nd->pkd", D.double(), T, X)
    found = cones.projection(pulled, X, cones.signs(D)[:, None])
    values, which = found.point.norm(dim=2).max(1)
    order = values.argsort(descending=True)
    pushed = found.multipliers[torch.arange(len(which)), which] > 0
    return D[:, order], values[order], pushed[order]


def _neighbours(D: Tensor, pushed: Tensor) -> Tensor:
    """Patterns that differ from a column of D (n, K) in one of the rows pushed (K, n)."""
    cells = [D[:, i : i + 1] ^ torch.eye(len(D), dtype=torch.bool, device=D.device)[:, rows] for i, rows in enumerate(pushed)]
    return torch.cat(cells, 1) if cells else D[:, :0]


def _fresh(known: Tensor, D: Tensor, most: int) -> Tensor:
    """The first `most` columns of D that are neither empty, nor repeated, nor in known."""
    both = torch.cat([known, D], 1)
    kept = clean(both)
    return both[:, kept[kept >= known.shape[1]][:most]]
