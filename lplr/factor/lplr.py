"""LPLR: sketch, quantize, project.

    Y = (A A^T)^q A S,      L = Q(Y),      R = Q'(argmin_X ||L X - A||_F)

The sketch spreads the leading directions evenly over the columns of L, so its entries are close to normal and few bits
serve; the projection absorbs the mixing and the error of L.  With a metric H = C C^T the range of A C is sketched.
Source: Saha, Srivastava, Pilanci, "Matrix Compression via Randomized Low Rank and Low Precision Factorization",
NeurIPS 2023, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.factor.alternating import project
from lplr.factor.factorization import Factorization
from lplr.linalg.range_finder import range_finder
from lplr.recipe import FactorSpec


def lplr(A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> Factorization:
    """A (n x d) ~ L R of rank spec.rank; products of O(n d rank), 2 + 2 q of them without refinement."""
    assert spec.rank
    in_metric = A if C is None else A @ C
    Y = range_finder(in_metric, spec.rank, spec.sketch, spec.power_iterations, generator)
    return project(A, Y, spec, C, generator)
