"""What lies between raw samples and a programme: standardised features, a feature of ones, gates drawn from the samples.

    x' = (x - mean) / scale, then 1 where there is an intercept;   D_ji = 1(x_j g_i + o_i > 0) with g, o over raw samples

Gates are folded before they are applied: the patterns of the programme are those of the exported network to the last bit.
A sample on a hyperplane, as on a grid of values, would be on either side of it by rounding: offsets are moved so that none is.
Columns that are constant but for rounding become zero, and no gate looks at them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lplr.convex.gates import Gates, clean, gaussian, sample
from lplr.convex.network import fold_gates
from lplr.convex.wedge import draw_gates
from lplr.errors import RecipeError

CONSTANT = 1e-13  # spread of a column, of its largest entry, below which it is constant
LEAST = 1e-180  # a largest entry below this counts as this: weights over the spread stay in range
ON = 1e-10  # a score below this, of the sizes that make it, is rounding
KINDS = ("gaussian", "data", "mixed", "wedge")


@dataclass(frozen=True)
class Frame:
    """mean, scale (d,), scale > 0; varies (d,) bool: columns that are not constant; ones: whether a feature of ones follows."""

    mean: Tensor
    scale: Tensor
    varies: Tensor
    ones: bool

    @classmethod
    def of(cls, X: Tensor, *, standardize: bool, ones: bool) -> Frame:
        """The frame of samples X (n, d); without `standardize` features stay as they are."""
        size = X.abs().amax(0).clamp_min(LEAST)
        mean, scale = (X / size).mean(0) * size, (X / size).std(0, correction=0) * size  # of X alone, squares leave the range
        varies = scale > CONSTANT * size
        if not standardize:
            return cls(torch.zeros_like(mean), torch.ones_like(scale), torch.ones_like(varies), ones)
        return cls(mean, torch.where(varies, scale, torch.ones_like(scale)), varies, ones)

    def apply(self, X: Tensor) -> Tensor:
        """Features (n, d), or (n, d + 1), of the programme."""
        X = torch.where(self.varies, (X - self.mean) / self.scale, torch.zeros_like(X))
        return torch.cat([X, torch.ones_like(X[:, :1])], 1) if self.ones else X


def draw(
    kind: str, X: Tensor, P: int, frame: Frame, generator: torch.Generator, *, linear: bool, offsets: bool
) -> tuple[Gates, Tensor]:
    """Gates over raw samples and their patterns D (n, K), K <= P + 1: P of `kind`, the linear block first, none twice.

    "gaussian": normal vectors, a normal offset where there are ones; "data": half way between two samples; "mixed": of both;
    "wedge": through neighbouring samples, as many as there are principal directions to draw it in.
    offsets: without, all hyperplanes pass through the mean, as the cones of relu without ones need it.  Raises RecipeError where
    no gate is open on a sample.
    """
    S = frame.apply(X)
    inner = S[:, : X.shape[1]]
    if kind == "wedge":
        parts = [draw_gates(inner, P, generator, bias=offsets)]
    else:
        normal = {"gaussian": P, "data": 0, "mixed": (P + 1) // 2}[kind]
        G = gaussian(S.shape[1], normal, generator, X.dtype)
        parts = [Gates(G[: X.shape[1]], G[-1] if frame.ones else torch.zeros(normal, dtype=X.dtype))]
        parts.append(sample(inner, P - normal, generator))
    gates = Gates(torch.cat([p.vectors for p in parts], 1), torch.cat([p.offsets for p in parts]))
    gates = Gates(torch.where(frame.varies[:, None], gates.vectors, 0.0), gates.offsets if offsets else 0 * gates.offsets)
    if not offsets:
        gates = tilted(gates, inner)
    gates = fold_gates(gates, frame.mean, frame.scale)
    if offsets:
        gates = settled(gates, X)
    if linear:
        none, one = torch.zeros(X.shape[1], 1, dtype=X.dtype), torch.ones(1, dtype=X.dtype)
        gates = Gates(torch.cat([none, gates.vectors], 1), torch.cat([one, gates.offsets]))
    D = gates.patterns(X)
    kept = clean(D)
    if not len(kept):
        sizes = f"n_samples = {len(X)}, n_features = {X.shape[1]}"
        raise RecipeError(f"of {P} gates none is open on a sample ({sizes}): raise n_gates, or take the linear block")
    return gates[kept], D[:, kept]


def tilted(gates: Gates, X: Tensor) -> Gates:
    """Gates without offsets, turned so that no sample is on a hyperplane: those that were are open, half way to the next sample.

    Samples that are zero, and such that depend on one another in a way that keeps one of them closed, stay where they are.
    """
    scores = X @ gates.vectors
    clear = scores.abs() > ON * (X.abs() @ gates.vectors.abs()).amax(0)
    on = ~clear & X.any(1, keepdim=True)
    vectors = gates.vectors.clone()
    for k in on.any(0).nonzero()[:, 0]:
        rows = X[on[:, k]]
        turn = torch.linalg.pinv(rows).sum(1)  # rows @ turn = 1, where they allow it
        change = X @ turn
        if (rows @ turn).amin() > 0.5:
            room = (scores[:, k] / change).abs()[clear[:, k] & (change != 0)]
            vectors[:, k] += turn * (room.amin() / 2 if len(room) else 1.0)
    return Gates(vectors, gates.offsets)


def settled(gates: Gates, X: Tensor) -> Gates:
    """The gates with offsets such that no sample is on a hyperplane: those that were are open, half way to the next below.

    Where no sample is below, half way to the next above; a hyperplane through all of them stays.
    """
    scores = X @ gates.vectors + gates.offsets
    noise = ON * ((X.abs() @ gates.vectors.abs()).amax(0) + gates.offsets.abs())
    clear = scores.abs() > noise
    far = torch.full_like(scores, torch.inf)
    above = torch.where(clear & (scores > 0), scores, far).amin(0)
    below = torch.where(clear & (scores < 0), -scores, far).amin(0)
    room = torch.where(below.isfinite(), below, above)
    moved = (~clear).any(0) & room.isfinite()
    return Gates(gates.vectors, torch.where(moved, gates.offsets + room / 2, gates.offsets))
