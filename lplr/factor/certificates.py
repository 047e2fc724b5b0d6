"""A-posteriori certificates: upper bounds on the error of a factorization that is already there, by two independent routes.

    exact    ||W - Q - L R||_F in float64 plus a proven allowance for its rounding: certain
    probes   sqrt(est / (1 - t)),  est = (1/N) sum_j ||(W - Q - L R) g_j||^2,  g_j ~ N(0, I_d):  holds but for `failure`

A factorization that stands in rotated bases P, O is held against P^T W O, which has the same error.
t solves -ln(1-t) - t = 2 ln(1/failure) / N, Chernoff's bound on the lower tail of chi-square with N degrees of freedom, which
is the worst case over all matrices (docs/bounds.md); sharper than Laurent and Massart's 2 sqrt(x/N).
Sources: Laurent, Massart, Ann. Statist. 2000, Lemma 1; Higham, Accuracy and Stability, section 3.1 (gamma_k = k u / (1 - k u)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lplr.errors import RecipeError
from lplr.factor.bounds import Bound, error_bound, metric_factor
from lplr.factor.factorization import Factorization, rotated
from lplr.factor.rank import plan
from lplr.factor.spectrum import optimal_error, spectrum
from lplr.kernels.levels import BY_COLUMN
from lplr.linalg.hessian import DAMPING
from lplr.quant.qtensor import QTensor
from lplr.recipe import FactorSpec

PROBES, FAILURE = 64, 1e-6
METRIC_UP_TO = 2048  # inputs up to which sigma_min(C) is bounded, by a Cholesky factorization in float64
SAMPLE = 48  # singular values kept in a record
_BLOCK = 1 << 21  # entries of W widened to float64 at once
_ROTATION = 4096  # length of gamma that covers one rotation in float64: at most 2 x 4 products with 64 x 64 matrices
_CANCELLED = 1e-4  # relative allowance above which the Gram route gives way to the residual


def measured_error(W: Tensor, f: Factorization) -> float:
    """||W - Q - L R||_F, residuals and their squares in float64, a block of rows at a time; 2 n d r operations."""
    R = None if f.r is None else f.r.dequantize(torch.float64)
    norms = []
    for W_i, L_i, Q_i in _row_blocks(W, f):
        norms.append(torch.linalg.vector_norm(_residual(W_i, L_i, R, Q_i)))
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def weighted_error(W: Tensor, f: Factorization, H: Tensor) -> float:
    """sqrt(tr(E H E^T) / tr(W H W^T)) with E = W - Q - L R and H (d x d) as collected; 0 where no input reaches W.

    2 n d (r + 2 d) operations in W's precision (float32 at least), sums in float64.
    """
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    R = None if f.r is None else f.r.dequantize(dtype)
    H = rotated(rotated(H.to(dtype), f.rotation, 0).T, f.rotation, 0)
    error = weight = 0.0
    for W_i, L_i, Q_i in _row_blocks(W, f, dtype):
        error += _quadratic(_residual(W_i, L_i, R, Q_i), H)
        weight += _quadratic(W_i, H)
    return math.sqrt(max(error, 0.0) / weight) if weight > 0 else 0.0


def _quadratic(X: Tensor, H: Tensor) -> float:
    return float(torch.linalg.vecdot((X @ H).double(), X.double()).sum())


def exact_error(W: Tensor, f: Factorization) -> float:
    """An upper bound on ||W - Q - L R||_F, above it by the rounding allowance alone (typically 1e-9 of it).

    While r (n + d) < n d and nothing cancels, from A = W - Q without any entry of L R:

        ||A||^2 - 2 <L^T A, R> + <L^T L, R R^T>        2 n d r + 2 (n + d) r^2 operations

    Otherwise the residual itself, transposed (2 n d r).  Float64, by blocks of rows; memory (n + d) r and one block.
    """
    n, d = f.shape
    if f.l is not None and f.rank * (n + d) < n * d:
        square, allowance = _gram_square(W, f)
        if 0 < allowance <= _CANCELLED * square:
            return math.sqrt(square + allowance) * (1 + 2.0**-50)
    return _residual_bound(W, f)


def _gram_square(W: Tensor, f: Factorization) -> tuple[float, float]:
    """||A - L R||_F^2 by its expansion, and a bound on the rounding error of that number."""
    assert f.l is not None and f.r is not None
    R = f.r.dequantize(torch.float64)
    LtA = torch.zeros_like(R)
    gram = R.new_zeros(R.shape[0], R.shape[0])
    norms, sizes = [], []
    for W_i, L_i, Q_i in _row_blocks(W, f):
        assert L_i is not None
        A_i = W_i if Q_i is None else W_i - Q_i
        LtA.addmm_(L_i.T, A_i)
        gram.addmm_(L_i.T, L_i)
        norms.append(torch.linalg.vecdot(A_i, A_i).sum())
        sizes.append(W_i.square().sum() + (0.0 if Q_i is None else Q_i.square().sum()))
    total = torch.stack(norms).sum()
    inner = torch.linalg.vecdot(LtA, R).sum()
    product = torch.linalg.vecdot(gram, R @ R.T).sum()
    # |computed - exact| <= gamma (||A||^2 + 2 |L||R||A| + |L|^2|R|^2), gamma for the longest chain of sums
    lengths = math.sqrt(float(gram.diagonal().sum())) * float(torch.linalg.vector_norm(R))
    reach = math.sqrt(2 * float(torch.stack(sizes).sum())) + lengths
    return float(total - 2 * inner + product), _gamma(2 * (sum(f.shape) + f.rank) + 64 + _rotation(f)) * reach**2


def _residual_bound(W: Tensor, f: Factorization) -> float:
    """||E||_F from its transpose, plus gamma (||W|| + ||Q|| + ||L|| ||R||)."""
    Rt = None if f.r is None else f.r.dequantize(torch.float64).T.contiguous()
    norms, sizes, lengths = [], [], []
    for W_i, L_i, Q_i in _row_blocks(W, f):
        E = W_i.T if Q_i is None else (W_i - Q_i).T
        if L_i is not None and Rt is not None:
            E = E - Rt @ L_i.T
            lengths.append(torch.linalg.vector_norm(L_i))
        norms.append(torch.linalg.vector_norm(E))
        sizes += [torch.linalg.vector_norm(part) for part in (W_i, Q_i) if part is not None]
    reach = float(torch.stack(sizes).sum())
    if Rt is not None:
        reach += float(torch.stack(lengths).sum()) * float(torch.linalg.vector_norm(Rt))
    error = float(torch.linalg.vector_norm(torch.stack(norms)))
    return error * (1 + _gamma(sum(f.shape) + 64)) + _gamma(f.rank + 16 + _rotation(f)) * reach


def probe_certificate(
    W: Tensor, f: Factorization, *, probes: int = PROBES, failure: float = FAILURE, generator: torch.Generator
) -> float:
    """A bound on ||W - Q - L R||_F that fails with probability at most `failure` over the probes; L R is never formed.

    2 N (n d + (n + d) r) operations for N probes in float64 (2 N n d more with Q).  With the defaults it lies near 1.75 times the
    error.  Raises RecipeError unless probes >= 1 and 0 < failure < 1.
    """
    if probes < 1 or not 0 < failure < 1:
        raise RecipeError(f"{probes} probes, failure {failure}: one probe or more and a probability inside (0, 1) are expected")
    G = torch.randn(f.shape[1], probes, generator=generator, device=W.device, dtype=torch.float64)
    R = None if f.r is None else f.r.dequantize(torch.float64)
    RG = None if R is None else R @ G
    squares, reach = 0.0, 0.0
    lengths = [0.0 if R is None else float(torch.linalg.vector_norm(R)), 0.0]
    for W_i, L_i, Q_i in _row_blocks(W, f):
        y = W_i @ G
        reach += float(torch.linalg.vector_norm(W_i))
        if Q_i is not None:
            y -= Q_i @ G
            reach += float(torch.linalg.vector_norm(Q_i))
        if L_i is not None and RG is not None:
            y -= L_i @ RG
            lengths[1] = math.hypot(lengths[1], float(torch.linalg.vector_norm(L_i)))
        squares += float(y.square().sum())
    rounding = (
        _gamma(sum(f.shape) + f.rank + 64 + _rotation(f)) * (reach + lengths[0] * lengths[1]) * float(torch.linalg.vector_norm(G))
    )
    return (math.sqrt(squares) * (1 + 1e-12) + rounding) / math.sqrt(probes * (1 - lower_tail(probes, failure)))


def lower_tail(probes: int, failure: float) -> float:
    """The t in (0, 1) with -ln(1-t) - t = 2 ln(1/failure) / probes, rounded up: P(chi^2_N <= (1-t) N) <= failure."""
    target = 2 * math.log(1 / failure) / probes
    # in s = -ln(1-t) the equation s - 1 + exp(-s) = target increases, and s lies between target and target + 1
    low, high = target, target + 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle - 1 + math.exp(-middle) < target else (low, middle)
    return -math.expm1(-high)


def certify(
    W: Tensor, f: Factorization, spec: FactorSpec, H: Tensor | None, generator: torch.Generator, *, target: Tensor | None = None
) -> dict[str, Any]:
    """Fields of a LayerRecord: norm, error, certificates, bound, optimum, weighted error, a sample of the spectrum, note.

    target is the matrix that was factorized where that is not W: what bounds its error bounds W's with ||target - W||_F more.

    optimal is that of rank f.rank, without quantization (None where there is a backbone Q, or no low-rank part).
    With a metric the a-priori bound, on ||E C||_F, is divided by a lower bound on sigma_min(C); None above METRIC_UP_TO inputs.
    """
    sigma = spectrum(W)
    spec = plan((W.shape[0], W.shape[1]), spec)
    once = spec.alternations == 0 and spec.method in ("lplr", "lplr_svd") and f.l is not None
    L = f.l.dequantize(W.dtype if W.dtype == torch.float64 else torch.float32) if once and f.l is not None else None
    given = W if target is None else target
    bound = error_bound(given, spec, H=H, L=L, singular_values=sigma if H is None and given is W else None)
    rms, note = _frobenius(bound, given, H, spec.rotation or 0)
    if given is not W and rms is not None:
        apart = float(torch.linalg.vector_norm(given.double() - W.double())) * (1 + 1e-9)
        rms, note = rms + apart, f"{note}; and {apart:.3g} that the target differs from W by"
    size = len(sigma)
    sample = range(1, size + 1) if size <= SAMPLE else sorted({round(size ** (i / (SAMPLE - 1))) for i in range(SAMPLE)})
    return {
        "norm": float(torch.linalg.vector_norm(W.double())),
        "error": measured_error(W, f),
        "certificate": exact_error(W, f),
        "probe_certificate": probe_certificate(W, f, generator=generator),
        "probe_failure": FAILURE,
        "bound": rms,
        "optimal": optimal_error(sigma, f.rank) if f.rank and f.q is None else None,
        "weighted_error": None if H is None else weighted_error(W, f, H),
        "spectrum": tuple((i, float(sigma[i - 1])) for i in sample),
        "note": note,
    }


def _frobenius(bound: Bound, W: Tensor, H: Tensor | None, rotation: int) -> tuple[float | None, str]:
    """The bound as one on ||E||_F, and what is to be said about it."""
    if bound.rms is not None and H is not None and len(H) > METRIC_UP_TO:
        return None, f"bound ({bound.holds}), in the metric alone: {bound.statement}"
    if bound.rms is None or H is None:
        return bound.rms, f"bound ({bound.holds}): {bound.statement}" if bound.rms is not None else f"bound: {bound.statement}"
    smallest = least_singular_value(H.to(W.dtype if W.dtype == torch.float64 else torch.float32), rotation)
    if not smallest > 0:
        return None, "bound: none in the Frobenius norm, the metric is numerically singular"
    return bound.rms / smallest, f"bound ({bound.holds}): {bound.statement}, over sigma_min(C) = {smallest:.3g}"


def least_singular_value(H: Tensor, rotation: int = 0) -> float:
    """A lower bound on sigma_min(C), C the factor that `factorize` uses for H; 0 where none is found.  Cholesky, d^3 / 3.

    In float64 the pivots of C C^T - mu I are positive only if mu < sigma_min(C)^2 up to 1e-16 d ||C||^2, which is taken off.
    """
    C = metric_factor(H, rotation).double()
    metric = C @ C.T
    mean = float(metric.diagonal().mean())
    for share in (0.9, 0.5):  # damping leaves at least DAMPING / (1 + DAMPING) of the mean
        mu = share * DAMPING / (1 + DAMPING) * mean
        shifted = metric - mu * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
        if not int(torch.linalg.cholesky_ex(shifted).info):
            return math.sqrt(max(0.0, mu - 4 * _gamma(len(metric) + 1) * float(metric.diagonal().sum())))
    return 0.0


def _row_blocks(
    W: Tensor, f: Factorization, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(rows of P^T W O, of L, of Q), widened to `dtype`, a bounded number at a time.

    Rotated outputs take one copy of the whole matrix in `dtype`, and so does each part on a grid that couples its rows.
    """
    n, d = W.shape
    step = max(1, _BLOCK // d)
    turned = _outputs_rotated(W, f.output_rotation, dtype) if f.output_rotation else W
    dense = [part.dequantize(dtype) if part is not None and part.grid in BY_COLUMN else None for part in (f.l, f.q)]
    for start in range(0, n, step):
        rows = slice(start, start + step)
        L, Q = (
            whole[rows] if whole is not None else None if part is None else _rows(part, rows).dequantize(dtype)
            for whole, part in zip(dense, (f.l, f.q), strict=True)
        )
        yield rotated(turned[rows].to(dtype), f.rotation, 0), L, Q


def _outputs_rotated(W: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """P^T W in `dtype`, some columns at a time."""
    out = torch.empty(W.shape, dtype=dtype, device=W.device)
    step = max(1, _BLOCK // W.shape[0])
    for start in range(0, W.shape[1], step):
        columns = slice(start, start + step)
        out[:, columns] = rotated(W[:, columns].to(dtype), 0, seed)
    return out


def _rows(q: QTensor, rows: slice) -> QTensor:
    codes, fewer = q.codes[rows], None if q.narrow_codes is None else q.narrow_codes[rows]
    scale = q.row_scale if q.row_scale is None or q.row_scale.numel() == 1 else q.row_scale[rows]
    return replace(q, codes=codes, shape=(codes.shape[0], q.shape[1]), row_scale=scale, narrow_codes=fewer)


def _rotation(f: Factorization) -> int:
    return _ROTATION * (bool(f.rotation) + bool(f.output_rotation))


def _residual(W: Tensor, L: Tensor | None, R: Tensor | None, Q: Tensor | None) -> Tensor:
    E = W if Q is None else W - Q
    return E if L is None or R is None else torch.addmm(E, L, R, alpha=-1)


def _gamma(length: int) -> float:
    """gamma_k = k u / (1 - k u) in float64."""
    u = 2.0**-53
    return length * u / (1 - length * u)
