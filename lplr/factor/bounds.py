"""A-priori bounds on the error E = W - Q - L R of `factorize`: from W, the spec and the metric, before anything is drawn.

B = W C with H = C C^T the metric (C = I without calibration), sigma its singular values, tau_k^2 = sum_{j>k} sigma_j^2,
m the rank, q the power iterations, c = 1 + 2^-7 (bfloat16 rounds a range up by no more), T = 2^bits - 1.  Two parts add up:

    ||E C||_F^2 = ||(I - P_L) B||_F^2  +  ||L (R - L^+ W) C||_F^2                    (L^+ W projects: Pythagoras)

basis, q = 0 (T)      (1 + theta) tau_k^2 + theta N + delta ||B||^2,   theta = k / (m-k-1),  N = 2 c^2 ln(2nm/delta) E / T^2
basis, q > 0 (P)      tau_k^2 + sum_{j>k} sigma_j^4q sum_{i<=k} sigma_i^(2-4q) / (m-k-1) + E||E1||_F^2
basis, exact SVD (S)  tau_m^2 + E||E1 X||_F^2
second factor         sum_i ||l_i||^2 sum_j H_jj Var_ij    given L (stochastic), a worst case (nearest)

Conditions and proofs: docs/bounds.md, same letters.  Where no theorem covers a setting the bound says so: holds = "none".
Sources: Saha, Srivastava, Pilanci, NeurIPS 2023 (the setting); Halko, Martinsson, Tropp, SIAM Review 2011, Theorem 10.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lplr.errors import CheckpointError, RecipeError
from lplr.factor.alternating import L_AXIS, R_AXIS
from lplr.factor.factorization import rotated
from lplr.factor.noise import ROUND_UP, matrix_peak, noise_energy, row_peak, saturation_free, worst_case
from lplr.factor.rank import plan
from lplr.factor.spectrum import spectrum
from lplr.kernels.levels import narrower
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.linalg.project import least_squares
from lplr.quant.ldlq import ONE_BIT
from lplr.quant.uniform import Axis, scales
from lplr.recipe import FactorSpec, QuantSpec

Holds = Literal["mean", "certain", "none"]

# allowance for floating-point arithmetic in `factorize`, as a share of ||B||_F^2 (the theorems are about exact arithmetic)
_ARITHMETIC = {torch.float32: 2.0**-18, torch.float64: 2.0**-40}
_EXPONENTS = 64  # entries within 2^+-64: the scales that `factorize` stores stay far inside bfloat16's range


@dataclass(frozen=True)
class Bound:
    """A bound on the squared error: a sum of named terms.

    holds: `mean` (on the expectation over sketch, rotation and rounding), `certain` (on every draw) or `none` (no statement;
    the terms, if any, are those that could be bounded).  metric: `frobenius`, or `calibrated` for ||E C||_F^2 with
    C C^T = H damped as `factorize` damps it, which is no less than tr(E H E^T).
    """

    terms: dict[str, float]
    holds: Holds
    statement: str
    metric: Literal["frobenius", "calibrated"] = "frobenius"

    @property
    def total(self) -> float | None:
        """Bound on the (mean) squared error; None without a statement."""
        return None if self.holds == "none" else math.fsum(self.terms.values())

    @property
    def rms(self) -> float | None:
        """Root of `total`."""
        return None if self.total is None else math.sqrt(self.total)


_UNKNOWN = Bound({}, "none", "no statement: the worst case is known of the uniform grid alone")


@dataclass(frozen=True)
class _Case:
    """One matrix, scaled by a power of two and rotated as `factorize` does it."""

    A: Tensor  # (n, d)
    C: Tensor | None
    spec: FactorSpec
    failure: float
    L: Tensor | None
    given: Tensor | None = field(default=None, repr=False)  # singular values of B, where the caller has them

    @cached_property
    def B(self) -> Tensor:
        return self.A if self.C is None else self.A @ self.C

    @cached_property
    def sigma(self) -> Tensor:
        return spectrum(self.B) if self.given is None else self.given

    @cached_property
    def row_squares(self) -> Tensor:
        return torch.linalg.vector_norm(self.B, dim=1, dtype=torch.float64).square()

    @cached_property
    def energy(self) -> float:
        return float(self.row_squares.sum())

    @cached_property
    def weights(self) -> Tensor:
        """diag(C C^T), (d,)."""
        ones = torch.ones(self.A.shape[1], dtype=torch.float64, device=self.A.device)
        return ones if self.C is None else self.C.double().square().sum(1)

    @cached_property
    def spectral(self) -> float:
        """Bound on ||C||_2^2: the largest row sum of |C C^T|."""
        if self.C is None:
            return 1.0
        C = self.C.double()
        return float((C @ C.T).abs().sum(1).max()) * (1 + 1e-9)


def error_bound(
    W: Tensor,
    spec: FactorSpec,
    *,
    H: Tensor | None = None,
    failure: float = 1e-3,
    L: Tensor | None = None,
    singular_values: Tensor | None = None,
) -> Bound:
    """Bound on ||W - Q - L R||_F^2, or on tr(E H E^T), for `factorize(W, spec, H=H)`; spec is completed by `plan`.

    failure is delta of (T), any number in (0, 1).  L (n x m) is the dense factor of a factorization without alternations: the
    rounding of R is bounded given L, and without it there is no statement for `lplr` and `lplr_svd`.  singular_values are
    those of W (of W C with a metric), to save their computation.  Cost: a spectrum, and least squares where L is given.
    Raises RecipeError on a failure outside (0, 1) or an L of another shape, CheckpointError on NaN or Inf in W.
    """
    if not 0 < failure < 1:
        raise RecipeError(f"failure is {failure}: a probability above 0 and below 1 is expected")
    if not bool(torch.isfinite(W).all()):
        raise CheckpointError("the matrix holds NaN or Inf: repair the checkpoint, or leave this module out")
    spec = plan((W.shape[0], W.shape[1]), spec)
    if L is not None and tuple(L.shape) != (W.shape[0], spec.rank):
        raise RecipeError(f"L is {tuple(L.shape)}: {(W.shape[0], spec.rank)} is expected, the dense factor of this spec")
    metric: Literal["frobenius", "calibrated"] = "frobenius" if H is None else "calibrated"
    A = W if W.dtype == torch.float64 else W.float()
    largest = float(A.abs().max())
    exponent = math.frexp(largest)[1] if largest else 0
    method = _METHODS.get(spec.method)
    if method is None or (not spec.rank and spec.q is None):
        return Bound({}, "none", f"no statement: nothing that {spec.method!r} makes fits the budget", metric)
    if abs(exponent) > _EXPONENTS:
        return Bound({}, "none", f"no statement: entries near 2^{exponent} leave the range of bfloat16 scales", metric)
    unit = 2.0**exponent
    C = None if H is None else metric_factor(H.to(A.dtype), spec.rotation or 0)
    A = rotated(A, spec.rotation or 0, spec.output_rotation or 0)
    given = None if singular_values is None else singular_values.double() / unit
    case = _Case(A / unit, C, spec, failure, None if L is None else L.to(A.dtype), given)
    bound = method(case)
    terms = dict(bound.terms)
    if bound.holds != "none":
        terms["arithmetic"] = _ARITHMETIC[A.dtype] * case.energy
    return replace(bound, terms={name: term * unit**2 for name, term in terms.items()}, metric=metric)


def metric_factor(H: Tensor, rotation: int = 0) -> Tensor:
    """C with C C^T = O^T damped(H) O, as `factorize` makes it, for the seed of the rotation O of the inputs."""
    return cholesky_factor(rotated(rotated(damped(H), rotation, 0).T, rotation, 0))


# --- methods ---------------------------------------------------------------------------------------------------------------


def _lplr(case: _Case) -> Bound:
    if case.spec.alternations:
        return _capped(case)
    found = [_trivial_basis(case)]
    if case.spec.sketch == "gaussian" and _uniform(case.spec.l):
        found += _power_basis(case) if case.spec.power_iterations else _gaussian_basis(case)
    return _with_second_factor(case, min(found, key=lambda b: b.total or 0.0))


def _lplr_svd(case: _Case) -> Bound:
    if case.spec.alternations:
        return _capped(case)
    found = [_trivial_basis(case), *(_svd_basis(case) if _uniform(case.spec.l) else [])]
    return _with_second_factor(case, min(found, key=lambda b: b.total or 0.0))


def _direct_svd(case: _Case) -> Bound:
    """(D): both factors are known before they are rounded, so every scale is."""
    spec, m = case.spec, case.spec.rank or 0
    assert spec.l and spec.r
    if not (_uniform(spec.l) and _uniform(spec.r)):
        return _UNKNOWN
    U, s, _ = torch.linalg.svd(case.B, full_matrices=False)
    U = U[:, :m].contiguous()
    rows, cols = _grid(U, spec.l, L_AXIS[spec.l.ranges])
    if spec.l.ranges == "tensor":
        left, rows = rows[:1].expand(m), torch.ones_like(rows)
    else:
        left, cols = cols, torch.ones_like(cols)
    # quantize_l leaves the scale along the rank, `left`, to R:  U M = (U / left) (left M)
    L0, R0 = U.double() / left, left[:, None].to(U.dtype) * (U.T @ case.A)
    r_rows, r_cols = _grid(R0, spec.r, R_AXIS[spec.r.ranges])
    columns, lengths = L0.square().sum(0), (left * s[:m].double()).square()  # ||l_i||^2, ||row i of R0 C||^2
    tail = float(s[m:].double().square().sum())
    if saturation_free(spec.l) and saturation_free(spec.r):
        v = rows.square()[:, None] * cols.square()  # (n, m)
        w = r_rows.square() * float((case.weights * r_cols.square()).sum())  # (m,)
        terms = {"tail": tail, "L": float((v @ lengths).sum()), "R": float(columns @ w), "L R": float((v @ w).sum())}
        return Bound(terms, "mean", "tail + L + R + L R, mean over two independent unbiased roundings of the SVD's factors (D)")
    e1 = worst_case(L0, rows, cols, spec.l)
    e2 = _row_worst(case, worst_case(R0.double(), r_rows, r_cols, spec.r))
    inside = math.sqrt(float((e1.square() @ lengths).sum())) + math.sqrt(float(columns @ e2))
    crossed = math.sqrt(float((e1 @ e2.sqrt()).square().sum()))
    total = (math.sqrt(tail + inside**2) + crossed) ** 2
    return Bound({"worst case": total}, "certain", "worst case of the roundings of the SVD's factors (D)")


def _naive(case: _Case) -> Bound:
    """(N): sum_ij H_jj Var_ij, or the worst case of every entry."""
    q = case.spec.q
    assert q is not None
    if not _uniform(q):
        return _UNKNOWN
    rows, cols = _grid(case.A, q, "tensor" if q.ranges == "tensor" else "row")
    if saturation_free(q):
        total = float(rows.square().sum()) * float((case.weights * cols.square()).sum())
        return Bound({"rounding": total}, "mean", "sum_ij H_jj s_i^2, mean over an unbiased rounding with half steps s_i (N)")
    total = float(_row_worst(case, worst_case(case.A.double(), rows, cols, q)).sum())
    return Bound({"rounding": total}, "certain", "worst case of the rounding of every entry (N)")


def _ldlq(case: _Case) -> Bound:
    """(0): nothing is known of clipped feedback rounding before it is done; the method falls back to Q = 0.

    Without a metric there is no feedback, and on the uniform grid (N) may be less, narrow columns with their longer step counted.
    """
    q, narrow = case.spec.q, case.spec.q_narrow
    assert q is not None
    capped = _capped(case)
    if case.C is not None or not _uniform(q):
        return capped
    bits = int(q.bits)
    nearest = q.model_copy(update={"rounding": "nearest", "clip": "mse"})
    rows, cols = _grid(case.A * ONE_BIT if bits == 1 else case.A, nearest, "tensor" if q.ranges == "tensor" else "row")
    top = torch.full_like(cols, (1 << bits) - 1)
    top[:narrow], cols[:narrow] = (1 << (bits - 1)) - 1, narrower("uniform", bits)[1]
    half = rows[:, None] * cols
    total = float(torch.maximum(half, case.A.double().abs() - top * half).square().sum())
    worst = Bound({"rounding": total}, "certain", "worst case of the rounding of every entry (N)")
    return worst if total < case.energy else capped


def _caldera(case: _Case) -> Bound:
    """(0): nothing is known of Q's rounding of what L R leaves before it is done; the method falls back to zero."""
    return _lplr(case) if case.spec.q is None else _capped(case)


def _capped(case: _Case) -> Bound:
    """(0): a refined factorization never exceeds that of L R = 0."""
    return Bound({"trivial": case.energy}, "certain", "trivial: ||E C|| <= ||W C||, which the method guarantees (0)")


_METHODS: dict[str, Callable[[_Case], Bound]] = {
    "lplr": _lplr,
    "lplr_svd": _lplr_svd,
    "direct_svd": _direct_svd,
    "lplr_feedback": _capped,
    "double_binary": _capped,
    "naive": _naive,
    "caldera": _caldera,
    "ldlq": _ldlq,
}


# --- the part that the basis L leaves --------------------------------------------------------------------------------------


def _uniform(quant: QuantSpec | None) -> bool:
    return quant is not None and quant.grid == "uniform"


def _trivial_basis(case: _Case) -> Bound:
    return Bound({"trivial": case.energy}, "certain", "||(I - P_L) B||^2 <= ||B||^2 (k = 0)")


def _tails(case: _Case) -> Tensor:
    """tau_k^2 for k = 0 .. len(sigma), float64."""
    squares = case.sigma.double().square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def _gaussian_basis(case: _Case) -> list[Bound]:
    """(T), first three terms, at the best k; nothing where m < 3 or the grid is not covered."""
    quant, m, n = case.spec.l, case.spec.rank or 0, case.A.shape[0]
    assert quant is not None
    if m < 3 or quant.clip != "max" or quant.ranges == "both":
        return []
    k = torch.arange(1, m - 1, dtype=torch.float64)
    theta = k / (m - k - 1)
    spread = case.energy if quant.ranges == "row" else n * float(case.row_squares.max())
    log = math.log(2 * n * m / case.failure)
    noise = 2 * log * spread * (ROUND_UP / ((1 << int(quant.bits)) - 1)) ** 2
    sketch = (1 + theta) * _tails(case).cpu()[1 : m - 1]
    if quant.rounding == "stochastic":
        rounding, cross = theta * noise, torch.zeros_like(theta)
    else:
        rounding = m * theta * noise
        cross = 2 * (sketch * rounding).sqrt()
    at = int((sketch + rounding + cross).argmin())
    terms = {"sketch": float(sketch[at]), "L": float(rounding[at] + cross[at]), "saturation": case.failure * case.energy}
    form = "theta N" if quant.rounding == "stochastic" else "2 sqrt(sketch m theta N) + m theta N"
    return [Bound(terms, "mean", f"(1 + theta) tau_k^2 + {form} + delta ||B||^2, k = {at + 1} (T)")]


def _power_basis(case: _Case) -> list[Bound]:
    """(P) at the best k: power iterations end in an orthonormal, randomly rotated sketch."""
    quant, m, q = case.spec.l, case.spec.rank or 0, case.spec.power_iterations
    assert quant is not None
    if m < 3:
        return []
    leading = min(case.energy, float(case.sigma[:m].double().square().sum()))
    noise = noise_energy(quant, leading, case.row_squares, m)
    if noise is None:
        return []
    k = torch.arange(1, m - 1, dtype=torch.float64)
    log = case.sigma.double().cpu().log()
    # sum_{j>k} sigma_j^4q and sum_{i<=k} sigma_i^(2-4q), as logarithms; beyond the rank of B both are infinite
    below = (4 * q * log).flip(0).logcumsumexp(0).flip(0)[1 : m - 1]
    above = ((2 - 4 * q) * log).logcumsumexp(0)[: m - 2]
    extra = torch.where(below.isneginf(), torch.zeros_like(below), (below + above).exp()) / (m - k - 1)
    sketch = _tails(case).cpu()[1 : m - 1] + extra
    at = int(sketch.argmin())
    statement = f"tau_k^2 + sum_j>k sigma_j^{4 * q} sum_i<=k sigma_i^{2 - 4 * q} / (m-k-1) + E||E1||^2, k = {at + 1} (P)"
    return [Bound({"sketch": float(sketch[at]), "L": noise}, "mean", statement)]


def _svd_basis(case: _Case) -> list[Bound]:
    """(S): the exact leading subspace, scaled by the root of its singular values and randomly rotated."""
    quant, m, n = case.spec.l, case.spec.rank or 0, case.A.shape[0]
    assert quant is not None
    U, s, _ = torch.linalg.svd(case.B, full_matrices=False)
    s = s.double()
    rows = (U[:, :m].double().square() * s[:m]).sum(1)  # squared row norms of U_m Sigma_m^(1/2)
    trace = float(s[:m].sum())
    found = []
    energy = noise_energy(quant, trace, rows, m)
    if energy is not None:
        found.append(float(s[0]) * energy)
    if saturation_free(quant) and quant.ranges != "both":
        step = (ROUND_UP / ((1 << int(quant.bits)) - 1)) ** 2
        peak = row_peak(m) * trace if quant.ranges == "row" else n * matrix_peak(rows, m, m)
        found.append(step * trace * peak / m)
    if not found:
        return []
    return [Bound({"tail": float(s[m:].square().sum()), "L": min(found)}, "mean", "tau_m^2 + E||E1 X||^2 (S)")]


# --- the part that rounding R adds -----------------------------------------------------------------------------------------


def _with_second_factor(case: _Case, basis: Bound) -> Bound:
    """Add (R), which needs the drawn L: how far L^+ W reaches depends on the conditioning of L."""
    quant = case.spec.r
    assert quant is not None
    if not _uniform(quant):
        return Bound(basis.terms, "none", f"{basis.statement} + R: no statement on R on the {quant.grid} grid")
    if case.L is None:
        return Bound(basis.terms, "none", f"{basis.statement} + R: no statement on R without the drawn L, pass L")
    wanted = least_squares(case.L, case.A)
    rows, cols = _grid(wanted, quant, R_AXIS[quant.ranges])
    columns = case.L.double().square().sum(0)
    if saturation_free(quant):
        term = float(columns @ rows.square()) * float((case.weights * cols.square()).sum())
        form, holds = "sum_i ||l_i||^2 s_i^2 tr H given L", "mean"
    else:
        errors = _row_worst(case, worst_case(wanted.double(), rows, cols, quant))
        gram = case.L.double().T @ case.L.double()
        longest = float(torch.linalg.eigvalsh(gram)[-1]) * (1 + 1e-9)
        term = min(longest * float(errors.sum()), float((columns * errors).sqrt().sum()) ** 2)
        form, holds = "worst case of R given L", basis.holds
    return Bound({**basis.terms, "R": term}, holds, f"{basis.statement} + {form} (R)")


def _grid(x: Tensor, quant: QuantSpec, axis: Axis) -> tuple[Tensor, Tensor]:
    """Half steps of the grid that `quantize` lays over x (n x d): row i, column j has rows_i cols_j; (n,) and (d,), float64."""
    found = scales(x, quant.bits, axis=axis, clip=quant.clip)
    sizes = ((scale, size) for scale, size in zip(found, x.shape, strict=True))
    rows, cols = (
        torch.ones(size, dtype=torch.float64, device=x.device) if scale is None else scale.double().expand(size).clone()
        for scale, size in sizes
    )
    return rows, cols


def _row_worst(case: _Case, errors: Tensor) -> Tensor:
    """Bound on ||row i of E C||^2 where |E_ij| <= errors_ij (., d): triangle inequality, or the norm of C."""
    squares = errors.square().sum(1)
    if case.C is None:
        return squares
    return torch.minimum(case.spectral * squares, (errors @ case.weights.sqrt()).square())
