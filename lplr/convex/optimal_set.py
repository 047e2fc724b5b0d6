"""All optimal solutions of a convex programme, from one of them: a polytope of lengths.

    min f(Z; Y) + lam sum_b ||w_b||,  Z = sum_b A_b w_b (+ 1 b^T),  w_b in K_b;     blocks b: gates ("group"), gates and outputs
                                                                                     ("columns"), for relu with signs
theta = -grad f(Z) is the same at every optimum.  With q_b = Pi_{K_b}(A_b^T theta), ||q_b|| <= lam, the optima are

    { w_b = alpha_b q_b / lam for b in E, else 0 :  alpha >= 0,  F alpha = z },
    E = { b : ||q_b|| = lam },   F_b = vec(A_b q_b / lam)

(K_b the whole space for gated): alpha_b = ||w_b||, z is the one optimal fit; sum alpha is constant as <theta, F_b> = lam.
F and z are taken less what the loss does not see or b makes up for: means of columns with an intercept, of rows for softmax.
Blocks that are in use at some optimum, S within E, are found by linear programmes (`polytope`).

Networks.  An optimum is the network of neurons (alpha_b / lam)^{1/2} q_b, outer weights (alpha_b lam)^{1/2} (`network.export`).
For relu with all patterns that can occur, all optimal networks are these, up to the order of neurons and splitting one into
copies sqrt(s_k) (w, a), sum s_k = 1.  Neurons on a face of their cone may be shared by cells: the weights are then split in
many ways, the network is the same (`same_network`).  A point of the set of a programme with fewer gates is stationary for
the network that has just these patterns (`subsampled`), and an optimum of all where its certificate says so.
Minimal: the fits in use are independent (a vertex); no optimum uses a strict part of its blocks.  Another vertex may have fewer:
fits a, b, (a + b)/2 and z = a + b; `Polytope.sparsest` finds the least.

In floating point: E is what reaches lam within `tol`, and the objective varies over the set by at most `slack` of its penalty.
Source: Mishkin, Pilanci, "Optimal sets and solution paths of ReLU networks", ICML 2023, section 3; losses, intercepts, several
outputs and the projections Pi_{K_b} (by Moreau, so that q_b is unique): here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lplr.convex import cones
from lplr.convex.path import path
from lplr.convex.penalty import Penalty
from lplr.convex.polytope import Polytope
from lplr.convex.problem import Problem
from lplr.convex.solution import Run, Solution
from lplr.errors import RecipeError

TOL = 1e-6  # of lam: how far ||q_b|| may be from it in E
TIGHT = 1e-13  # relative gap of solutions along a path
EQUAL = 1e-7  # directions of one neuron agree to this


@dataclass(frozen=True)
class Blocks:
    """K blocks: sign (K,) of +-1, gate (K,), output (K,) (None: all outputs), unit directions (K, d, 1), or (K, d, C)."""

    sign: Tensor
    gate: Tensor
    output: Tensor | None
    direction: Tensor

    def __len__(self) -> int:
        return len(self.gate)

    def __getitem__(self, kept: Tensor) -> Blocks:
        return Blocks(self.sign[kept], self.gate[kept], None if self.output is None else self.output[kept], self.direction[kept])

    def fits(self, problem: Problem) -> Tensor:
        """What the blocks at length one add to Z, (n, C, K), on the samples of a problem with the same gates, in float64.

        relu: of the neurons, (x q)_+, on its own samples the same as D_i X q.
        """
        n, (_, _, C) = len(problem.X), problem.shape
        out = torch.zeros(n, C, len(self), dtype=torch.float64, device=problem.Y.device)
        for rows in problem.blocks():
            X = problem.rows(rows, torch.float64)
            D = problem.patterns(rows, torch.float64)[:, self.gate]
            products = torch.einsum("nd,kdc->nck", X, self.direction)
            products = products.clamp_min(0) if problem.activation == "relu" else products * D[:, None, :]
            products = products * self.sign
            if self.output is None:
                out[rows] = products
            else:
                out[rows].scatter_(1, self.output.expand(len(X), 1, -1), products)
        return out

    def weights(self, lengths: Tensor, problem: Problem) -> Tensor:
        """U (P, d, C), or V (2, P, d, C), of lengths (K,)."""
        P, d, C = problem.shape
        U = torch.zeros(2, P, d, C, dtype=torch.float64, device=lengths.device)
        sides = ((1 - self.sign) / 2).long()
        scaled = lengths[:, None, None] * self.direction
        if self.output is None:
            U[sides, self.gate] = scaled
        else:
            U[sides, self.gate, :, self.output] = scaled[:, :, 0]
        return U if problem.activation == "relu" else U[0]

    def lengths(self, U: Tensor) -> Tensor:
        """<q_b, U_b> (K,): lengths of weights U (P, d, C) or V (2, P, d, C) along the directions."""
        U = U.double() if U.ndim == 4 else U.double()[None]
        parts = U[((1 - self.sign) / 2).long(), self.gate]  # (K, d, C)
        if self.output is not None:
            parts = parts.gather(2, self.output[:, None, None].expand(-1, parts.shape[1], 1))
        return (parts * self.direction).sum((1, 2))


@dataclass(frozen=True)
class OptimalSet:
    """Every optimum of a programme: blocks of E and the polytope of their lengths; theta (n, C) is the dual optimum.

    fits (n, C, K) of blocks of length one; mean (C,) of the optimal Z, intercept included.  slack: the largest
    | ||q_b|| / lam - 1 | of E.
    """

    problem: Problem
    penalty: Penalty
    theta: Tensor
    blocks: Blocks
    polytope: Polytope
    fits: Tensor
    mean: Tensor
    slack: float

    @property
    def support(self) -> Tensor:
        """(K,) bool: blocks of E that are in use at some optimum."""
        return self.polytope.support

    @property
    def independent(self) -> bool:
        """Whether the fits of all blocks of E are independent: then the optimum is unique, and its uniqueness is plain to see."""
        return self.polytope.free.shape[1] == 0

    @property
    def unique(self) -> bool:
        """Whether there is one optimum, by linear programmes."""
        return self.polytope.dimension == 0

    @cached_property
    def same_network(self) -> bool:
        """Whether all optima are one network, up to the order and splitting of neurons: weights differ only between cells that
        share a neuron.
        """
        if self.unique or self.problem.activation == "gated":
            return self.unique
        way = torch.zeros(len(self._neuron.unique()), self.polytope.dimension, dtype=torch.float64)
        return bool(way.index_add_(0, self._neuron, self.polytope.inner).abs().max() <= EQUAL)

    @cached_property
    def _neuron(self) -> Tensor:
        """(K,): number of the relu neuron of each block; equal where sign, output and direction are."""
        q, B = self.blocks.direction.flatten(1), self.blocks
        same = (q @ q.T >= 1 - EQUAL**2) & (B.sign[:, None] == B.sign)
        if B.output is not None:
            same &= B.output[:, None] == B.output
        return torch.unique(same.int().argmax(1), return_inverse=True)[1]

    def solution(self, lengths: Tensor) -> Solution:
        """The optimum of these lengths (K,), with its own certificate."""
        U = self.blocks.weights(lengths, self.problem)
        run = Run(self.problem, self.penalty, max(2 * self.slack, 1e-9), 0, None)
        run.certify(U, self.intercept(lengths), self.theta)
        return run.finish("take a set with a smaller tol")

    def intercept(self, lengths: Tensor) -> Tensor:
        """b (C,) that belongs to lengths: what makes the fit of the mean sample the optimal one; of mean zero for softmax."""
        if not self.problem.intercept:
            return torch.zeros_like(self.mean)
        b = self.mean - self.fits.mean(0) @ lengths
        return b - b.mean() if self.problem.loss == "softmax" else b

    def outputs(self, lengths: Tensor, other: Problem) -> Tensor:
        """Z (n', C) on the samples of another problem with the same gates (its patterns are those of its samples)."""
        return self.blocks.fits(other) @ lengths + self.intercept(lengths)

    def contains(self, U: Tensor, b: Tensor, tol: float = TOL) -> bool:
        """Whether weights U (P, d, C), or V (2, P, d, C), and b (C,) are an optimum: along q_b, with its fit."""
        lengths = self.blocks.lengths(U)
        U, b = U.double(), b.double()
        off = (U - self.blocks.weights(lengths, self.problem)).norm()
        b = b - b.mean() if self.problem.loss == "softmax" else b
        near = (b - self.intercept(lengths)).norm() <= tol * max(self.mean.norm().item(), self.polytope.total)
        return bool(off <= tol * self.polytope.total) and bool(near) and self.polytope.contains(lengths, tol)

    def least_norm(self) -> Tensor:
        """Lengths (K,) of the optimum with the least sum ||w_b||^2."""
        K = len(self.polytope)
        return self.polytope.nearest(torch.eye(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64))

    def sparsest(self, seconds: float = 60.0) -> Tensor:
        """Lengths (K,) of an optimum with the fewest blocks; RecipeError where this takes too long."""
        return self.polytope.sparsest(seconds)

    def best_on(self, other: Problem) -> Tensor:
        """Lengths (K,) of the optimum with the least squared error sum ||Z - Y||^2 on other samples, e.g. validation data."""
        fits = self.blocks.fits(other)
        means = self.fits.mean(0) if self.problem.intercept else torch.zeros_like(self.fits[0])
        aim = other.Y.double() - (self.mean if self.problem.intercept else 0)
        return self.polytope.nearest((fits - means).flatten(0, 1), aim.flatten())


def optimal_set(problem: Problem, penalty: Penalty, solution: Solution, *, tol: float = TOL) -> OptimalSet:
    """The set of all optima of a programme with solution `solution`, whose relative gap should be 1e-10 or less.

    tol: blocks with ||q_b|| >= (1 - tol) lam may be used.  Raises RecipeError for the nuclear norm of several outputs, whose set
    is no polytope, and for a solution whose gap is above tol or whose weights are on blocks that theta keeps out.
    """
    if penalty.norm == "nuclear" and problem.Y.shape[1] > 1:
        raise RecipeError("with the nuclear norm the optimal set is a spectrahedron, no polytope: use norm 'group' or 'columns'")
    if not solution.relative_gap <= tol:
        raise RecipeError(f"the solution's relative gap is {solution.relative_gap:.1e}: solve to tol=1e-10 for its optimal set")
    theta = solution.theta.double()
    blocks, sizes = _equicorrelated(problem, penalty, theta, tol)
    lengths = blocks.lengths(solution.U).clamp_min(0)
    missed = penalty.lengths(solution.U.double()).sum() - lengths.sum()
    if missed > 10 * tol * max(lengths.sum().item(), 1e-300):
        raise RecipeError(f"blocks in use are {tol:.0e} away from lam: solve to a smaller tol, or allow a larger one here")
    fits = blocks.fits(problem)
    return OptimalSet(
        problem, penalty, theta, blocks,
        polytope=Polytope.of(_seen(problem, fits), lengths),
        fits=fits,
        mean=(fits.mean(0) @ lengths + solution.b.double()),
        slack=(sizes / penalty.lam - 1).abs().max().item() if len(blocks) else 0.0,
    )  # fmt: skip


def optimal_sets(problem: Problem, norm: str = "group", *, lams: Sequence[float], tol: float = TOL) -> Iterator[OptimalSet]:
    """The optimal sets along a path of descending lams, each from a solution to a relative gap of TIGHT."""
    for lam, solution in path(problem, norm, lams=lams, tol=TIGHT):
        yield optimal_set(problem, Penalty(lam, norm), solution, tol=tol)


def subsampled(problem: Problem, gates: Tensor) -> Problem:
    """The programme with some of the gates (K,) alone, indices or bool.

    Its optima, zeros elsewhere, are stationary points of the network with all patterns; optima where they are certified there.
    """
    return replace(problem, D=problem.D[:, gates])


def extended(solution: Solution, gates: Tensor, problem: Problem, penalty: Penalty) -> Solution:
    """A solution of `subsampled` as a point of the whole programme, with the gap that it has there."""
    side = 1 if problem.activation == "relu" else 0
    U = solution.U.new_zeros((2, *problem.shape) if side else problem.shape)
    U.movedim(side, 0)[gates] = solution.U.movedim(side, 0)
    run = Run(problem, penalty, 1e-6, 0, None)
    run.certify(U, solution.b, solution.theta)
    return run.finish("solve the programme with all gates")


def _equicorrelated(problem: Problem, penalty: Penalty, theta: Tensor, tol: float) -> tuple[Blocks, Tensor]:
    """The blocks with ||q_b|| >= (1 - tol) lam and these lengths."""
    pulled, floor = problem.adjoint(theta), (1 - tol) * penalty.lam
    if problem.activation == "gated" and penalty.norm != "columns":
        gate = (pulled.norm(dim=(1, 2)) >= floor).nonzero()[:, 0]
        q, output, sign = pulled[gate], None, torch.ones_like(gate)
    else:
        sides = cones.both_signs(pulled) if problem.activation == "relu" else pulled[None]
        side, gate, output = (sides.norm(dim=2) >= floor).nonzero().T  # projections are no longer
        q, sign = sides[side, gate, :, output], 1 - 2 * side
        if problem.activation == "relu" and len(gate):
            q = cones.project(q, problem.X.double(), cones.signs(problem.D)[gate])
        q = q[:, :, None]
    sizes = q.norm(dim=(1, 2))
    blocks = Blocks(sign.double(), gate, output, q / sizes.clamp_min(1e-300)[:, None, None])
    return blocks[sizes >= floor], sizes[sizes >= floor]


def _seen(problem: Problem, fits: Tensor) -> Tensor:
    """The part (n C, K) of fits (n, C, K) that the loss sees and no intercept makes up for."""
    if problem.loss == "softmax":
        fits = fits - fits.mean(1, keepdim=True)
    if problem.intercept:
        fits = fits - fits.mean(0)
    return fits.flatten(0, 1)
