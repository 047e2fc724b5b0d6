"""Rounding with feedback: LDLQ, with any grid.

Minimise tr(E H E^T), E = X - Xhat, over the grid.  With H = U D U^T, U unit upper triangular, columns are visited
first to last and column j of X is rounded after adding the errors already made, carried over by U:

    Xhat_j = Q( X_j + sum_{i<j} (X_i - Xhat_i) U_ij )   =>   tr(E H E^T) = sum_j D_jj ||rho_j||^2,

rho_j = the rounding residual of column j: exact, whatever Q is.  tr D <= tr H, so feedback can only help on average.  A
trellis or
a lattice that couples the entries *of a column* keeps this identity; the coupled entries have the same weight D_jj.
Columns may also be rounded `group` at a time: U is then unit block triangular, D block diagonal, and the sum is over
tr(rho_b D_bb rho_b^T).

Where the errors of the rows matter differently and together, tr(G E H E^T), the trellis feeds back along its columns too: with
G = V S V^T, S block diagonal,

    tr(G E H E^T) = sum_j D_jj r_j^T S r_j,   r = V^T E U,   so column j is  Q_G( X_j + sum_{i<j} (X_i - Xhat_i) U_ij ),

Q_G a quantizer that makes r_j^T S r_j small: `kernels.trellis`, which takes S for its diagonal.
Sources: Chee, Cai, Kuleshov, De Sa, "QuIP", NeurIPS 2023, section 3 (LDLQ; GPTQ is the same rounding, Theorem 6); two sides at
once: Tseng, Sun, De Sa, "YAQA", 2025, whose blocks are ours along a column's path.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lplr.kernels import trellis
from lplr.kernels.levels import BY_COLUMN, narrower, nearest
from lplr.kernels.pack import pack
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.quant.qtensor import QTensor
from lplr.quant.uniform import Axis, scales

ONE_BIT = 1.1  # feedback widens what is rounded; at one bit a wider step than the row's own pays (measured, SmolLM2-135M)
BLOCK = 128  # columns whose feedback is applied at once to the columns after them


def widening(grid: str, bits: float) -> float:
    """Scale of the grid over the one for X alone: feedback widens what is rounded (by columns: a guess)."""
    if grid == "uniform":
        return ONE_BIT if bits == 1 else 1.0
    return 1.0 + 0.1 * 4.0 ** (1 - max(bits, 1.0)) if grid in BY_COLUMN else 1.0


def unit_upper(H: Tensor, edges: list[int] | None = None) -> Tensor:
    """U (d x d), unit upper triangular, with H = U D U^T; H is damped where it is not positive definite.

    With edges, the first columns of groups, the diagonal blocks of U are identities and D is block diagonal.
    """
    return _unit_blocks(_upper(H), edges)


def _upper(H: Tensor) -> Tensor:
    """T upper triangular with H = T T^T."""
    return cholesky_factor(H.flip(0, 1)).flip(0, 1)


def _unit_blocks(T: Tensor, edges: list[int] | None) -> Tensor:
    """T over its diagonal, or its diagonal blocks."""
    if edges is None or len(edges) == len(T):
        return T / T.diagonal()
    U = T.clone()
    for start, stop in zip(edges, [*edges[1:], len(T)], strict=True):
        block = T[start:stop, start:stop]
        U[:, start:stop] = torch.linalg.solve_triangular(block, T[:, start:stop], upper=True, left=False)
    return U


def output_damping(bits: float) -> float:
    """Damping of G: the coarser the rounding, the less is the loss the quadratic form of G (measured at 2 and 3 bits)."""
    return 5 * 4.0**-bits


def ldlq(
    X: Tensor,
    bits: float,
    H: Tensor,
    *,
    G: Tensor | None = None,
    grid: str = "uniform",
    axis: Axis = "row",
    narrow: int = 0,
    group: int = 1,
) -> QTensor:
    """Quantize X (n x d) with feedback in the metric H (d x d, positive definite); O(n d (n + d)).

    G (n x n, positive semidefinite, damped here) is what the rows' errors weigh, for the trellis; other grids take it for the
    identity.  The first `narrow` columns, whose errors all later columns still absorb, get the next lower width.  `group`
    columns are rounded at a time without feedback among them.
    """
    n, d = X.shape
    wide = widening(grid, bits)
    row, col = scales(X * wide if wide != 1 else X, bits, axis=axis, clip="mse", grid=grid)
    row_f = torch.ones(1, dtype=X.dtype, device=X.device) if row is None else row.to(X.dtype)
    col_f = torch.ones(d, dtype=X.dtype, device=X.device) if col is None else col.to(X.dtype)
    lower, ratio = narrower(grid, bits)
    feedback = None
    if G is not None and grid == "trellis":
        mean = (lower * narrow + bits * (d - narrow)) / d
        feedback = along_columns(G * row_f[:, None] * row_f, mean)
    few, many = _Rounding(grid, lower, row_f * ratio, feedback), _Rounding(grid, bits, row_f, feedback)
    edges = [*range(0, narrow, group), *range(narrow, d, group)]
    U = unit_upper(H, edges)
    target = X.T.contiguous()  # (d, n): a column of X is a contiguous row here
    error = torch.zeros_like(target)
    first = 0  # feedback of the columns before this one is in target already
    for j, k in zip(edges, [*edges[1:], d], strict=True):
        if j - first >= BLOCK:
            target[j:].addmm_(U[first:j, j:].T, error[first:j])
            first = j
        wanted = target[j:k]
        if j > first:
            wanted = torch.addmm(wanted, U[first:j, j:k].T, error[first:j])
        scale = col_f[j:k, None]
        value = (few if k <= narrow else many).round(wanted / scale if col is not None else wanted)
        error[j:k] = X[:, j:k].T - (value * scale if col is not None else value)
    codes = many.codes()
    assert codes is not None  # narrow < d
    return QTensor(codes, bits, (n, d), row, col, few.codes(), narrow, grid)


def along_columns(G: Tensor, bits: float) -> trellis.Feedback:
    """What the trellis feeds back in the metric G (n x n), damped for a width, in blocks of its own length."""
    T = _upper(damped(G, output_damping(bits)))
    weights = _block_weights(T)
    edges = list(range(0, len(G), path_block(len(G))))
    U = _unit_blocks(T, edges).float().contiguous()  # once, not for every column that is rounded
    return trellis.Feedback(U, (weights / weights.mean()).float(), path_block(len(G)))


def gain_along_columns(G: Tensor) -> float:
    """tr(V^-1 G V^-T) / tr G: what feedback along columns leaves of tr(G E H E^T), about; 1 for the zero matrix.

    r is white, and E = V^-T r U^-1.  The damping tells little here: it is the one for 2 bits.
    """
    trace = float(G.diagonal().double().sum())
    if not trace > 0:
        return 1.0
    V = along_columns(G.double(), 2.0).U.double()
    left = torch.linalg.solve_triangular(V, G.double(), upper=True, unitriangular=True)
    return float(torch.linalg.solve_triangular(V, left.T, upper=True, unitriangular=True).diagonal().sum()) / trace


def path_block(n: int) -> int:
    """Entries of a column of n that are decided at a time: their ends cost the trellis, their length the feedback."""
    return 16 * -(-n // 384)


def _block_weights(T: Tensor) -> Tensor:
    """The diagonal of S in T T^T = V S V^T."""
    length = path_block(len(T))
    return torch.cat([T[a : a + length, a : a + length].square().sum(1) for a in range(0, len(T), length)])


@dataclass
class _Rounding:
    """Rounds columns to one width of a grid, none at 0 bits, and keeps their codes; scale (n,) or (1,)."""

    grid: str
    bits: float
    scale: Tensor
    feedback: trellis.Feedback | None = None
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inverse = torch.where(self.scale == 0, torch.zeros_like(self.scale), 1 / self.scale)

    def round(self, columns: Tensor) -> Tensor:
        """The points nearest to columns (k, n), each row a column of the matrix."""
        if not self.bits:
            return torch.zeros_like(columns)
        codes, values = nearest(columns * self.inverse, self.grid, self.bits, self.feedback)
        self.kept.append(codes)
        return values * self.scale

    def codes(self) -> Tensor | None:
        """What is stored, packed; None where nothing is."""
        if not self.kept:
            return None
        codes = torch.cat(self.kept)
        return codes if self.grid in BY_COLUMN else pack(codes.T.contiguous(), int(self.bits))
