"""Polytopes of non-negative coefficients with a given sum of vectors, and their points of interest.

    { a >= 0 : F a = F p },   F (m, K),  p >= 0,     in coordinates   a = p + N t,   N an orthonormal basis of the null space of F

so that every point has the same F a to rounding, and the polytope lives in as many dimensions as F has dependent columns; none:
p is its only point.  It is bounded where some y has F^T y > 0, as for optimal sets (`optimal_set`).

    vertices        columns of F in use are independent; at most rank F of them are (Caratheodory)
    linear          min <c, a>: linear programme in t, by HiGHS
    quadratic       min 1/2 ||A a - b||^2: least-distance programme, solved by non-negative least squares
    sparsest        mixed-integer programme in t and K binary variables, exact
    sample          hit and run from the mean of the vertices that were found

Source: Lawson, Hanson, "Solving least squares problems", 1974, chapter 23 (least distance); Smith, Oper. Res. 1984 (hit and run);
Mishkin, Pilanci, "Optimal sets and solution paths of ReLU networks", ICML 2023, algorithm 1 (the descent to a vertex).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, linprog, milp, nnls
from torch import Tensor

from lplr.errors import RecipeError

RANK = 1e-8  # singular values of unit columns below this, of the largest, are zero
ZERO = 1e-8  # of sum p: coefficients below this are rounding of a solver
TIES = 1e-8  # share of the minimum-norm criterion that settles ties of a quadratic one
TIED = 1e-12  # coefficients that a step leaves with less than this of themselves are gone too
THIN = 10  # steps of hit and run per dimension between two samples
ROUNDS = 5


@dataclass(frozen=True)
class Polytope:
    """F (r, K) of full row rank, point p (K,) >= 0, both float64; free: N (K, k)."""

    F: Tensor
    point: Tensor
    free: Tensor

    @classmethod
    def of(cls, fits: Tensor, point: Tensor, rank: float = RANK) -> Polytope:
        """{ a >= 0 : fits a = fits point }, fits (m, K) with columns that are not zero; singular values below `rank` are zero."""
        rows, free = row_space(fits.double(), rank)
        return cls(rows, point.double(), free)

    def __len__(self) -> int:
        return len(self.point)

    @property
    def total(self) -> float:
        return max(self.point.sum().item(), 1e-300)

    def contains(self, a: Tensor, tol: float = 1e-8) -> bool:
        """Whether a (K,) is non-negative and has the polytope's F a, to tol of their sizes."""
        off = (self.F @ (a - self.point)).norm().item()
        return bool((a >= -tol * self.total).all()) and off <= tol * max((self.F @ self.point).norm().item(), 1e-300)

    def minimise(self, c: Tensor) -> Tensor:
        """argmin <c, a> (K,), a vertex.  Raises RecipeError where there is none."""
        if not self.free.shape[1]:
            return self.point
        slope, rows, room = (self.free.T @ c.double()).numpy(), -self.free.numpy(), (self.point / self.total).numpy()
        found = linprog(slope / max(np.abs(slope).max(), 1e-300), A_ub=rows, b_ub=room, bounds=(None, None), method="highs-ds")
        if found.x is None:
            raise RecipeError(f"the linear criterion has no minimum ({found.message}): the set is unbounded, bound it")
        return self.settle(self.point + self.total * (self.free @ torch.from_numpy(found.x)))

    def nearest(self, A: Tensor, b: Tensor) -> Tensor:
        """argmin 1/2 ||A a - b||^2 (K,), A (l, K), b (l,); of several the one of nearly least norm."""
        k = self.free.shape[1]
        if not k:
            return self.point
        A, b = A.double(), b.double()
        size = max(torch.linalg.matrix_norm(A @ self.free).item(), 1e-300)
        weight = TIES**0.5 * size
        rows = torch.cat([A @ self.free, weight * self.free])
        aim = torch.cat([b - A @ self.point, -weight * self.point])
        Q, R = torch.linalg.qr(rows)  # ||rows t - aim|| = ||R t - Q^T aim||;  x = R t - Q^T aim:  min ||x||,  G x >= h
        G = torch.linalg.solve_triangular(R.T, self.free.T, upper=False).T
        h = -self.point - G @ (Q.T @ aim)
        unit = max(h.abs().max().item() / max(G.abs().max().item(), 1e-300), 1e-300)
        E = torch.cat([G.T, h[None] / unit]).numpy()
        wanted = np.append(np.zeros(k), 1.0)
        multipliers, _ = nnls(E, wanted, maxiter=30 * E.shape[1])
        r = torch.from_numpy(E @ multipliers - wanted)
        x = -unit * r[:k] / r[k]
        t = torch.linalg.solve_triangular(R, (x + Q.T @ aim)[:, None], upper=True)[:, 0]
        return self.settle(self.point + self.free @ t)

    def settle(self, a: Tensor) -> Tensor:
        """The point next to a (K,) that has the polytope's F a to rounding and the zeros of a."""
        used = a > ZERO * self.total
        for _ in range(ROUNDS):
            a = torch.where(used, a, torch.zeros_like(a))
            off = self.F @ (self.point - a)
            step = torch.linalg.lstsq(self.F[:, used], off[:, None], rcond=RANK, driver="gelsd").solution[:, 0]
            a = a.clone()
            a[used] += step
            if bool((a >= 0).all()):
                break
            used = a > 0
        return a.clamp_min(0)

    @cached_property
    def highest(self) -> Tensor:
        """Row b (K, K): a point with the largest a_b."""
        return torch.stack([self.minimise(-_unit(b, len(self))) for b in range(len(self))]) if len(self) else self.point[None, :0]

    def ranges(self) -> Tensor:
        """(K, 2): the least and the largest value of every coefficient."""
        if not self.free.shape[1]:
            return torch.stack([self.point, self.point], 1)
        least = [self.minimise(_unit(b, len(self)))[b] for b in range(len(self))]
        return torch.stack([torch.stack(least), self.highest.diagonal()], 1)

    @cached_property
    def centre(self) -> Tensor:
        """A point of the relative interior: positive wherever any point is."""
        a, seen = self.point, 1
        for b in range(len(self) if self.free.shape[1] else 0):
            if a[b] <= ZERO * self.total:
                a, seen = a + (self.minimise(-_unit(b, len(self))) - a) / (seen + 1), seen + 1
        return a

    @cached_property
    def support(self) -> Tensor:
        """(K,) bool: coefficients that are positive at some point."""
        return self.centre > 0.5 * ZERO * self.total / max(len(self), 1)

    @cached_property
    def inner(self) -> Tensor:
        """Directions (K, k') in which the relative interior extends; none where the polytope is a point."""
        out = torch.zeros(len(self), 0, dtype=torch.float64)
        if not self.support.any():
            return out
        kept = row_space(self.F[:, self.support])[1]
        out = torch.zeros(len(self), kept.shape[1], dtype=torch.float64)
        out[self.support] = kept
        return out

    @property
    def dimension(self) -> int:
        return self.inner.shape[1]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points (count, K), asymptotically uniform."""
        a, k, found = self.centre, self.dimension, []
        for _ in range(count):
            for _ in range(THIN * k):
                way = self.inner @ torch.randn(k, generator=generator, dtype=torch.float64)
                steps = -a[self.support] / way[self.support]
                low = steps[way[self.support] > 0].amax()
                high = steps[way[self.support] < 0].amin()
                share = torch.rand((), generator=generator, dtype=torch.float64)
                a = (a + (low + share * (high - low)) * way).clamp_min(0)
            found.append(self.settle(a))
        return torch.stack(found) if found else self.point[None, :][:0]

    def vertex(self, a: Tensor) -> Tensor:
        """A vertex whose support is within that of a (K,)."""
        return descend(self.F, a)

    def sparsest(self, seconds: float = 60.0) -> Tensor:
        """A point with the fewest positive coefficients (K,), proven by branch and bound.

        Raises RecipeError where HiGHS needs more than `seconds`: `vertex` gives a locally sparsest one.
        """
        K, k = len(self), self.free.shape[1]
        if not self.dimension:
            return self.centre
        most = self.highest.diagonal() / self.total
        N: Any = self.free.numpy()
        p: Any = (self.point / self.total).numpy()  # scipy's types know numbers alone as bounds
        below = LinearConstraint(np.hstack([N, np.zeros((K, K))]), lb=-p)
        linked = LinearConstraint(np.hstack([N, -np.diag(most.numpy() * (1 + ZERO))]), ub=-p)
        found = milp(
            np.append(np.zeros(k), np.ones(K)),
            constraints=[below, linked],
            integrality=np.append(np.zeros(k), np.ones(K)),
            bounds=_bounds(k, K),
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        if found.x is None or found.status != 0:
            raise RecipeError(f"no proof of the fewest blocks in {seconds:g} s ({found.message}): allow more, or take `vertex`")
        a = self.point + self.total * (self.free @ torch.from_numpy(found.x[:k]))
        return self.vertex(self.settle(torch.where(torch.from_numpy(found.x[k:] > 0.5), a, torch.zeros_like(a))))


def _bounds(k: int, K: int) -> Bounds:
    """t free, binary variables between 0 and 1."""
    low: Any = np.append(np.full(k, -np.inf), np.zeros(K))
    high: Any = np.append(np.full(k, np.inf), np.ones(K))
    return Bounds(low, high)


def _unit(b: int, K: int) -> Tensor:
    e = torch.zeros(K, dtype=torch.float64)
    e[b] = 1
    return e


def row_space(F: Tensor, rank: float = RANK) -> tuple[Tensor, Tensor]:
    """Rows (r, K) that span those of F (m, K), with the same Gram matrix, and N (K, K - r), orthonormal, F N = 0.

    Decided on columns of unit length: singular values below `rank` of the largest are zero.
    """
    K = F.shape[1]
    if not K:
        return F[:0], torch.zeros(0, 0, dtype=F.dtype)
    sizes = F.norm(dim=0)
    sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    small = torch.linalg.qr(F / sizes, mode="r")[1] if len(F) > K else F / sizes
    _, values, V = torch.linalg.svd(small, full_matrices=True)
    r = int((values > rank * values[:1]).sum())
    rows = values[:r, None] * V[:r] * sizes
    if r == K:
        return rows, torch.zeros(K, 0, dtype=F.dtype)
    return rows, torch.linalg.qr(V[r:].T / sizes[:, None])[0]


def descend(F: Tensor, a: Tensor, rank: float = RANK) -> Tensor:
    """Coefficients a' (K,) >= 0 with F a' = F a, a > 0 where a' is, and columns of F in use independent.

    While there is beta with sum beta_b a_b F_b = 0, its sign such that max |beta_b| = beta_b* > 0:
    a_b <- a_b (1 - beta_b / beta_b*), which removes b* at least; no coefficient more than doubles in a step.  All such beta are
    kept as one basis, from which each step takes one away.  Source: Mishkin, Pilanci, ICML 2023, algorithm 1.
    """
    F, a = F.double(), a.double().clone()
    used = (a > 0).nonzero()[:, 0]
    goal = F @ a
    left = row_space(F[:, used] * a[used], rank)[1]  # of beta
    scale = torch.ones_like(a[used])
    while left.shape[1]:
        beta = left[:, 0] / scale
        pivot = int(beta.abs().argmax())
        scale = scale * (1 - beta / beta[pivot])
        scale[pivot] = 0
        kept = scale > TIED
        left = (left @ row_space(left[~kept])[1])[kept]  # of them, those without the blocks that are gone
        a[used[~kept]] = 0
        used, scale = used[kept], scale[kept]
    a[used] = a[used] * scale
    if len(used):
        a[used] += torch.linalg.lstsq(F[:, used], (goal - F @ a)[:, None]).solution[:, 0]
    return a.clamp_min(0)
