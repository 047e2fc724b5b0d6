"""Quantize L, project, quantize R, and refine both by turns; the best iterate is kept.

In the metric H = C C^T (identity without calibration) minimise ||(A - L R) C||_F over packed L, R:

    L <- quantize(L*)         L* = argmin_L ||(A - L R) C||_F      least squares with the rows of R C
    R <- quantize(R*)         R* = argmin_R ||A - L R||_F          the same minimiser for every H > 0

Each half step is exact before its rounding, so only rounding can make a round worse: the best round is returned.
Sources: Saha, Srivastava, Pilanci, NeurIPS 2023, Algorithm 1 (one round); Saha, Sagan, Srivastava, Goldsmith, Pilanci,
NeurIPS 2024 (CALDERA), Algorithm 2 (the alternation).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lplr.factor.factorization import Factorization
from lplr.linalg.project import least_squares
from lplr.quant.qtensor import QTensor
from lplr.quant.uniform import Axis, quantize
from lplr.recipe import FactorSpec, QuantSpec

L_AXIS: dict[str, Axis] = {"tensor": "tensor", "row": "row", "rank": "column", "both": "both"}
R_AXIS: dict[str, Axis] = {"tensor": "tensor", "row": "column", "rank": "row", "both": "both"}


def quantize_l(L: Tensor, spec: QuantSpec, generator: torch.Generator) -> tuple[QTensor, Tensor]:
    """L (n x r) on its grid, and the factor (r,) or (1,) along the rank that was left out of it for R to absorb."""
    q = _on_grid(L, spec, L_AXIS[spec.ranges], generator)
    if spec.ranges == "tensor":
        assert q.row_scale is not None
        return replace(q, row_scale=None), q.row_scale.to(L.dtype)
    left_out = q.col_scale if q.col_scale is not None else torch.ones(1, device=L.device)
    return replace(q, col_scale=None), left_out.to(L.dtype)


def quantize_r(R: Tensor, spec: QuantSpec, generator: torch.Generator) -> QTensor:
    """R (r x d) on its grid."""
    return _on_grid(R, spec, R_AXIS[spec.ranges], generator)


def _on_grid(x: Tensor, spec: QuantSpec, axis: Axis, generator: torch.Generator) -> QTensor:
    return quantize(
        x, spec.bits, axis=axis, rounding=spec.rounding, clip=spec.clip, grid=spec.grid, generator=generator
    )


def project(A: Tensor, start: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> Factorization:
    """Best of `spec.alternations` + 1 rounds from L* = start (n x r).

    With alternations the error is measured, and never exceeds ||A C||_F: where no round beats L R = 0, that is returned.
    """
    assert spec.l is not None and spec.r is not None
    in_metric = A if C is None else A @ C
    best, least = None, float(torch.linalg.vector_norm(in_metric))
    L_star = start
    for turn in range(spec.alternations + 1):
        l, _ = quantize_l(L_star, spec.l, generator)
        L = l.dequantize(A.dtype)
        r = quantize_r(least_squares(L, A), spec.r, generator)
        if spec.alternations == 0:
            return Factorization(l, r)
        R = r.dequantize(A.dtype)
        R = R if C is None else R @ C
        error = float(torch.linalg.vector_norm(torch.addmm(in_metric, L, R, alpha=-1)))
        if error <= least:
            best, least = Factorization(l, r), error
        elif best is None:
            best = Factorization(l, r.zeroed())
        if turn < spec.alternations:
            L_star = least_squares(R.T, in_metric.T).T
    assert best is not None
    return best
