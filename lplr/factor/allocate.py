"""Bits where they matter: the global optimum of a separable problem over measured error curves.

    minimise  sum_i e_i(b_i)   subject to   sum_i b_i <= budget,      e_i the lower convex hull of matrix i's measured points

A point is (stored bits, loss); between two corners of a hull a matrix mixes two widths (`q_narrow`), whose error is no worse than
linear.  The optimum takes the hulls' segments in the order of their slopes until the budget is spent: all matrices end on
corners but one.  It is the solution of the linear programme, and its multiplier the slope at which it stops (Shoham, Gersho, IEEE
Trans. ASSP 1988; Everett 1963).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lplr.errors import RecipeError

Point = tuple[float, float]  # (stored bits, error)


@dataclass(frozen=True)
class Allocation:
    """bits of every matrix, their summed error, and the slope at which the budget was spent: error per bit one bit would save."""

    bits: dict[str, float]
    error: float
    slope: float


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of a decreasing curve, by increasing bits; points that cost more and err no less are left out."""
    best: list[Point] = []
    for bits, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((bits, error))
    hull: list[Point] = []
    for point in best:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def allocate(curves: Mapping[str, Sequence[Point]], budget: float) -> Allocation:
    """Stored bits for every matrix, in total at most `budget`, of the least total error; O(points log points).

    Raises RecipeError when the cheapest points of all matrices together exceed the budget.
    """
    hulls = {name: convex_hull(points) for name, points in curves.items()}
    bits = {name: hull[0][0] for name, hull in hulls.items()}
    error = sum(hull[0][1] for hull in hulls.values())
    left = budget - sum(bits.values())
    if left < 0:
        raise RecipeError(
            f"the budget of {budget:.0f} bits is below the {sum(bits.values()):.0f} that the narrowest formats take: raise it"
        )
    segments = sorted(
        (_slope(low, high), i, name, low, high)
        for name, hull in hulls.items()
        for i, (low, high) in enumerate(zip(hull, hull[1:], strict=False))
    )
    for slope, _, name, low, high in segments:
        step = high[0] - low[0]
        take = min(step, left)
        bits[name] += take
        error += slope * take
        left -= take
        if take < step:
            return Allocation(bits, error, -slope)
    return Allocation(bits, error, 0.0)


def _slope(low: Point, high: Point) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
