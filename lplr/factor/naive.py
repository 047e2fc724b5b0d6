"""Naive quantization: every entry of A rounded to the nearest point of a grid, one range a row.

Source: the baseline NQ of Saha, Srivastava, Pilanci, NeurIPS 2023, section 4 (there one range for the whole matrix).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.factor.factorization import Factorization
from lplr.quant.uniform import quantize
from lplr.recipe import FactorSpec


def naive(A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> Factorization:
    """A (n x d) ~ Q, O(n d); the metric is not used."""
    q = spec.q
    assert q is not None
    axis = "tensor" if q.ranges == "tensor" else "row"
    return Factorization(q=quantize(A, q.bits, axis=axis, rounding=q.rounding, clip=q.clip, grid=q.grid, generator=generator))
