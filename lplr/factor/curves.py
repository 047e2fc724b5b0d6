"""What a matrix loses at each width of its grid: a measured error-per-bit curve, for `factor.allocate`.

A backbone rounded with feedback is rounded row for row alike once it stands in rotated bases, so a few rows of the rotated matrix
tell the error of all of them:

    e(b) = tr(E_b M E_b^T)  ~  tr(A M A^T) tr(e_b M e_b^T) / tr(a M a^T),     a the first ROWS rows of A = P^T W O

The rounding feeds back in the metric H that the compression will use; M, what the loss minds, may be another
(`stream.sensitivity`).

Feedback along the columns (`quant.ldlq`, G) leaves the same share of it at every width (`gain_along_columns`).

Widths in between those that are rounded lie on the line through their neighbours in log e against bits, which is straight for
every grid of constant gain.  The first and last line go on beyond their ends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lplr.factor.allocate import Point
from lplr.factor.bounds import metric_factor
from lplr.factor.factorization import rotated
from lplr.factor.rank import WEIGH_OUTPUTS, layout, plan
from lplr.quant.ldlq import gain_along_columns, ldlq
from lplr.recipe import WIDTHS, FactorSpec

ROWS = 64  # of the rotated matrix that are rounded
MEASURED = (1.0, 2.0, 4.0)  # widths at which they are
CURVED = ("ldlq", "caldera")  # methods that start from a backbone


def error_curve(
    W: Tensor, spec: FactorSpec, *, H: Tensor | None = None, M: Tensor | None = None, G: Tensor | None = None
) -> list[Point]:
    """(stored bits, tr(E M E^T)) at every width of the backbone's grid; H, M (d x d) as collected, identities if not given, M = H
    if only H is; G (n x n) what the outputs' errors weigh, its mean diagonal counting as 1.

    spec is planned at its budget for its grid; its method is one of CURVED.  O(ROWS d^2) for each width that is rounded, and d^3.
    """
    n, d = W.shape
    planned = plan((n, d), spec)
    assert planned.q is not None and planned.method in CURVED
    grid = planned.q.grid
    A = rotated(W if W.dtype == torch.float64 else W.float(), planned.rotation or 0, planned.output_rotation or 0)
    size = float(A.abs().max())
    if not size > 0:
        return [(_bits((n, d), planned, bits), 0.0) for bits in WIDTHS[grid]]
    seed = planned.rotation or 0
    C = None if H is None else metric_factor(H.to(A.dtype), seed)
    feedback = torch.eye(d, dtype=A.dtype, device=A.device) if C is None else C @ C.T
    M = H if M is None else M
    metric = None if M is None else rotated(rotated(M.to(A.dtype), seed, 0).T, seed, 0)
    sample = A[:ROWS] / size
    whole, part = (_square(X, metric) for X in (A / size, sample))
    scale = size**2 * whole / (part or 1.0)
    if G is not None and grid == "trellis" and planned.method in WEIGH_OUTPUTS:
        scale *= gain_along_columns(rotated(G.to(A.dtype), *2 * (planned.output_rotation or 0,)))
    axis = "tensor" if planned.q.ranges == "tensor" else "row"
    measured = []
    for bits in WIDTHS[grid] if len(WIDTHS[grid]) < 4 else MEASURED:
        E = sample - ldlq(sample, bits, feedback, grid=grid, axis=axis).dequantize(A.dtype)
        measured.append((bits, math.log(max(_square(E, metric), 1e-30 * part) * scale)))
    return [(_bits((n, d), planned, bits), math.exp(_line(measured, bits))) for bits in WIDTHS[grid]]


def _bits(shape: tuple[int, int], planned: FactorSpec, bits: float) -> float:
    assert planned.q is not None
    q = planned.q.model_copy(update={"bits": bits})
    return float(layout(shape, planned.model_copy(update={"q": q, "q_narrow": 0, "rank": 0})).stored_bits())


def _square(X: Tensor, M: Tensor | None) -> float:
    """tr(X M X^T)."""
    return float(torch.linalg.vecdot(X if M is None else X @ M, X).double().sum())


def _line(points: list[Point], x: float) -> float:
    """The polygon through the points at x, its ends continued."""
    at = next((i for i in range(1, len(points)) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
