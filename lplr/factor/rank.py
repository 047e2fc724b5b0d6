"""Method, factor widths and rank from a bit budget: from shapes alone, with every stored bit counted."""

from __future__ import annotations

from lplr.errors import RecipeError
from lplr.factor.factorization import Format
from lplr.recipe import FactorSpec, QuantSpec, quant_spec

BACKBONE_FROM = 0.75  # bits per weight from which a rotated backbone beats factors alone (eval/quality/methods.py)
ROTATION = 1  # seed of the rotation of the inputs: one for all, so that layers with the same input can share it
LOW_RANK = ("lplr", "lplr_svd", "direct_svd")
BACKBONE = ("ldlq", "naive")


def default_factor_bits(bits_per_weight: float) -> int:
    """Width of the factors when they stand alone: narrow factors buy rank, wide ones accuracy.

    From 0.5 bits on it follows eval/quality/methods.py; 2 bits below 0.4 is a guess.
    """
    for limit, bits in ((0.4, 2), (2.5, 3)):
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
        spec = spec.model_copy(update={"method": _best_method(spec)})
    if spec.rotation is None:
        spec = spec.model_copy(update={"rotation": ROTATION if spec.method in ("ldlq", "caldera") else 0})
    if spec.q is None and spec.method in (*BACKBONE, "caldera"):
        spec = _with_backbone(shape, spec)
    if spec.method in BACKBONE:
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
    backbone = (spec.q.bits, spec.q_narrow) if spec.q else (0, 0)
    return Format(
        shape,
        spec.rank if low_rank and spec.rank else 0,
        spec.l.bits if low_rank and spec.l else 0,
        spec.r.bits if low_rank and spec.r else 0,
        *backbone,
        spec.rotation or 0,
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


def _best_method(spec: FactorSpec) -> str:
    """What measured best at a budget; a spec that asks for a rank gets factors, with the backbone that it asks for."""
    if spec.rank is not None or spec.bits_per_weight is None:
        return "caldera" if spec.q is not None else "lplr"
    return "ldlq" if spec.bits_per_weight >= BACKBONE_FROM else "lplr"


def _with_backbone(shape: tuple[int, int], spec: FactorSpec) -> FactorSpec:
    """The widest Q that keeps to the budget, one range a row; `ldlq` fills the budget with columns of one bit more.

    Unchanged when not even that fits.
    """
    n, d = shape
    budget = (spec.bits_per_weight or 0.0) * n * d

    def fits(bits: int, narrow: int) -> bool:
        q = QuantSpec(bits=bits, ranges="row")
        return layout(shape, FactorSpec(rank=0, q=q, q_narrow=narrow)).stored_bits() <= budget

    for bits in range(8, 0, -1):
        # the fewest narrow columns that fit: more of them take less
        low, high = 0, d if spec.method == "ldlq" else 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(bits, middle) else (middle + 1, high)
        if low < (d if spec.method == "ldlq" else 1):
            return spec.model_copy(update={"q": QuantSpec(bits=bits, ranges="row"), "q_narrow": low})
    return spec
