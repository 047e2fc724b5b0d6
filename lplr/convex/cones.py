"""The cones of the ReLU programme: exact projections, the proximal operator, and a dual norm that is always valid.

A gate D_i (a column of D, 0/1) confines its two weights to the cone on which the gate is the ReLU's own pattern,

    K_i = {w : G_i w >= 0},   G_i = (2 D_i - I) X,        Pi_K(a) = argmin_{w in K} 1/2 ||w - a||^2 = a + G^T rho*,
    rho* = argmin_{rho >= 0} 1/2 ||a + G^T rho||^2        (the dual: non-negative least squares in n unknowns).

Moreau: a = Pi_K(a) + Pi_{K polar}(a), the second being -G^T rho*, orthogonal to the first.  For a closed convex cone

    sup {<a, w> : w in K, ||w|| <= 1} = ||Pi_K(a)|| <= ||a + G^T rho||   for every rho >= 0,

so multipliers that are not optimal still bound the dual norm from above, and prox of t ||.|| + 1_K is shrink_t o Pi_K.

The projection is solved by the method of multipliers, whose inner problem (convex, piecewise quadratic, d unknowns)

    min_w 1/2 ||w - a||^2 + 1/(2 sigma) ||(rho - sigma G w)_+||^2,      H = I + sigma X_J^T X_J,  J = {j : rho_j > sigma (Gw)_j},

semismooth Newton ends in finitely many steps: H needs no signs, as (2 D_i - I)^2 = I.  Rows of X are scaled to length one.
Batches: points (..., d) with signs (..., n) of +-1; cones are independent, converged ones leave the batch.
Source: Moreau, C. R. Acad. Sci. 255, 1962; Rockafellar, Math. Oper. Res. 1, 1976 (method of multipliers); the programme:
Pilanci, Ergen, "Neural networks are convex regularizers", ICML 2020.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-11  # of a projection: violation and complementarity relative to the length of the point
ROUNDS, NEWTON, HALVINGS = 60, 60, 30
STALLS = 6  # rounds without progress, sigma at its largest, after which a cone is left as it is
SIGMA, GROWTH, SIGMA_MAX = 30.0, 10.0, 1e9
SMALL = 64  # sizes below which the larger system, which is the more accurate one, costs nothing
ENTRIES = 1 << 24  # of gathered rows at once


class Projection(NamedTuple):
    """point (..., d) = a + G^T multipliers, multipliers (..., n) >= 0.

    residual (...): the larger of violation and |<multipliers, G point>|, relative to ||a||, rows of X of length one.
    """

    point: Tensor
    multipliers: Tensor
    residual: Tensor


def signs(D: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The rows of 2 D_i - I (P, n) of patterns D (n, P)."""
    return D.T.to(dtype) * 2 - 1


def project(a: Tensor, X: Tensor, sign: Tensor) -> Tensor:
    """Pi_K(a) (..., d) for points a (..., d) and cones {w : sign * (X w) >= 0}, X (n, d), sign (..., n) of +-1."""
    return projection(a, X, sign).point


def projection(
    a: Tensor, X: Tensor, sign: Tensor, start: Tensor | None = None, tol: float = TOLERANCE, radius: float = 0.0
) -> Projection:
    """Pi_K(a) with its multipliers; `start` (..., n) are multipliers to begin from, `tol` is relative to ||a||.

    A cone is left as soon as ||a + G^T rho|| <= radius, which bounds ||Pi_K(a)||: enough where it is to be shrunk to nothing.
    float32 input is solved in float64 and cast back.
    """
    shape, n = a.shape, len(X)
    points = a.reshape(-1, shape[-1]).double()
    sign = sign.expand(*shape[:-1], n).reshape(-1, n).double()
    lengths, size = X.double().norm(dim=1), points.norm(dim=1, keepdim=True)
    rows, unit = X.double() / _or_one(lengths)[:, None], _or_one(size)
    rho = torch.zeros_like(sign) if start is None else start.reshape(-1, n).double() * lengths
    point, rho, residual = _multipliers(points / unit, rows, sign, rho / unit, tol, radius / unit[:, 0])
    rho = rho * unit / _or_one(lengths) * (lengths > 0)
    return Projection(
        (point * unit).reshape(shape).to(a.dtype), rho.reshape(*shape[:-1], n).to(a.dtype), residual.reshape(shape[:-1])
    )


def _or_one(sizes: Tensor) -> Tensor:
    """What to divide by: 1 for nothing."""
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))


def both_signs(T: Tensor) -> Tensor:
    """(+T, -T) of T (P, d, C): the directions that V_0 and V_1 see, shape (2, P, d, C)."""
    return torch.stack([T, -T])


def project_weights(V: Tensor, X: Tensor, D: Tensor, start: Tensor | None = None, radius: float = 0.0) -> Projection:
    """Pi_{K_i} of every column of V (2, P, d, C): point (2, P, d, C), multipliers (2, P, C, n), residual (2, P, C)."""
    found = projection(V.mT, X, signs(D, X.dtype)[:, None], start, radius=radius)
    return Projection(found.point.mT, found.multipliers, found.residual)


def dual_norms(T: Tensor, X: Tensor, D: Tensor, multipliers: Tensor | None = None) -> Tensor:
    """||Pi_{K_i}(+-T_i,c)|| (2, P, C) for T = A^T theta (P, d, C); every value is an upper bound whatever its accuracy.

    With multipliers >= 0 (2, P, C, n), e.g. those of a solver, nothing is projected: valid, cheaper, weaker.
    """
    both = both_signs(T)
    if multipliers is None:
        return project_weights(both, X, D).point.norm(dim=2)
    pulled = (multipliers.clamp_min(0) * signs(D, X.dtype)[:, None]) @ X  # (2, P, C, d)
    return (both.mT + pulled).norm(dim=3)


def prox(V: Tensor, X: Tensor, D: Tensor, step: float) -> Tensor:
    """prox of step sum ||V_i|| + 1_K, V (2, P, d, C): shrink o Pi_K, exact for cones."""
    return shrink(project_weights(V, X, D, radius=step).point, step)


def shrink(V: Tensor, step: float) -> Tensor:
    """(1 - step / ||V||)_+ V of every column, V (..., d, C)."""
    length = V.norm(dim=-2, keepdim=True)
    return V * (1 - step / length.clamp_min(torch.finfo(V.dtype).tiny)).clamp_min(0)


def violation(V: Tensor, X: Tensor, D: Tensor) -> Tensor:
    """The largest (-G_i v)_+ of all columns of V (2, P, d, C): 0 where V is feasible."""
    margins = (X @ V) * signs(D, X.dtype)[:, :, None]  # (2, P, n, C)
    return (-margins).amax().clamp_min(0) if margins.numel() else margins.sum()


def repair(V: Tensor, X: Tensor, D: Tensor) -> Tensor:
    """The nearest feasible weights to V (2, P, d, C): every column projected; its norms, hence the penalty, cannot grow."""
    return project_weights(V, X, D).point


def _multipliers(a: Tensor, rows: Tensor, sign: Tensor, rho: Tensor, tol: float, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Method of multipliers on a batch of unit points a (B, d): points, multipliers, residuals."""
    out, kept = a + (rho * sign) @ rows, rho.clone()
    left = _residual(out, rows, sign, rho)
    live = ((left > tol) & (out.norm(dim=1) > radius)).nonzero()[:, 0]
    w, sigma, stalls = out[live], torch.full_like(left, SIGMA), torch.zeros_like(left)
    for _ in range(ROUNDS):
        if not len(live):
            break
        point, multipliers, s = a[live], kept[live], sign[live]
        w = _newton(w, point, rows, s, multipliers, sigma[live, None])
        multipliers = (multipliers - sigma[live, None] * s * (w @ rows.T)).clamp_min(0)
        w = point + (multipliers * s) @ rows
        residual = _residual(w, rows, s, multipliers)
        slow = residual > left[live] / GROWTH
        stalls[live] += ((residual >= left[live]) & (sigma[live] >= SIGMA_MAX)).to(left.dtype)
        sigma[live[slow]] = (sigma[live[slow]] * GROWTH).clamp_max(SIGMA_MAX)
        better = residual < left[live]
        out[live[better]], left[live[better]] = w[better], residual[better]
        kept[live[better]] = multipliers[better]
        going = (residual > tol) & (stalls[live] < STALLS) & (w.norm(dim=1) > radius[live])
        live, w = live[going], w[going]
    return out, kept, left


def _residual(w: Tensor, rows: Tensor, sign: Tensor, rho: Tensor) -> Tensor:
    """max(violation, |rho^T G w|) of every cone: both vanish at the projection alone."""
    margin = sign * (w @ rows.T)
    return torch.maximum((-margin).amax(1).clamp_min(0), (rho * margin).sum(1).abs())


def _newton(w: Tensor, a: Tensor, rows: Tensor, sign: Tensor, rho: Tensor, sigma: Tensor) -> Tensor:
    """argmin_w 1/2 ||w - a||^2 + 1/(2 sigma) ||(rho - sigma G w)_+||^2 for a batch, sigma (B, 1): Newton, Armijo steps."""
    w = w.clone()
    live = torch.arange(len(w), device=w.device)
    for _ in range(NEWTON):
        at, s, weight = w[live], sign[live], sigma[live]
        pull = rho[live] - weight * s * (at @ rows.T)
        active = pull > 0
        gradient = at - a[live] - (pull.clamp_min(0) * s) @ rows
        step = -_solve(active, rows, weight, gradient)
        change = weight * s * (step @ rows.T)
        length = _armijo(at - a[live], step, pull, change, weight[:, 0], (gradient * step).sum(1))
        w[live] = at + length[:, None] * step
        same = ((pull - length[:, None] * change > 0) == active).all(1) & (length == 1)
        stuck = (length == 0) | (step.norm(dim=1) <= 1e-15)
        live = live[~(same | stuck)]
        if not len(live):
            break
    return w


def _solve(active: Tensor, rows: Tensor, sigma: Tensor, right: Tensor) -> Tensor:
    """(I + sigma X_J^T X_J)^{-1} right for every set J, a row of active (B, n), by d x d systems or, where J is smaller,

    right - sigma X_J^T (I + sigma X_J X_J^T)^{-1} X_J right.
    """
    d = rows.shape[1]
    most = max(int(active.sum(1).max()), 1)
    small = SMALL <= most < d
    out = torch.empty_like(right)
    size = max(1, ENTRIES // (most * d))
    for part in torch.arange(len(right), device=right.device).split(size):
        taken, index = active[part].to(rows.dtype).topk(most, dim=1)
        chosen = rows[index] * taken[:, :, None]  # (b, most, d), zero rows where J is smaller
        weight, r = sigma[part, :, None], right[part, :, None]
        gram = weight * (chosen @ chosen.mT if small else chosen.mT @ chosen)
        gram.diagonal(dim1=1, dim2=2).add_(1)
        factor = torch.linalg.cholesky(gram)
        solved = torch.cholesky_solve(chosen @ r if small else r, factor)
        out[part] = (r - weight * (chosen.mT @ solved) if small else solved)[:, :, 0]
    return out


def _armijo(offset: Tensor, step: Tensor, pull: Tensor, fall: Tensor, sigma: Tensor, slope: Tensor) -> Tensor:
    """The first of 1, 1/2, 1/4, … that decreases the inner objective enough, per row; 0 where none does."""

    def value(t: Tensor) -> Tensor:
        quadratic = (offset + t[:, None] * step).square().sum(1)
        return 0.5 * quadratic + (pull - t[:, None] * fall).clamp_min(0).square().sum(1) / (2 * sigma)

    start = value(torch.zeros_like(slope))
    slack = 1e-14 * start.abs().clamp_min(1e-2)  # below rounding, a decrease cannot be told
    length = torch.ones_like(slope)
    for _ in range(HALVINGS):
        bad = value(length) > start + 1e-4 * length * slope + slack
        if not bad.any():
            return length
        length = torch.where(bad, length / 2, length)
    return torch.where(value(length) > start + slack, torch.zeros_like(length), length)
