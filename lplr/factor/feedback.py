"""LPLR with feedback rounding of both factors.

In the metric H = C C^T (identity without calibration) minimise ||(A - L R) C||_F over packed L, R:

    L* = U_k S_k^(1/2) O,  R* = O^T S_k^(-1/2) U_k^T A      A C = U S V^T, O a random rotation: no inverse of H anywhere
    L <- feedback rounding of L* with the metric M = R* H R*^T on its columns
    R <- feedback rounding of argmin_R ||A - L R||_F with G = L^T L and H on its two sides (`quant.two_sided`)
    L* <- argmin_L ||(A - L R) C||_F, and again

and each pair is then improved in place (`improved`): coordinate descent on the codes, least squares for the scales.  The best
iterate is kept.  Columns are visited from the largest H_jj to the least: errors end where inputs are small.
Source: Saha et al., NeurIPS 2023 and 2024 (the alternation, see `factor.alternating`); the feedback and the descent are our own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.factor.alternating import L_AXIS, R_AXIS
from lplr.factor.factorization import Factorization
from lplr.kernels.feedback import descend
from lplr.kernels.pack import unpack
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.linalg.project import least_squares
from lplr.linalg.range_finder import random_rotation
from lplr.quant.ldlq import unit_upper
from lplr.quant.qtensor import QTensor, round_scale
from lplr.quant.two_sided import full_scale, rounded
from lplr.quant.uniform import scales
from lplr.recipe import FactorSpec, QuantSpec

DAMPING = 0.1  # of the mean diagonal of G and M, for the feedback alone (measured, SmolLM2-135M: flat from 0.001 to 0.1)
RIDGE = 1e-6  # of the mean diagonal, in the least-squares problems of the scales


@dataclass(frozen=True)
class Problem:
    """min ||(A - L R) C||_F, A: (n, d), with what every step needs; H = C C^T is scaled to a mean diagonal of one."""

    A: Tensor
    C: Tensor | None
    H: Tensor  # (d, d)
    AC: Tensor  # (n, d)
    AH: Tensor  # (n, d)

    @classmethod
    def of(cls, A: Tensor, C: Tensor | None) -> Problem:
        """Without C the metric is the identity."""
        if C is None:
            return cls(A, None, torch.eye(A.shape[1], dtype=A.dtype, device=A.device), A, A)
        unit = C / (torch.linalg.vector_norm(C) * A.shape[1] ** -0.5)
        AC = A @ unit
        return cls(A, unit, unit @ unit.T, AC, AC @ unit.T)

    def in_metric(self, R: Tensor) -> Tensor:
        """R C."""
        return R if self.C is None else R @ self.C

    def error(self, l: QTensor, r: QTensor) -> float:
        """||(A - L R) C||_F."""
        L, R = l.dequantize(self.A.dtype), self.in_metric(r.dequantize(self.A.dtype))
        return float(torch.linalg.vector_norm(torch.addmm(self.AC, L, R, alpha=-1)))


def lplr_feedback(A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> Factorization:
    """Best of `spec.alternations` + 1 rounds, improved for as many turns; the error never exceeds ||A C||_F.

    With no alternations it is one round of feedback rounding and nothing else.  Factors are rounded to nearest, whatever
    spec.l.rounding says.
    """
    assert spec.l is not None and spec.r is not None and spec.rank
    order = _order(C, A)
    problem = Problem.of(A[:, order], None if C is None else C[order])
    U_H = unit_upper(problem.H)
    L_star, R = svd_start(problem, spec.rank, generator)
    RC = problem.in_metric(R)
    rounds = []
    for turn in range(spec.alternations + 1):
        l = _round_l(L_star, spec.l, RC @ RC.T)
        L = l.dequantize(A.dtype)
        r = _round_r(least_squares(L, problem.A), spec.r, L.T @ L, U_H)
        rounds.append(improved(problem, l, r, 1 if spec.alternations else 0))
        if turn < spec.alternations:
            RC = problem.in_metric(rounds[-1][1].dequantize(A.dtype))
            L_star = least_squares(RC.T, problem.AC.T).T
    l, r, _ = min(rounds, key=lambda pair: pair[2])
    l, r, error = improved(problem, l, r, spec.alternations)
    if not error <= float(torch.linalg.vector_norm(problem.AC)):
        r = r.zeroed()
    return Factorization(l, columns_put(r, order))


def svd_start(problem: Problem, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """L (n x rank), R (rank x d) with L R = U_k U_k^T A, U_k the leading left singular vectors of A C, evenly split and rotated.

    From the Gram matrix of the shorter side: eigenvalues below eps of the largest are noise, and their directions with them.
    """
    B = problem.AC
    n, d = B.shape
    gram = B @ B.T if n <= d else B.T @ B
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    tiny = torch.finfo(B.dtype)
    s = values.clamp(min=max(float(values[0]) * tiny.eps, tiny.tiny)).sqrt()
    U = vectors if n <= d else B @ (vectors / s)
    rotation = random_rotation(rank, B, generator)
    return (U * s.sqrt()) @ rotation, (rotation.T / s.sqrt()) @ (U.T @ problem.A)


def improved(problem: Problem, l: QTensor, r: QTensor, turns: int) -> tuple[QTensor, QTensor, float]:
    """The best pair on the way, and its error; a turn is descent for the codes of L and R, least squares for every scale.

    Each step lowers the error but for the rounding of scales to 8 bits.
    """
    best = l, r, problem.error(l, r)
    for _ in range(turns):
        r = _refit_rank(problem, l, r)
        l = _descend_l(problem, l, r)
        l = _refit_rows(problem, l, r)
        r = _descend_r(problem, l, r)
        r = _refit_columns(problem, l, r)
        error = problem.error(l, r)
        if error < best[2]:
            best = l, r, error
    return best


def columns_put(r: QTensor, order: Tensor) -> QTensor:
    """R whose column j stands in place order[j]."""
    codes = torch.empty(r.shape, dtype=torch.uint8, device=order.device)
    codes[:, order] = _codes(r)
    col = r.col_scale
    if col is not None and col.numel() > 1:
        col = torch.empty_like(col).index_copy_(0, order, col)
    return QTensor.from_codes(codes, int(r.bits), r.row_scale, col)


def _order(C: Tensor | None, A: Tensor) -> Tensor:
    if C is None:
        return torch.arange(A.shape[1], device=A.device)
    return torch.linalg.vector_norm(C, dim=1).argsort(descending=True, stable=True)


def _round_l(L: Tensor, spec: QuantSpec, M: Tensor) -> QTensor:
    """L on its grid; a scale along the rank, or for the whole of L, is left out for R to absorb."""
    row, col = scales(L, spec.bits, axis=L_AXIS[spec.ranges], clip=spec.clip)
    q = rounded(L, int(spec.bits), None, unit_upper(damped(M, DAMPING)), row, col)
    return replace(q, row_scale=None if spec.ranges == "tensor" else row, col_scale=None)


def _round_r(R: Tensor, spec: QuantSpec, G: Tensor, U_H: Tensor) -> QTensor:
    row, col = scales(R, spec.bits, axis=R_AXIS[spec.ranges], clip=spec.clip)
    return rounded(R, int(spec.bits), unit_upper(damped(G, DAMPING)), U_H, row, col)


def _codes(q: QTensor) -> Tensor:
    return unpack(q.codes, int(q.bits), q.shape[1])


def _descend_l(problem: Problem, l: QTensor, r: QTensor) -> QTensor:
    RC = problem.in_metric(r.dequantize(problem.A.dtype))
    row, ones = full_scale(l.row_scale, l.shape[0], RC), full_scale(None, l.shape[1], RC)
    M = _curved(RC @ RC.T)
    codes = descend(_codes(l), problem.AC @ RC.T, int(l.bits), row, ones, M)
    return QTensor.from_codes(codes, int(l.bits), l.row_scale)


def _descend_r(problem: Problem, l: QTensor, r: QTensor) -> QTensor:
    L = l.dequantize(problem.A.dtype)
    row, col = full_scale(r.row_scale, r.shape[0], L), full_scale(r.col_scale, r.shape[1], L)
    codes = descend(_codes(r), L.T @ problem.AH, int(r.bits), row, col, problem.H, _curved(L.T @ L))
    return QTensor.from_codes(codes, int(r.bits), r.row_scale, r.col_scale)


def _curved(G: Tensor) -> Tensor:
    """G with a positive diagonal: a direction of no curvature gets one, and no slope comes with it."""
    diagonal = G.diagonal()
    return G + torch.diag(torch.where(diagonal > 0, torch.zeros_like(diagonal), torch.ones_like(diagonal)))


def _refit_rank(problem: Problem, l: QTensor, r: QTensor) -> QTensor:
    """The scale along the rank, or for all of R: normal equations (L^T L * R H R^T) s = diag(L^T A H R^T)."""
    if r.row_scale is None:
        return r
    L, RC = l.dequantize(problem.A.dtype), problem.in_metric(replace(r, row_scale=None).dequantize(problem.A.dtype))
    normal, right = (L.T @ L) * (RC @ RC.T), ((L.T @ problem.AC) * RC).sum(1)
    if r.row_scale.numel() == 1:
        normal, right = normal.sum().reshape(1, 1), right.sum().reshape(1)
    return replace(r, row_scale=_storable(_solved(normal, right), r.row_scale))


def _refit_rows(problem: Problem, l: QTensor, r: QTensor) -> QTensor:
    """Row i of L alone: s_i = <A_i, (L R)_i> / <(L R)_i, (L R)_i> in the metric."""
    if l.row_scale is None:
        return l
    L, R = replace(l, row_scale=None).dequantize(problem.A.dtype), r.dequantize(problem.A.dtype)
    P = L @ problem.in_metric(R)
    power = torch.linalg.vecdot(P, P)
    s = torch.linalg.vecdot(P, problem.AC) / torch.where(power > 0, power, torch.ones_like(power))
    return replace(l, row_scale=_storable(s, l.row_scale))


def _refit_columns(problem: Problem, l: QTensor, r: QTensor) -> QTensor:
    """The columns of R: with V = L R without them, normal equations (H * V^T V) s = diag(V^T A H)."""
    if r.col_scale is None:
        return r
    V = l.dequantize(problem.A.dtype) @ replace(r, col_scale=None).dequantize(problem.A.dtype)
    s = _solved(problem.H * (V.T @ V), (V * problem.AH).sum(0))
    return replace(r, col_scale=_storable(s, r.col_scale))


def _solved(normal: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, None], cholesky_factor(damped(normal, RIDGE)))[:, 0]


def _storable(s: Tensor, old: Tensor) -> Tensor:
    """The new scales where they are positive, else the old ones."""
    return torch.where(s > 0, round_scale(s.clamp(min=0)), old)
