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

    labels (n,): half of the others are of other classes, as far as there are some: hyperplanes where the classes meet.
    """
    n = len(X)
    _enough(n, size)
    if not size:
        return torch.zeros(count, 0, dtype=torch.long)
    X, centres = X.double(), torch.randint(n, (count,), generator=generator)
    squares, parts = X.square().sum(1), []
    for rows in centres.split(max(1, ENTRIES // n)):
        distances = squares[rows, None] - 2 * X[rows] @ X.T + squares
        distances[torch.arange(len(rows)), rows] = torch.inf
        noise = torch.rand(len(rows), n, generator=generator)
        if labels is None:
            chosen = _near(distances, noise, size - 1)
        else:
            strange = labels[rows, None] != labels
            few = min((size - 1) // 2, int(strange.sum(1).min()) if len(rows) else 0)
            others = _near(torch.where(strange, distances, torch.inf), noise, few)
            distances.scatter_(1, others, torch.inf)
            chosen = torch.cat([others, _near(torch.where(strange, distances + 1e300, distances), noise, size - 1 - few)], 1)
        parts.append(torch.cat([rows[:, None], chosen], 1))
    return torch.cat(parts) if parts else torch.zeros(0, size, dtype=torch.long)


def nearest(X: Tensor, gates: Gates, size: int) -> Tensor:
    """The samples (P, size) nearest to each of P hyperplanes: what a drawn or trained neuron is polished to."""
    _enough(len(X), size)
    scores = (X.double() @ gates.vectors.double() + gates.offsets.double()).abs()
    return scores.T.topk(size, dim=1, largest=False).indices


def _near(distances: Tensor, noise: Tensor, size: int) -> Tensor:
    """size columns (rows, size) at random among the WIDE size nearest."""
    pool = distances.topk(min(WIDE * size, distances.shape[1]), dim=1, largest=False)
    weights = torch.where(pool.values < torch.inf, noise.gather(1, pool.indices), -1.0)
    return pool.indices.gather(1, weights.topk(size, dim=1).indices)


def _enough(n: int, size: int) -> None:
    if n < size:
        raise RecipeError(f"a hyperplane through {size} samples of {n}: give more samples, or a basis of at most {n}")
