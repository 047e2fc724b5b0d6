"""Method, grid, factor widths and rank from a bit budget: from shapes alone, with every stored bit counted.

Which of several plans of the same budget serves a matrix best is measured on the matrix itself: `exchanges` and `factorize`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nextafter

from lplr.errors import RecipeError
from lplr.factor.factorization import Format
from lplr.recipe import ANY_GRID, FACTOR_RANGES, LOW_RANK, WIDTHS, FactorSpec, Grid, QuantSpec, quant_spec

# bits per weight from which `auto` starts from a rotated backbone: above the width of the narrowest trellis, so that backbones
# can meet a budget that `stream.allocation` shares among matrices
BACKBONE_FROM = 0.6
FACTORS_BELOW = 1.5  # bits per weight below which `auto` tries factors alone beside it
# What `auto` tries; the least error on the matrix decides.  Measured, 15 matrices of SmolLM2-135M: double_binary beats ldlq on 11
# of them at 0.5 bits, on 6 at 0.75 and at 1, on 1 at 1.5.  lplr serves where the scales of double_binary alone exceed the budget.
TRIED = (
    (FACTORS_BELOW, ("ldlq",)),
    (BACKBONE_FROM, ("ldlq", "double_binary")),
    (0.0, ("double_binary", "lplr", "ldlq")),
)
ROTATION = 1  # seed of the rotation of the inputs: one for all, so that layers with the same input can share it
OUTPUT_ROTATION = 2  # seed of the rotation of the outputs: it makes rows alike, so that one scale serves all of them
ROTATED = ("ldlq", "caldera")
BACKBONE = ("ldlq", "naive")
WEIGH_OUTPUTS = ("ldlq",)  # methods that take what the loss minds of the outputs into account
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
        methods = _candidates(spec)
        starting = tuple(m for m in methods if (m in BACKBONE) == (methods[0] in BACKBONE))
        return next(_fitting(shape, spec, starting), None) or plan(shape, _by(starting[-1], spec))
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


def exchanges(shape: tuple[int, int], spec: FactorSpec) -> list[FactorSpec]:
    """The plans that `factorize` tries, `plan`'s first; the others store no more bits than it does, in other bases perhaps.

    With `auto` those of other methods (TRIED).  With CALDERA, no rank and no Q given, also L R in place of some of Q: bits go
    from Q to L R where that lowers the error, and nowhere else; the widest Q alone is among the plans.
    """
    first = plan(shape, spec)
    if not first.rank and first.q is None:
        return [first]
    n, d = shape
    # the next number up keeps the division's rounding from taking a bit away
    capped = spec.model_copy(update={"bits_per_weight": nextafter(layout(shape, first).stored_bits() / (n * d), inf)})
    if spec.method == "auto":
        return [first, *_fitting(shape, capped, tuple(m for m in _candidates(spec) if m != first.method))]
    if first.method == "caldera" and spec.rank is None and spec.q is None and first.q is not None:
        return [first, *_shared(shape, spec, capped, first)]
    return [first]


def made_by(shape: tuple[int, int], spec: FactorSpec, fmt: Format) -> str:
    """The method of the plan of `exchanges` whose layout a factorization has; `plan`'s where there is none."""
    plans = exchanges(shape, spec)
    return next((planned for planned in plans if layout(shape, planned) == fmt), plans[0]).method


def _candidates(spec: FactorSpec) -> tuple[str, ...]:
    """Methods for `auto` to try, the one to start from first; where that does not fit, the next of its kind.

    A spec that asks for a rank gets factors, with the backbone that it asks for; one that says anything of the factors or asks
    for a grid that double_binary does not know gets a method that obeys.
    """
    budget = spec.bits_per_weight
    if spec.rank is not None or budget is None:
        return ("caldera",) if spec.q is not None else ("lplr",)
    methods = next(methods for limit, methods in TRIED if budget >= limit)
    backbone = tuple(m for m in methods if m in BACKBONE)
    if spec.q is not None:
        return backbone
    if spec.l or spec.r or spec.rounding != "nearest" or spec.grid not in (None, "uniform"):
        return backbone if methods[0] in BACKBONE else ("lplr",)
    return methods


def _by(method: str, spec: FactorSpec) -> FactorSpec:
    return spec.model_copy(update={"method": method})


def _fitting(shape: tuple[int, int], spec: FactorSpec, methods: tuple[str, ...]) -> Iterator[FactorSpec]:
    """The plans by these methods that fit the budget."""
    plans = (plan(shape, _by(method, spec)) for method in methods)
    return (planned for planned in plans if planned.rank or planned.q is not None)


def _shared(shape: tuple[int, int], spec: FactorSpec, capped: FactorSpec, first: FactorSpec) -> list[FactorSpec]:
    """CALDERA's other plans: Q alone, and a Q of less than the budget with L R for the rest of what the first plan takes."""
    out = []
    if first.rank:  # bits that no Q of the grid can use
        out.append(first.model_copy(update={"rank": 0}))
    for share in EXCHANGED:
        budget = (spec.bits_per_weight or 0.0) * (1 - share)
        smaller = plan(shape, spec.model_copy(update={"bits_per_weight": budget}))
        if smaller.q is None:
            continue
        again = {"bits_per_weight": capped.bits_per_weight, "rank": None, "l": spec.l, "r": spec.r}
        planned = plan(shape, smaller.model_copy(update=again))
        if planned.rank:
            out.append(planned)
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
