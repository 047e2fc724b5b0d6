"""Many more features than samples: the same programme on an n x r factor, after one pass over the columns of X.

    K = X X^T = V S V^T,   L = V S^{1/2} (n x r),   Q = X^T V S^{-1/2} (d x r),   Q^T Q = I,   X = L Q^T

Replacing X by L changes neither the optimum nor the certificate.  Write U_i = Q W_i + U_i', Q^T U_i' = 0.  Then X U_i = L
W_i: the fit (and the ReLU's cones, which constrain X U_i) see W_i alone, while ||W_i|| = ||Q^T U_i|| <= ||U_i|| for the
Frobenius, nuclear and column norms, with equality for U_i = Q W_i.  So min over U = min over W, and U = Q W = X^T (V
S^{-1/2} W) is optimal.  Dually A_i^T theta = X^T D_i theta = Q (L^T D_i theta) has the norms of L^T D_i theta: theta and its
certificate are those of the original.

Eigenvalues of K below RANK times the largest are rounding and left out: X is then replaced by V V^T X, which differs by at most
the square root of the largest of them in spectral norm (`dropped`).
X is read once, block by block of columns, in float64: K, and the scores X G of Gaussian gates whose block of rows is drawn
when it is needed, from the seed and the block's number, so G (d x P) never exists.  X may be a tensor, an array, or a
memory-mapped array larger than memory, which is then read block by block instead.
Source: the representer theorem (Schoelkopf, Herbrich, Smola 2001), for the groups of a gated network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from mmap import mmap

import numpy as np
import torch
from torch import Tensor

from lplr.convex.certificate import Certificate, certify
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Solution
from lplr.errors import RecipeError

RANK = 1e-12  # eigenvalues of K below this, of the largest, are rounding
BLOCK = 1 << 14  # columns whose gates share one draw: part of what a seed means
PANELS = 4  # of rows of K: only those on and below the diagonal are computed

Matrix = Tensor | np.ndarray


@dataclass(frozen=True)
class Pass:
    """What one pass over the columns leaves: K (n, n) float64, and the scores X G (n, P) of the gates of the seed."""

    K: Tensor
    scores: Tensor
    seed: int

    def patterns(self) -> Tensor:
        """D (n, P) bool."""
        return self.scores > 0


@dataclass(frozen=True)
class Factor:
    """L (n, r) with L L^T = K, and the map V S^{-1/2} (n, r) by which weights W of L are X^T (map W)."""

    L: Tensor
    map: Tensor
    dropped: float  # the root of the largest eigenvalue that was left out: a bound of ||X - V V^T X||_2

    @property
    def rank(self) -> int:
        return self.L.shape[1]


def stream(X: Matrix, P: int, seed: int) -> Pass:
    """K and the scores of P Gaussian gates; O(n d (n + P)) time, one block of BLOCK columns in memory.

    Raises RecipeError where X holds NaN or Inf.
    """
    n = len(X)
    K, scores = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, P, dtype=torch.float64)
    for number, (_, block) in enumerate(columns(X)):
        scores += block @ gate_rows(seed, number, block.shape[1], P)
        _add_gram(K, block)
    if not torch.isfinite(K.diagonal()).all():
        raise RecipeError("X holds NaN or Inf: impute or drop these rows or columns")
    return Pass(torch.tril(K) + torch.tril(K, -1).T, scores, seed)


def gate_rows(seed: int, block: int, rows: int, P: int) -> Tensor:
    """Rows block * BLOCK to block * BLOCK + rows of G (d, P)."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + block)
    return torch.randn(BLOCK, P, generator=draw, dtype=torch.float64)[:rows]


def columns(X: Matrix) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of BLOCK columns of X in float64; those of a mapped file are read, so that none stays resident."""
    for first in range(0, X.shape[1], BLOCK):
        part = slice(first, min(first + BLOCK, X.shape[1]))
        if isinstance(X, Tensor):
            yield part, X[:, part].to("cpu", torch.float64)
        else:
            yield part, torch.from_numpy(_read(X, part).astype(np.float64))


def _read(X: np.ndarray, part: slice) -> np.ndarray:
    """X[:, part]; by reads instead of the map where X is a whole mapped file (a map keeps whatever of the file is cached)."""
    if not (isinstance(X, np.memmap) and isinstance(X.base, mmap) and X.filename is not None and X.flags.c_contiguous):
        return X[:, part]
    out = np.empty((len(X), part.stop - part.start), dtype=X.dtype)
    with open(X.filename, "rb", buffering=0) as file:
        for i, row in enumerate(out):
            file.seek(X.offset + X.dtype.itemsize * (i * X.shape[1] + part.start))
            if file.readinto(row.data.cast("B")) != row.nbytes:
                raise RecipeError(f"{X.filename} ends before row {i} of X: write it again")
    return out


def factor(K: Tensor, rank: float = RANK) -> Factor:
    """L and the map from K (n, n), by its eigendecomposition."""
    values, vectors = torch.linalg.eigh(K)
    kept = values > rank * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    if not kept.any():
        raise RecipeError("X is zero: there is nothing to fit; drop the samples or give other features")
    left_out = values[~kept].abs().amax().item() ** 0.5 if not kept.all() else 0.0
    roots = values[kept].sqrt()
    return Factor(vectors[:, kept] * roots, vectors[:, kept] / roots, left_out)


def compact(problem: Problem) -> tuple[Problem, Factor]:
    """The same programme on the factor of a problem in memory, d > n."""
    K = torch.zeros(len(problem.X), len(problem.X), dtype=torch.float64)
    for _, block in columns(problem.X):
        _add_gram(K, block)
    found = factor(torch.tril(K) + torch.tril(K, -1).T)
    return replace(problem, X=found.L.to(problem.Y.device), Y=problem.Y.double()), found


def expand(solution: Solution, found: Factor, problem: Problem, penalty: Penalty, tol: float) -> Solution:
    """The solution of the original problem, certified there."""
    way = found.map.to(solution.U)
    U, b = ((problem.X.to(way).T @ way) @ solution.U).to(problem.Y.dtype), solution.b.to(problem.Y.dtype)
    return recertified(replace(solution, U=U, b=b), problem, penalty, tol, f"features of rank {found.rank} leave rounding")


def recertified(solution: Solution, problem: Problem, penalty: Penalty, tol: float, why: str) -> Solution:
    """A Solution of an equal problem with its weights put into this one's terms, certified for this one.

    Where the gap has grown beyond tol by more than a tenth, `why` tells the reason.
    """
    proof = certify(problem, penalty, solution.U, solution.b, solution.theta)
    gap = max(proof.gap, 0.0)
    told = replace(solution, theta=proof.theta, primal=proof.primal, dual=proof.dual, gap=gap, kkt=proof.kkt)
    if told.converged and not proof.within(1.1 * tol):
        message = f"relative duality gap {told.relative_gap:.1e}, {tol:.0e} asked for: {why}; "
        return replace(told, status="stalled", message=message + "raise tol, or scale the features alike")
    return told


def lift(X: Matrix, found: Factor, W: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Weights of the original features, block by block: (columns, U (P, block, C)) for W (P, r, C)."""
    coefficients = found.map @ W  # (P, n, C)
    for part, block in columns(X):
        yield part, _by_gate(block.T, coefficients)


def certify_stream(X: Matrix, problem: Problem, penalty: Penalty, found: Factor, solution: Solution) -> Certificate:
    """The certificate of the lifted weights on the original X (n, d) by one more pass, trusting neither K nor its factor.

    problem is the reduced one.  theta is scaled to what the data's own dual norms allow; kkt is that of the reduced problem.
    """
    P, C = problem.D.shape[1], problem.Y.shape[1]
    Y, D = problem.Y.double(), problem.D.double()
    fits = torch.zeros(P, len(Y), C, dtype=torch.float64)
    grams = torch.zeros(2, P, C, C, dtype=torch.float64)  # of U_i and of A_i^T theta
    coefficients, gated = found.map @ solution.U, D.T[:, :, None] * solution.theta
    for _, block in columns(X):
        weights, pulled = _by_gate(block.T, coefficients), _by_gate(block.T, gated)
        fits += _by_gate(block, weights)
        grams[0] += weights.mT @ weights
        grams[1] += pulled.mT @ pulled
    Z = (fits * D.T[:, :, None]).sum(0) + solution.b
    sizes = _lengths(penalty, grams[0]).sum().item()
    scale = min(1.0, penalty.lam / max(_lengths(penalty, grams[1]).max().item(), 1e-300))
    loss = LOSSES[problem.loss]
    theta = solution.theta * scale
    return Certificate(loss.value(Z, Y) + penalty.lam * sizes, theta, loss.dual_value(theta, Y), solution.kkt)


def _by_gate(A: Tensor, B: Tensor) -> Tensor:
    """A B_i for all i, B (P, k, C), as one product: of a transposed A turned round, 2.5 times faster where it is wide."""
    P, k, C = B.shape
    B = B.permute(1, 0, 2).reshape(k, P * C)
    product = A @ B if A.stride(1) == 1 else (B.T @ A.T).T
    return product.unflatten(1, (P, C)).permute(1, 0, 2)


def _lengths(penalty: Penalty, grams: Tensor) -> Tensor:
    """The lengths that the penalty sums, from U^T U (P, C, C)."""
    if penalty.norm == "group":
        return grams.diagonal(dim1=1, dim2=2).sum(1).sqrt()
    if penalty.norm == "columns":
        return grams.diagonal(dim1=1, dim2=2).sqrt()
    return torch.linalg.eigvalsh(grams).clamp_min(0).sqrt()


def _add_gram(K: Tensor, block: Tensor) -> None:
    """K += block block^T, on and below the diagonal's panels."""
    n = len(K)
    size = -(-n // PANELS)
    for first in range(0, n, size):
        last = min(first + size, n)
        K[first:last, :last].addmm_(block[first:last], block[:last].T)
