"""Which inputs of a linear map can be spared, and what the others then do in their place.

Inputs h (d,), outputs W h (n,), second moments H = E[h h^T].  Of the inputs S that are kept and R that are not,

    W' = argmin E ||W h - W' h_S||^2 = W H[:,S] H[S,S]^-1 = W_S + W_R H[R,S] H[S,S]^-1

With e diag(H) added to H the same formulas minimise  E ||W h - W' h_S||^2 + e sum_S H_jj ||w'_j - w_j||^2:  the correction is
drawn to none at all, whatever units the inputs have.  What is never anything but zero on the calibration text goes first.

Elimination takes away the input whose loss costs least once the others have made up for it, again and again.  With K = H^-1 of
the inputs that are left, this costs ||w_j||^2 / K_jj, exactly, and leaves

    W <- W - w_j K_j: / K_jj,      K <- K - K_:j K_j: / K_jj

a Cholesky factorization of K whose pivots are those of least cost: neither matrix is formed again, k removals take
O(k d (k + n)).
Sources: Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992; Kurtic, Frantar,
Alistarh, "ZipLM", NeurIPS 2023 (whole columns); the selection by fits that `convex.prune` makes, with the refit in each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.linalg.hessian import cholesky_factor

RIDGE = 0.01  # e, the damping: a share of each input's own second moment


def eliminated(H: Tensor, W: Tensor, count: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The `count` inputs that go, in order, and what each adds to the cost, both (count,); H (d, d), W (n, d)."""
    C, scaled, _ = _correlations(H, W, ridge)
    K = torch.cholesky_inverse(cholesky_factor(C))
    d, n = len(K), len(W)
    U, V = K.new_zeros(count, n), K.new_zeros(count, d)  # W less U^T V, K less V^T V: as they are now
    pivots, squares = K.diagonal().clone(), scaled.square().sum(0)
    order, costs = torch.zeros(count, dtype=torch.long, device=K.device), K.new_zeros(count)
    left = torch.ones(d, dtype=torch.bool, device=K.device)
    for t in range(count):
        cost = torch.where(left, squares.clamp_min(0) / pivots, torch.inf)
        j = cost.argmin()
        before = V[:t, j].clone()
        root = pivots[j].sqrt()
        u = (scaled[:, j] - before @ U[:t]) / root
        v = (K[j] - before @ V[:t]) / root
        squares += v.square() * u.square().sum() - 2 * v * (u @ scaled - (U[:t] @ u) @ V[:t])
        pivots -= v.square()
        order[t], costs[t], U[t], V[t], left[j] = j, cost[j], u, v, False
    return order, costs


def refitted(H: Tensor, W: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """W' (n, |S|), float64: the columns `kept` (indices) of W, corrected for the loss of the others."""
    C, scaled, units = _correlations(H, W, ridge)
    rest = others(kept, len(C))
    factor = cholesky_factor(C[kept][:, kept])
    change = torch.cholesky_solve(C[kept][:, rest] @ scaled[:, rest].T, factor).T
    return W[:, kept].double() + change / units[kept]


def output_error(H: Tensor, W: Tensor, kept: Tensor, W_kept: Tensor) -> float:
    """E ||W h - W_kept h_S||^2 over E ||W h||^2; 0 where W h is always zero."""
    off = W.double().clone()
    off[:, kept] -= W_kept.double()
    lost, all_ = (float(((A @ H.double()) * A).sum()) for A in (off, W.double()))
    return lost / all_ if all_ > 0 else 0.0


def others(chosen: Tensor, d: int) -> Tensor:
    """The indices below d that are not among the chosen ones, ascending."""
    free = torch.ones(d, dtype=torch.bool, device=chosen.device)
    free[chosen] = False
    return free.nonzero()[:, 0]


def _correlations(H: Tensor, W: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """H in units of the inputs' root mean squares with `ridge` more on its diagonal, W in these units, and the units; float64.

    An input that is always zero is uncorrelated, and its column of W counts as zero.
    """
    sizes = H.diagonal().double().clamp_min(0).sqrt()
    units = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    C = H.double() / units / units[:, None]
    C.diagonal().fill_(1 + ridge)
    return C, W.double() * sizes, units
