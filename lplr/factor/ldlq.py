"""A backbone alone, rounded with feedback: A ~ Q in the bases of the rotated inputs and outputs.

The rotations make the entries of A close to normal, so that one scale serves all, and spread the inputs' second moments over
all columns; the columns that are rounded last, whose errors nothing absorbs any more, get the bits that a fractional budget
leaves over.
Where the errors of the outputs matter differently and together (G, `stream.sensitivity`), the trellis feeds back along its
columns as well.
Source: Chee, Cai, Kuleshov, De Sa, "QuIP", NeurIPS 2023 (incoherence and LDLQ); the split widths are our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.factor.factorization import Factorization
from lplr.quant.ldlq import ldlq as rounded
from lplr.recipe import FactorSpec


def ldlq(
    A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator, *, G: Tensor | None = None
) -> Factorization:
    """A (n x d) ~ Q on any grid; without a metric every column is rounded to nearest.  O(n d (n + d)), and the grid's encoder.

    G (n x n), in A's bases, weighs the outputs' errors.  The error never exceeds ||A C||_F: where feedback drove the rounding
    beyond that, G is left out, then Q = 0 is returned.
    """
    assert spec.q is not None
    H = torch.eye(A.shape[1], dtype=A.dtype, device=A.device) if C is None else C @ C.T
    axis = "tensor" if spec.q.ranges == "tensor" else "row"
    q = rounded(A, spec.q.bits, H, G=G, grid=spec.q.grid, axis=axis, narrow=spec.q_narrow)
    error = A - q.dequantize(A.dtype)
    before, after = (float(torch.linalg.vector_norm(X if C is None else X @ C)) for X in (A, error))
    if after <= before:
        return Factorization(q=q)
    return Factorization(q=q.zeroed()) if G is None else ldlq(A, spec, C, generator)
