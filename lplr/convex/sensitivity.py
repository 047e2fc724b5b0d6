"""How the optimum moves with lam and with the targets, and its degrees of freedom: derivatives at a unique optimum.

Let A hold the columns of active blocks (and of the intercept), u their weights, f'' = B the loss's Hessian at the fit, and

    H = A^T B A + lam M,    M = blockdiag((I - u_b u_b^T / ||u_b||^2) / ||u_b||),  0 for the intercept.

A^T f'(A u) + lam u_b / ||u_b|| = 0 stays true, so

    du/dlam = -H^{-1} (u_b / ||u_b||),    du/dY = H^{-1} A^T / n  (squared loss),    dof = tr(A H^{-1} A^T B),

dof = sum_j d z_j / d y_j for the squared loss (Stein's degrees of freedom), else the usual effective number of parameters.
ReLU: rows of a cone that its weights lie on stay tight, so u_b moves in the null space of these rows only.
Holds where the optimum is unique and strictly complementary: blocks at zero have ||q_b|| < lam, tight rows a positive multiplier.
There the active blocks, hence the formulas, stay the same nearby; elsewhere one-sided derivatives may differ.
Source: Mishkin, Pilanci, "Optimal sets and solution paths of ReLU networks", ICML 2023, section 5; Vaiter, Deledalle, Peyre,
Fadili, Dossal, "The degrees of freedom of partly smooth regularizers", 2017.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.convex.newton import Model
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem, centred_targets
from lplr.convex.solution import Solution
from lplr.errors import RecipeError

TIGHT = 1e-6  # of ||x_j|| ||w||: margins below this are tight
SINGULAR = 1e-10  # eigenvalues of H below this, of the largest, belong to an optimum that is not unique


@dataclass(frozen=True)
class Sensitivity:
    """Derivatives of U (P, d, C), or V (2, P, d, C), and b (C,) at an optimum; degrees_of_freedom as above.

    by_lam: (dU/dlam, db/dlam).
    """

    by_lam: tuple[Tensor, Tensor]
    degrees_of_freedom: float
    _spread: Tensor  # (entries of U and b, parameters)
    _by_targets: Tensor | None  # (parameters, n C)
    _shape: tuple[int, ...]

    def by_targets(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """(dU, db) for targets that move by direction (n, C); squared loss only, RecipeError for others."""
        if self._by_targets is None:
            raise RecipeError("targets of this loss are classes, which do not move: take the squared loss")
        return _split(self._spread @ (self._by_targets @ direction.double().flatten()), self._shape)


def sensitivity(problem: Problem, penalty: Penalty, solution: Solution) -> Sensitivity:
    """Derivatives at a solution whose relative gap should be 1e-10 or less; dense in the active weights.

    Raises RecipeError for the nuclear norm of several outputs, and where the optimum is not unique.
    """
    C = problem.Y.shape[1]
    if penalty.norm == "nuclear" and C > 1:
        raise RecipeError("the nuclear norm has no derivatives here: use norm 'group' or 'columns'")
    U, b = solution.U.double(), solution.b.double()
    spread, units, curved = _active(problem, penalty, U, b)
    Y, means = centred_targets(problem)
    model = Model(replace(problem, X=problem.X.double(), Y=Y), problem.fit(U, b - means))
    A = torch.stack([problem.fit(*_split(column, tuple(U.shape))) for column in spread.T], 1) if spread.shape[1] else None
    A = torch.zeros(len(Y), 0, C, dtype=torch.float64) if A is None else A  # (n, parameters, C)
    BA = torch.stack([model.apply(A[:, k].contiguous()) for k in range(A.shape[1])], 1) if A.shape[1] else A
    gram = torch.einsum("npc,nqc->pq", A, BA)
    H = gram + penalty.lam * curved
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    floor = SINGULAR * values[-1].item() if len(values) else 0.0
    flat = values <= floor
    if problem.loss == "softmax" and problem.intercept:  # constants of b change nothing; the derivative of mean zero is taken
        flat[0] = False
        values[0] = torch.inf if values[0] <= floor else values[0]
    if flat.any():
        raise RecipeError(
            "the optimum is not unique, so it has no derivative: take `prune.minimal`, or one gate less of equal ones"
        )
    inverse = (vectors / values) @ vectors.T
    by_targets = inverse @ A.permute(1, 0, 2).flatten(1) / len(Y) if problem.loss == "squared" else None
    by_lam = _split(-spread @ (inverse @ units), tuple(U.shape))
    return Sensitivity(by_lam, float((inverse * gram).sum()), spread, by_targets, tuple(U.shape))


def _active(problem: Problem, penalty: Penalty, U: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (entries of U and b, p) along which active weights move, u / ||u|| (p,) and M (p, p) in their coordinates."""
    d, C = U.shape[-2:]
    blocks = []  # (entries of U, basis)
    for index in U.flatten(-2).norm(dim=-1).nonzero():
        where = torch.arange(U.numel()).view(U.shape)[tuple(index)]
        if penalty.norm != "columns" and problem.activation == "gated":
            blocks.append((where.flatten(), torch.eye(d * C, dtype=torch.float64)))
            continue
        for c in range(C):
            w = U[tuple(index)][:, c]
            if w.any():
                basis = torch.eye(d, dtype=torch.float64)
                blocks.append((where[:, c], basis if problem.activation == "gated" else _tangent(problem, w)))
    sizes = [basis.shape[1] for _, basis in blocks]
    free = C if problem.intercept else 0
    spread = torch.zeros(U.numel() + C, sum(sizes) + free, dtype=torch.float64)
    units, curved = (
        torch.zeros(sum(sizes) + free, dtype=torch.float64),
        torch.zeros(sum(sizes) + free, sum(sizes) + free, dtype=torch.float64),
    )
    at = 0
    for (entries, basis), size in zip(blocks, sizes, strict=True):
        part = slice(at, at + size)
        w = U.flatten()[entries]
        spread[entries, part] = basis
        units[part] = basis.T @ w / w.norm()
        curved[part, part] = (torch.eye(size, dtype=torch.float64) - torch.outer(units[part], units[part])) / w.norm()
        at += size
    spread[U.numel() :, at:] = torch.eye(C, dtype=torch.float64)[:, :free]
    return spread, units, curved


def _tangent(problem: Problem, w: Tensor) -> Tensor:
    """An orthonormal basis of the null space of the rows x_j with x_j w = 0."""
    X = problem.X.double()
    tight = (X @ w).abs() <= TIGHT * X.norm(dim=1) * w.norm()
    rows = X[tight & X.any(1)]
    if not len(rows):
        return torch.eye(len(w), dtype=torch.float64)
    _, values, V = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=True)
    return V[int((values > TIGHT).sum()) :].T


def _split(column: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    C = shape[-1]
    return column[:-C].view(shape), column[-C:]
