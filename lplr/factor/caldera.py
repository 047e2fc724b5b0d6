"""CALDERA: a backbone with feedback rounding plus low-precision factors, A ~ Q + L R.

How the bits are shared between the two, where that is left open, is `factor.rank.exchanges`.

By turns, in the metric H = C C^T, keeping the best round:

    L R <- LPLR of A - Q            Q <- LDLQ of A - L R   (to nearest without a metric)

Source: Saha, Sagan, Srivastava, Goldsmith, Pilanci, "Compressing Large Language Models using Low Rank and Low
Precision Decomposition", NeurIPS 2024, Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.errors import RecipeError
from lplr.factor.factorization import Factorization
from lplr.factor.lplr import lplr
from lplr.quant.ldlq import ldlq
from lplr.quant.qtensor import QTensor
from lplr.quant.uniform import quantize
from lplr.recipe import FactorSpec, QuantSpec

ROUNDS = 2  # a compromise: more lower the error where Q has one bit, at the price of their time; the best round is kept


def caldera(A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> Factorization:
    """A (n x d) ~ Q + L R, each on any grid; rank 0 gives Q alone, no q the factors alone.

    The error never exceeds ||A C||_F: where no round beats zero, that is returned.
    """
    if spec.q is None:
        return lplr(A, spec, C, generator)
    H = None if C is None else C @ C.T
    best, least = None, float(torch.linalg.vector_norm(A if C is None else A @ C))
    residual = A
    for _ in range(ROUNDS if spec.rank else 1):
        low_rank = lplr(residual, spec, C, generator) if spec.rank else None
        target = A if low_rank is None else A - low_rank.dequantize(A.dtype)
        q = _backbone(target, spec.q, spec.q_narrow, H, generator)
        rounded = q.dequantize(A.dtype)
        error = target - rounded
        size = float(torch.linalg.vector_norm(error if C is None else error @ C))
        l, r = (None, None) if low_rank is None else (low_rank.l, low_rank.r)
        if size <= least:
            best, least = Factorization(l, r, q), size
        elif best is None:
            best = Factorization(l, None if r is None else r.zeroed(), q.zeroed())
        residual = A - rounded
    assert best is not None
    return best


def _backbone(target: Tensor, spec: QuantSpec, narrow: int, H: Tensor | None, generator: torch.Generator) -> QTensor:
    """Q; with narrow columns but no metric, feedback rounding in the identity, which is rounding to nearest."""
    axis = "tensor" if spec.ranges == "tensor" else "row"
    if narrow and spec.rounding != "nearest":
        raise RecipeError(f"caldera rounds a Q with {narrow} narrow columns to nearest only: set q.rounding to 'nearest'")
    if (H is None and not narrow) or spec.rounding != "nearest":
        return quantize(
            target, spec.bits, axis=axis, rounding=spec.rounding, clip=spec.clip, grid=spec.grid, generator=generator
        )
    H = torch.eye(target.shape[1], dtype=target.dtype, device=target.device) if H is None else H
    return ldlq(target, spec.bits, H, grid=spec.grid, axis=axis, narrow=narrow)
