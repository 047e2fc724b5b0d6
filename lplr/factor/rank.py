"""Method, factor widths and rank from a bit budget: from shapes alone, with every stored bit counted."""

from __future__ import annotations

from lplr.errors import RecipeError
from lplr.factor.factorization import Format
from lplr.recipe import FactorSpec, QuantSpec, quant_spec

BACKBONE_FROM = 1.2  # bits per weight from which a backbone with factors beats factors alone (eval/quality/methods.py)
LOW_RANK = ("lplr", "lplr_svd", "direct_svd")


def default_factor_bits(bits_per_weight: float) -> int:
    """Width of the factors when they stand alone: narrow factors buy rank, wide ones accuracy (eval/quality/methods.py)."""
    for limit, bits in ((0.6, 2), (2.5, 3)):
        if bits_per_weight < limit:
            return bits
    return 4


def plan(shape: tuple[int, int], spec: FactorSpec) -> FactorSpec:
    """The spec with method, widths and rank filled in for a matrix of this shape.

    A result with rank 0 and no q says that nothing fits the budget.  Raises RecipeError when neither a budget nor a
    rank is given.
    """
    budget = spec.bits_per_weight
    if budget is None and spec.rank is None and spec.q is None:
        raise RecipeError("a factorization needs bits_per_weight or a rank: give one of them")
    if spec.method == "auto":
        backbone = spec.q is not None or (spec.rank is None and budget is not None and budget >= BACKBONE_FROM)
        spec = spec.model_copy(update={"method": "caldera" if backbone else "lplr"})
    if spec.method in ("naive", "caldera") and spec.q is None:
        spec = spec.model_copy(update={"q": _widest_backbone(shape, spec)})
    if spec.method == "naive":
        return spec.model_copy(update={"rank": 0})
    if spec.method in LOW_RANK:
        spec = spec.model_copy(update={"q": None})
    alone = default_factor_bits(budget if budget is not None else 1.0)
    bits = alone if spec.q is None else (3 if spec.q.bits == 1 else 2)
    default = quant_spec(bits, spec.rounding)
    spec = spec.model_copy(update={"l": spec.l or default, "r": spec.r or default})
    if spec.rank is None:
        spec = spec.model_copy(update={"rank": largest_rank(shape, spec)})
    return spec.model_copy(update={"rank": min(spec.rank or 0, *shape)})


def layout(shape: tuple[int, int], spec: FactorSpec) -> Format:
    """The stored layout of a planned spec."""
    n, d = shape
    low_rank = bool(spec.rank and spec.l and spec.r)
    scales = scale_lengths(shape, spec) if low_rank else ()
    if spec.q is not None:
        scales += (("q_row_scale", 1 if spec.q.ranges == "tensor" else n),)
    return Format(
        shape,
        spec.rank if low_rank and spec.rank else 0,
        spec.l.bits if low_rank and spec.l else 0,
        spec.r.bits if low_rank and spec.r else 0,
        spec.q.bits if spec.q else 0,
        scales,
    )


def scale_lengths(shape: tuple[int, int], spec: FactorSpec) -> tuple[tuple[str, int], ...]:
    """Name and length of every scale that the factors of `spec` store.

    A scale of L along the rank, or for the whole of L, is absorbed by R (which is solved for afterwards) and costs nothing.
    """
    assert spec.l is not None and spec.r is not None and spec.rank is not None
    n, d = shape
    out = []
    if spec.l.ranges in ("row", "both"):
        out.append(("row_scale", n))
    if spec.r.ranges != "row":
        out.append(("rank_scale", 1 if spec.r.ranges == "tensor" else spec.rank))
    if spec.r.ranges in ("row", "both"):
        out.append(("col_scale", d))
    return tuple(out)


def largest_rank(shape: tuple[int, int], spec: FactorSpec) -> int:
    """The largest rank, at most min(n, d), with which all parts together keep to spec.bits_per_weight; 0 if none does."""
    n, d = shape
    budget = (spec.bits_per_weight or 0.0) * n * d
    low, high = 0, min(shape)
    while low < high:
        middle = (low + high + 1) // 2
        if layout(shape, spec.model_copy(update={"rank": middle})).stored_bits() <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _widest_backbone(shape: tuple[int, int], spec: FactorSpec) -> QuantSpec | None:
    """The widest grid for Q that keeps to the budget, with one range a row; None when not even 1 bit does."""
    budget = (spec.bits_per_weight or 0.0) * shape[0] * shape[1]
    fitting = [
        q
        for q in (QuantSpec(bits=bits, ranges="row") for bits in range(8, 0, -1))
        if layout(shape, FactorSpec(rank=0, q=q)).stored_bits() <= budget
    ]
    return fitting[0] if fitting else None
