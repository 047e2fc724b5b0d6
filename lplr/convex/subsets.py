"""Subsets of samples that hyperplanes go through: all of them, at random, neighbours, or those nearest to given hyperplanes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lplr.convex.gates import Gates
from lplr.errors import RecipeError

EVERY = 1 << 20  # subsets up to which all are listed
ENTRIES = 1 << 22  # of one batch of distances
WIDE = 2  # neighbours to choose from, for each one that is chosen


def every(n: int, size: int) -> Tensor:
    """All subsets (N, size) of n samples, N = C(n, size).  Raises RecipeError where they are more than EVERY."""
    count = math.comb(n, size)
    if count > EVERY:
        raise RecipeError(f"{n} samples have {count:.2g} subsets of {size}, at most {EVERY:,} are listed: sample some of them")
    if not size or not count:
        return torch.zeros(count, size, dtype=torch.long)
    return torch.combinations(torch.arange(n), size)


def uniform(n: int, size: int, count: int, generator: torch.Generator) -> Tensor:
    """count subsets (count, size) of n samples, drawn independently.  Raises RecipeError where n < size."""
    _enough(n, size)
    parts = []
    for rows in torch.arange(count).split(max(1, ENTRIES // n)):
        parts.append(torch.rand(len(rows), n, generator=generator).topk(size, dim=1).indices)
    return torch.cat(parts) if parts else torch.zeros(0, size, dtype=torch.long)


def local(X: Tensor, size: int, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
    """count subsets (count, size): a sample, and others among its WIDE times as many nearest neighbours.

    labels (n,): half of the others are of other classes, or as many as there are; hyperplanes where the classes meet.
    """
    n = len(X)
    _enough(n, size)
    if not size or not count:
        return torch.zeros(count, size, dtype=torch.long)
    centres, of = torch.randint(n, (count,), generator=generator).unique(return_inverse=True)
    kinds = [(size - 1, None)] if labels is None else _shares(labels, centres, size - 1)
    X = X.double()
    pools = [[_neighbours(X, rows, few, kind) for rows in centres.split(max(1, ENTRIES // n))] for few, kind in kinds]
    chosen = [centres[of, None]]
    for (few, _), parts in zip(kinds, pools, strict=True):
        pool = torch.cat(parts)
        places = torch.rand(count, pool.shape[1], generator=generator).topk(few, dim=1).indices
        chosen.append(pool[of].gather(1, places))
    return torch.cat(chosen, 1)


def _shares(labels: Tensor, centres: Tensor, others: int) -> list[tuple[int, Tensor | None]]:
    """How many neighbours of other classes, and of the same; all alike where the classes are too small for either."""
    strange = labels[:, None] != labels  # (n, n)
    same = ~strange
    same.fill_diagonal_(False)
    few = max(others // 2, others - int(same[centres].sum(1).min()))
    if few > int(strange[centres].sum(1).min()):
        return [(others, None)]
    return [(few, strange), (others - few, same)]


def _neighbours(X: Tensor, rows: Tensor, few: int, kind: Tensor | None) -> Tensor:
    """The nearest samples (rows, at most WIDE few) of rows of X, none itself; kind (n, n): those that count."""
    squares = X.square().sum(1)
    distances = squares[rows, None] - 2 * X[rows] @ X.T + squares
    distances[torch.arange(len(rows)), rows] = torch.inf
    most = len(X) - 1
    if kind is not None:
        distances = torch.where(kind[rows], distances, torch.inf)
        most = int(kind.sum(1).min())
    return distances.topk(max(few, min(WIDE * few, most)), dim=1, largest=False).indices


def nearest(X: Tensor, gates: Gates, size: int) -> Tensor:
    """The samples (P, size) nearest to each of P hyperplanes: what a drawn or trained neuron is polished to."""
    _enough(len(X), size)
    scores = (X.double() @ gates.vectors.double() + gates.offsets.double()).abs()
    return scores.T.topk(size, dim=1, largest=False).indices


def _enough(n: int, size: int) -> None:
    if n < size:
        raise RecipeError(f"a hyperplane through {size} samples of {n}: give more samples, or a basis of at most {n}")
