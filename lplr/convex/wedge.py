"""Wedge features: neurons that vanish on samples, and dictionaries of them in which an optimal network is a Lasso.

    min over (w_j, b_j, a_j)   f(sum_j (X w_j + b_j)_+ a_j^T + 1 t^T; Y) + lam/2 sum_j (||w_j||_p^2 + ||a_j||^2)
    = min over z_k in R^C      f(sum_k (X w_k + b_k)_+ z_k^T + 1 t^T; Y) + lam sum_k ||z_k||,    ||w_k||_p = 1,       (`lasso`)

where w_k runs over the dictionary instead of all directions.  The dual of the first bounds ||Theta^T (X w + b)_+|| by lam, which
is convex and homogeneous on every cell of the hyperplanes x_i w + b = 0, hence largest on rays of the cells, and these vanish on
d - 1 samples (d with biases): w is their generalised cross product, the Hodge dual of their wedge product, and the feature

    (x w + b)_+ = (x ^ x_J1 ^ ... )_+ / ||x_J1 ^ ... ||_p = signed distance of x to the span (the affine hull) of the samples J.

Biases are unpenalised, and t, the neuron with w = 0, comes with them.  What holds of `dictionary`:

- p = 1 and p = inf: the two optima are equal.  The faces of the ball cut the cells further: the axes e_k, or e_k +- e_l, count as
  samples (directions, which no affine hull starts from).  In one dimension they are equal for every p.
- p = 2: optimum <= Lasso <= `factor` times the optimum, where a cell in a circular cone of half-angle phi has 1 / cos phi; in two
  dimensions sec(omega / 2), omega the largest angle between neighbouring rays.  With n independent samples (d >= n) some cell has
  a factor of sqrt(n) or more: nothing to rely on.  With biases no factor is computed.
- subsets that are sampled: an upper bound, the lower the more of them; nothing else is promised.
- C outputs: the same, as ||Theta^T (X w)_+|| is convex too.

Null vectors come from a QR factorisation of the d - 1 rows: minors cost O(d^4), the Gram matrix squares the condition.
Source: Pilanci, "From complexity to clarity: analytical expressions of deep neural network weights via Clifford's geometric
algebra and convexity", 2023 (2309.16512); the cases p = inf, the factor of cells and vector outputs: here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.convex.columns import TIED, enumerated
from lplr.convex.gates import Gates
from lplr.convex.network import ReluNetwork, linear_layer
from lplr.convex.solution import Solution
from lplr.convex.subsets import every, local
from lplr.errors import RecipeError
from lplr.linalg.sketch import sketch

RANK = 1e-10  # of the largest: singular values and diagonals of R below this count as zero
ENTRIES = 1 << 22  # of one batch of factorisations
NORMS = (1.0, 2.0, math.inf)
MOST = 16  # principal directions that drawn gates depend on
BADOIU = 200  # steps towards the axis of the narrowest cone


@dataclass(frozen=True)
class Wedges:
    """Neurons (x w_k + o_k)_+, ||w_k||_p = 1, as gates of vectors (d, K) and offsets (K,), each direction with both signs.

    samples (K, s): the rows that neuron k vanishes on; a number n + e is direction e of the ball's faces.  exact: with these the
    Lasso's optimum is that of all networks.  skipped: subsets whose wedge product is zero, which define no neuron.
    """

    gates: Gates
    samples: Tensor
    p: float
    bias: bool
    exact: bool = False
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.gates)

    def __getitem__(self, kept: Tensor) -> Wedges:
        return replace(self, gates=self.gates[kept], samples=self.samples[kept], exact=False)

    def features(self, X: Tensor) -> Tensor:
        """(N, K): distances to the hyperplanes in the dual norm of p, zero on the closed side."""
        return (X.to(self.gates.vectors) @ self.gates.vectors).add_(self.gates.offsets).clamp_min_(0)

    def columns(self, X: Tensor) -> Callable[[Tensor], Tensor]:
        """The features (N, k) of chosen neurons, for `lasso`, which never holds them all."""
        X = X.to(self.gates.vectors)
        return lambda chosen: self[chosen].features(X)


def normals(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (..., d) orthogonal to d - 1 rows (..., d - 1, d), and whether (...) the rows are independent.

    By complete QR of the rows, scaled to length one; where a diagonal entry of R says that they may be dependent, by SVD.
    """
    lengths = rows.norm(dim=-1, keepdim=True)
    unit = rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    Q, R = torch.linalg.qr(unit.mT, mode="complete")
    w = Q[..., -1].contiguous()
    if not rows.shape[-2]:
        return w, torch.ones(w.shape[:-1], dtype=torch.bool, device=w.device)
    sizes = R.diagonal(dim1=-2, dim2=-1).abs()
    fine = sizes.amin(-1) > RANK
    if not fine.all():
        _, values, V = torch.linalg.svd(unit[~fine])
        w[~fine] = V[..., -1, :]
        fine = fine.clone()
        fine[~fine] = values[..., -1] > RANK * values[..., 0]
    return w, fine


def cross(rows: Tensor) -> Tensor:
    """The generalised cross product (..., d) of d - 1 rows (..., d - 1, d): <cross, x> = det of x above the rows, for every x.

    Its length is the volume of their parallelotope: the product of |R_kk|.
    """
    d = rows.shape[-1]
    Q, R = torch.linalg.qr(rows.mT, mode="complete")
    volume = R.diagonal(dim1=-2, dim2=-1).prod(-1)
    orientation = torch.linalg.det(Q).round() * (-1) ** (d - 1)
    return Q[..., -1] * (orientation * volume)[..., None]


def dictionary(X: Tensor, *, p: float = 2.0, bias: bool = True) -> Wedges:
    """All wedge features of X (n, d): C(m, d - 1) directions, C(m, d) with biases, m = n + faces of the ball, with both signs.

    p = 2: taken in the span of the samples (of their differences), as nothing is lost there; with rank r < d the subsets are
    smaller.  Raises RecipeError where they are too many (sample some) or there is nothing but zero (or equal) samples.
    """
    X, basis, faces = X.double(), None, _faces(X.shape[1], p)
    d = X.shape[1]
    if not torch.isfinite(X).all():
        raise RecipeError("X holds NaN or Inf: impute or drop these rows or columns")
    if p == 2:
        inner = X - X.mean(0) if bias else X
        _, sizes, V = torch.linalg.svd(inner, full_matrices=False)
        d = int((sizes > RANK * X.norm(dim=1).max()).sum())
        if not d:
            raise RecipeError(f"all samples are {'equal' if bias else 'zero'}: no hyperplane is drawn by them; give others")
        basis = V[:d].T if d < X.shape[1] else None
    subsets = every(len(X) + len(faces), d if bias else d - 1)
    found = through(X, subsets, p=p, bias=bias, basis=basis)
    return replace(found, exact=p != 2 or d == 1)


def through(X: Tensor, subsets: Tensor, *, p: float = 2.0, bias: bool = True, basis: Tensor | None = None) -> Wedges:
    """The features of hyperplanes through subsets (N, s) of the rows of X (n, d), with both signs; through 0 without `bias`.

    s = d with bias, d - 1 without; with a basis (d, k) the normals lie in its range, and k takes the place of d: a hyperplane
    through k samples, as x (B v) = (x B) v whatever B is.  Numbers from n on are directions of the ball's faces; with bias a
    subset of these alone is skipped.  Raises RecipeError for subsets of another size or other samples, and for NaN or Inf.
    """
    X = X.double()
    if not torch.isfinite(X).all():
        raise RecipeError("X holds NaN or Inf: impute or drop these rows or columns")
    n, d = X.shape
    points = X if basis is None else X @ basis.to(X)
    faces = _faces(d, p) if basis is None else X.new_zeros(0, points.shape[1])
    size = points.shape[1] - (not bias)
    if subsets.ndim != 2 or subsets.shape[1] != size:
        raise RecipeError(f"subsets are {tuple(subsets.shape)}, hyperplanes here go through {size} samples: give (N, {size})")
    rows = torch.cat([points, faces.to(points)])
    subsets = subsets.sort(1).values
    if subsets.numel() and not 0 <= int(subsets.min()) <= int(subsets.max()) < len(rows):
        raise RecipeError(f"subsets name samples {int(subsets.min())} to {int(subsets.max())}: there are 0 to {len(rows) - 1}")
    if bias:
        subsets = subsets[subsets[:, 0] < n]
    parts = [_normals(rows, n, some, bias) for some in subsets.split(max(1, ENTRIES // points.shape[1] ** 2))]
    v = torch.cat([w for w, _ in parts]) if parts else rows.new_zeros(0, rows.shape[1])
    fine = torch.cat([ok for _, ok in parts]) if parts else torch.zeros(0, dtype=torch.bool)
    w = v[fine] if basis is None else v[fine] @ basis.to(v).T
    lengths = torch.linalg.vector_norm(w, ord=p, dim=1, keepdim=True)
    some = lengths[:, 0] > 0  # a basis may have columns of zeros
    w, kept = (w / lengths)[some], subsets[fine][some]
    offsets = -(w * X[kept[:, 0]]).sum(1) if bias else w.new_zeros(len(w))
    gates = Gates(torch.cat([w, -w]).T.contiguous(), torch.cat([offsets, -offsets]))
    return Wedges(gates, torch.cat([kept, kept]), p, bias, skipped=len(subsets) - len(kept))


def _normals(rows: Tensor, n: int, subsets: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Normals of subsets of rows; with bias of the differences to the first one, of rows that are points."""
    chosen = rows[subsets]
    if not bias:
        return normals(chosen)
    points = (subsets[:, 1:] < n)[..., None]
    return normals(torch.where(points, chosen[:, 1:] - chosen[:, :1], chosen[:, 1:]))


def _faces(d: int, p: float) -> Tensor:
    """Directions (m, d) whose hyperplanes bound the faces of the unit ball: e_k for p = 1, e_k +- e_l for p = inf, none for 2."""
    if p not in NORMS:
        raise RecipeError(f"p is {p}: choose one of 1, 2, inf")
    axes = torch.eye(d, dtype=torch.float64)
    if p == 1:
        return axes
    if p == 2 or d == 1:
        return axes[:0]
    k, l = torch.triu_indices(d, d, 1)
    return torch.cat([axes[k] - axes[l], axes[k] + axes[l]])


def network(wedges: Wedges, solution: Solution) -> ReluNetwork:
    """The network of a Solution of `solve_lasso` on `wedges.columns(X)`: what neurons with weights there are, balanced.

    Its 1/2 sum (||w||_p^2 + ||a||^2) is sum ||z_k||.  Raises RecipeError for a solution of another dictionary.
    """
    if solution.U.shape[:2] != (len(wedges), 1):
        raise RecipeError(f"U is {tuple(solution.U.shape)}, the dictionary has {len(wedges)} neurons: give its own Solution")
    Z = solution.U[:, 0].double()
    kept = (Z != 0).any(1)
    roots = Z[kept].norm(dim=1, keepdim=True).sqrt()  # (m, 1)
    gates = wedges.gates[kept]
    first = linear_layer(roots * gates.vectors.T, roots[:, 0] * gates.offsets)
    return ReluNetwork(first, linear_layer((Z[kept] / roots).T, solution.b.double()))


def principal(X: Tensor, k: int) -> Tensor:
    """The k leading principal directions (d, k) of X (n, d), orthonormal; fewer where the rank of X is."""
    _, sizes, V = torch.linalg.svd(X.double() - X.double().mean(0), full_matrices=False)
    rank = int((sizes > RANK * X.double().norm(dim=1).max()).sum())
    return V[: min(k, rank)].T.contiguous()


def sketched(d: int, k: int, generator: torch.Generator) -> Tensor:
    """A sparse sketch (d, k), `linalg.sketch`: normals in its range know every feature, mixed at random."""
    return sketch(torch.eye(d, dtype=torch.float64), k, "sparse", generator)


def draw_gates(
    X: Tensor, P: int, generator: torch.Generator, *, bias: bool = True, most: int = MOST, basis: Tensor | None = None
) -> Gates:
    """P hyperplanes, each through neighbouring samples of X (n, d); fewer where subsets are degenerate: gates for `Problem`s.

    Normals lie in the range of a basis (d, k), e.g. `sketched`; without one, in the span of at most `most` principal directions.
    """
    if basis is None:
        basis = principal(X, min(most, len(X)))
    size = basis.shape[1]
    if not size:
        return Gates(X.new_zeros(X.shape[1], 0), X.new_zeros(0))
    found = through(X, local(X, size if bias else size - 1, P, generator), bias=bias, basis=basis)
    gates = found.gates
    return Gates(gates.vectors[:, : len(gates) // 2].contiguous(), gates.offsets[: len(gates) // 2])


def factor(X: Tensor) -> float:
    """What the Lasso on `dictionary(X, p=2, bias=False)` may be above the optimum of all networks, as a factor of it.

    The largest 1 / cos phi over the cells on which a sample is open, from cones that contain them; exact in two dimensions.
    lasso(lam) <= optimum(lam factor) <= factor optimum(lam).  inf where the rank of X is above 3, or its cells are too many.
    """
    cells = enumerated(X)
    if cells is None:
        return math.inf
    if not cells.shape[1]:
        return 1.0
    R = dictionary(X, bias=False).gates.vectors  # (d, K)
    lengths = X.double().norm(dim=1, keepdim=True)
    scores = X.double() @ R / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    on, off = (scores > TIED).double(), (scores < -TIED).double()
    D = cells.double()
    inside = (D.T @ off + (1 - D).T @ on) == 0  # (cells, K): rays of the closed cell
    axes = torch.nn.functional.normalize(inside.double() @ R.T, dim=1)
    best = torch.full((len(D.T),), -1.0, dtype=torch.float64)
    for turn in range(BADOIU):
        cosines = torch.where(inside, axes @ R, torch.inf)
        least, far = cosines.min(1)
        best = torch.maximum(best, least)
        axes = torch.nn.functional.normalize(axes + (R.T[far] - axes) / (turn + 2), dim=1)
    return 1 / best.min().item() if best.min() > 0 else math.inf
