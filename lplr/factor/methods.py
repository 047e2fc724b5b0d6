"""The table of methods and the one entry point, `factorize`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lplr.errors import CheckpointError, RecipeError, choose
from lplr.factor.bounds import metric_factor
from lplr.factor.caldera import caldera
from lplr.factor.double_binary import double_binary
from lplr.factor.factorization import Factorization, rotated
from lplr.factor.feedback import lplr_feedback
from lplr.factor.ldlq import ldlq
from lplr.factor.lplr import lplr
from lplr.factor.naive import naive
from lplr.factor.rank import WEIGH_OUTPUTS, exchanges
from lplr.factor.svd import direct_svd, lplr_svd
from lplr.quant.qtensor import SCALE_MIN, QTensor, round_scale
from lplr.recipe import FactorSpec

SAFE = 2.0**-20, 2.0**20  # largest magnitudes whose squares and sums stay within float32

# (A, planned spec, C or None, generator) -> Factorization; H = C C^T is the metric
METHODS: dict[str, Callable[..., Factorization]] = {
    "lplr": lplr,
    "lplr_svd": lplr_svd,
    "direct_svd": direct_svd,
    "lplr_feedback": lplr_feedback,
    "double_binary": double_binary,
    "ldlq": ldlq,
    "caldera": caldera,
    "naive": naive,
}


def factorize(
    W: Tensor, spec: FactorSpec, *, H: Tensor | None = None, G: Tensor | None = None, generator: torch.Generator
) -> Factorization:
    """W (n x d) ~ Q + L R: minimise ||W - Q - L R||_F, or tr(E H E^T) where H (d x d) = E[x x^T] is given, or tr(G E H E^T)
    with G (n x n) = E[g g^T], g what the loss minds of the outputs; the methods outside of WEIGH_OUTPUTS leave G out.

    The spec is completed by `plan`; where it leaves the method open, or how bits are shared between Q and L R, the plan of
    `exchanges` with the least error is taken, each tried in the bases that it asks for, the first one of several that are equal.
    Randomness comes from `generator` alone.  W is scaled by a power of two first, so that nothing overflows, and float16 /
    bfloat16 input is computed in float32.
    Raises CheckpointError on NaN or Inf, RecipeError when nothing fits the budget or the method is unknown.
    """
    if W.dim() != 2 or 0 in W.shape:
        raise RecipeError(f"factorize got a tensor of shape {tuple(W.shape)}: a matrix with entries is expected")
    low, high = W.aminmax()
    largest = max(-float(low), float(high))
    if math.isnan(float(low)):  # aminmax hands NaN on
        largest = math.nan
    if not math.isfinite(largest):
        raise CheckpointError("the matrix holds NaN or Inf: repair the checkpoint, or leave this module out")
    plans = exchanges((W.shape[0], W.shape[1]), spec)
    for planned in plans:
        choose(METHODS, planned.method, "method")
    if not plans[0].rank and plans[0].q is None:
        raise RecipeError(
            f"no factorization of a {W.shape[0]} x {W.shape[1]} matrix by {plans[0].method!r} fits {spec.bits_per_weight} bits "
            "per weight: raise the budget or choose another method"
        )
    A = W if W.dtype == torch.float64 else W.float()
    unit = 1.0 if SAFE[0] <= largest <= SAFE[1] or largest == 0 else 2.0 ** math.frexp(largest)[1]
    return _rescale(_best(A / unit if unit != 1.0 else A, plans, H, G, generator), unit)


def _best(A: Tensor, plans: list[FactorSpec], H: Tensor | None, G: Tensor | None, generator: torch.Generator) -> Factorization:
    """The factorization of least error in the metrics, which no rotation changes; the first where nothing is better."""
    best, least = None, math.inf
    bases, B, C, S = None, A, None, None  # A, the factor of H and G in the bases of the plan before
    for planned in plans:
        wanted = planned.rotation or 0, planned.output_rotation or 0
        if wanted != bases:
            bases, B, C = wanted, rotated(A, *wanted), None if H is None else metric_factor(H.to(A.dtype), wanted[0])
            S = None if G is None else rotated(G.to(A.dtype), wanted[1], wanted[1])
        extra = {"G": S} if planned.method in WEIGH_OUTPUTS else {}
        f = METHODS[planned.method](B, planned, C, generator, **extra)
        error = _error(B, f, C, S) if len(plans) > 1 else 0.0
        if best is None or error < least:
            best, least = replace(f, rotation=wanted[0], output_rotation=wanted[1]), error
    assert best is not None
    return best


def _error(A: Tensor, f: Factorization, C: Tensor | None, G: Tensor | None) -> float:
    """tr(G E C C^T E^T) with E = A - Q - L R."""
    E = A - f.dequantize(A.dtype)
    E = E if C is None else E @ C
    return float(torch.linalg.vecdot(E, E if G is None else G @ E).double().sum())


def _rescale(f: Factorization, unit: float) -> Factorization:
    """The same factorization times a power of two, which the scales of R and Q take exactly within their range.

    A scale below that range becomes zero: the least one there is would store what is larger than the matrix itself.
    """

    def times(scale: Tensor) -> Tensor:
        wanted = scale.double() * unit
        return round_scale(torch.where(wanted < SCALE_MIN, 0.0, wanted))

    def scaled(q: QTensor | None) -> QTensor | None:
        if q is None:
            return None
        if q.row_scale is not None:
            return replace(q, row_scale=times(q.row_scale))
        assert q.col_scale is not None
        return replace(q, col_scale=times(q.col_scale))

    if unit == 1.0:
        return f

    return replace(f, r=scaled(f.r), q=scaled(f.q))
