"""Method, grid, factor widths and rank from a bit budget: from shapes alone, with every stored bit counted."""

from __future__ import annotations

from lplr.errors import RecipeError
from lplr.factor.factorization import Format
from lplr.recipe import ANY_GRID, FACTOR_RANGES, LOW_RANK, WIDTHS, FactorSpec, Grid, QuantSpec, quant_spec

BACKBONE_FROM = 0.75  # bits per weight from which a rotated backbone beats factors alone (eval/quality/methods.py)
ROTATION = 1  # seed of the rotation of the inputs: one for all, so that layers with the same input can share it
OUTPUT_ROTATION = 2  # seed of the rotation of the outputs: it makes rows alike, so that one scale serves all of them
ROTATED = ("ldlq", "caldera")
BACKBONE = ("ldlq", "naive")
# bits by which the trellis of a width is ahead of the uniform grid at 2 bits of a normal variable (eval/results/grids.json)
TRELLIS_GAIN = 0.4
EXCHANGED = (1 / 16, 1 / 8)  # shares of the budget that CALDERA tries to give to L R instead of Q (a compromise with time)


def default_factor_bits(bits_per_weight: float) -> int:
    """Width of the factors when they stand alone: narrow factors buy rank, wide ones accuracy.

    From 0.5 bits on it follows eval/quality/methods.py; 2 bits below 0.4 is a guess.
    """
    for limit, bits in ((0.4, 2), (2.5, 3)):
        if bits_per_weight < limit:
            return bits
    return 4


def plan(shape: tuple[int, int], spec: FactorSpec) -> FactorSpec:
    """The spec with method, rotations, widths and rank filled in for a matrix of this shape.

    A result with rank 0 and no q says that nothing fits the budget.  Raises RecipeError when neither a budget nor a
    rank is given, or for a grid that the method does not know.
    """
    budget = spec.bits_per_weight
    if budget is None and spec.rank is None and spec.q is None:
        raise RecipeError("a factorization needs bits_per_weight or a rank: give one of them")
    if spec.method == "auto":
        spec = spec.model_copy(update={"method": _best_method(spec)})
    for side, seed in (("rotation", ROTATION), ("output_rotation", OUTPUT_ROTATION)):
        if getattr(spec, side) is None:
            spec = spec.model_copy(update={side: seed if spec.method in ROTATED else 0})
    if spec.q is None and spec.method in (*BACKBONE, "caldera"):
        spec = _with_backbone(shape, spec)
    if spec.method in BACKBONE:
        return spec.model_copy(update={"rank": 0})
    if spec.method in LOW_RANK:
        spec = spec.model_copy(update={"q": None})
    spec = _with_factors(shape, spec)
    if spec.rank is None:
        spec = spec.model_copy(update={"rank": largest_rank(shape, spec)})
    return spec.model_copy(update={"rank": min(spec.rank or 0, *shape)})


def layout(shape: tuple[int, int], spec: FactorSpec) -> Format:
    """The stored layout of a planned spec."""
    n, _ = shape
    low_rank = bool(spec.rank and spec.l and spec.r)
    scales = scale_lengths(shape, spec) if low_rank else ()
    if spec.q is not None:
        scales += (("q_row_scale", 1 if spec.q.ranges == "tensor" else n),)
    parts = (spec.l if low_rank else None, spec.r if low_rank else None, spec.q)
    rank, narrow = spec.rank if low_rank and spec.rank else 0, spec.q_narrow if spec.q else 0
    return Format.of(shape, rank, parts, narrow, (spec.rotation or 0, spec.output_rotation or 0), scales)


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


def exchanges(shape: tuple[int, int], spec: FactorSpec) -> list[FactorSpec]:
    """The plans that `factorize` tries, `plan`'s first: with CALDERA, no rank and no Q given, also L R in place of some of Q.

    Bits go from Q to L R where that lowers the error, and nowhere else: the widest Q alone is among the plans.
    """
    first = plan(shape, spec)
    if first.method != "caldera" or spec.rank is not None or spec.q is not None or first.q is None:
        return [first]
    budget, out = spec.bits_per_weight or 0.0, [first]
    if first.rank:  # bits that no Q of the grid can use
        out.append(first.model_copy(update={"rank": 0}))
    for share in EXCHANGED:
        smaller = plan(shape, spec.model_copy(update={"bits_per_weight": budget * (1 - share)}))
        again = smaller.model_copy(update={"bits_per_weight": budget, "rank": None, "l": spec.l, "r": spec.r})
        again = plan(shape, again) if smaller.q is not None else again
        if again.rank:
            out.append(again)
    return out


def _with_factors(shape: tuple[int, int], spec: FactorSpec) -> FactorSpec:
    """Widths, ranges and grids of L and R where they are not given."""
    grid = (spec.grid if spec.q is None else None) or "uniform"
    asked = {grid, *(part.grid for part in (spec.l, spec.r) if part is not None)}
    if spec.method in LOW_RANK and spec.method not in ANY_GRID and asked != {"uniform"}:
        raise RecipeError(
            f"{spec.method!r} rounds its factors to the uniform grid, not to {min(asked - {'uniform'})}: "
            f"choose one of {', '.join(ANY_GRID)}, ldlq and caldera for that grid"
        )
    bits = _factor_bits(shape, spec)
    ranges = FACTOR_RANGES.get(spec.method, ("rank", "rank"))
    l, r = (quant_spec(width, spec.rounding, grid, which) for width, which in zip(bits, ranges, strict=True))
    return spec.model_copy(update={"l": spec.l or l, "r": spec.r or r})


def _factor_bits(shape: tuple[int, int], spec: FactorSpec) -> tuple[int, int]:
    """Widths of L and R where nothing is said: narrow ones for the methods with feedback, which gain from rank."""
    n, d = shape
    budget = spec.bits_per_weight if spec.bits_per_weight is not None else 1.0
    if spec.method == "double_binary":
        return (2, 2) if budget >= 2 else (1, 1) if n >= d else (2, 1)
    if spec.method == "lplr_feedback":
        return 2, 2
    both = default_factor_bits(budget) if spec.q is None else 3 if spec.q.bits <= 1 else 2
    return both, both


def _with_backbone(shape: tuple[int, int], spec: FactorSpec) -> FactorSpec:
    """The widest Q that keeps to the budget, on the grid that is asked for or serves best; unchanged when not even that fits.

    In rotated bases with one scale, where narrow columns fill the budget to the last column; for `naive` one scale a row.
    """
    if spec.method == "naive":
        found = _widest(shape, spec, spec.grid or "uniform")
    elif spec.grid is not None:
        found = _widest(shape, spec, spec.grid)
    else:
        uniform, trellis = (_widest(shape, spec, grid) for grid in ("uniform", "trellis"))
        # a column of few rows wastes bits of its last byte, and the trellis ends at 6 bits
        behind = _mean_width(shape, uniform) - _mean_width(shape, trellis)
        found = uniform if trellis is None or behind > TRELLIS_GAIN else trellis
    return found or spec


def _mean_width(shape: tuple[int, int], spec: FactorSpec | None) -> float:
    return layout(shape, spec).backbone_width if spec is not None else 0.0


def _widest(shape: tuple[int, int], spec: FactorSpec, grid: Grid) -> FactorSpec | None:
    """The spec with the widest Q of a grid, and the fewest narrow columns, that keeps to the budget; None if none does.

    With CALDERA beside the L R of the rank that is asked for.
    """
    n, d = shape
    budget = (spec.bits_per_weight or 0.0) * n * d
    mixed = spec.method in ROTATED
    rank = spec.rank if spec.method == "caldera" else 0
    for bits in reversed(WIDTHS[grid]):
        q = QuantSpec(grid=grid, bits=bits, ranges="tensor" if mixed else "row")

        def with_narrow(count: int, q: QuantSpec = q) -> FactorSpec:
            return spec.model_copy(update={"q": q, "q_narrow": count})

        # the fewest narrow columns that fit: more of them take less
        low, high = 0, d if mixed else 1
        while low < high:
            middle = (low + high) // 2
            tried = with_narrow(middle).model_copy(update={"rank": min(rank or 0, *shape)})
            tried = _with_factors(shape, tried) if rank else tried
            low, high = (low, middle) if layout(shape, tried).stored_bits() <= budget else (middle + 1, high)
        if low < (d if mixed else 1):
            return with_narrow(low)
    return None
