"""Allocation against linear programming, brute force and its own optimality conditions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lplr.errors import RecipeError
from lplr.factor.allocate import allocate, convex_hull

points = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 100, allow_subnormal=False)), min_size=1, max_size=7)
many = st.lists(points, min_size=1, max_size=5)


def linear_programme(curves, budget):
    """min sum of convex combinations of each curve's points, by HiGHS: knows nothing of hulls or slopes."""
    cost = [e for c in curves for _, e in c]
    size = [b for c in curves for b, _ in c]
    share = np.zeros((len(curves), len(cost)))
    at = 0
    for i, c in enumerate(curves):
        share[i, at : at + len(c)] = 1
        at += len(c)
    return linprog(cost, A_ub=[size], b_ub=[budget], A_eq=share, b_eq=np.ones(len(curves)), bounds=(0, None))


@settings(max_examples=200, deadline=None)
@given(many, st.floats(0, 1))
def test_total_error_is_the_optimum_of_the_linear_programme(curves, share):
    least = sum(min(b for b, _ in c) for c in curves)
    most = sum(max(b for b, _ in c) for c in curves)
    budget = least + share * (most - least)
    found = allocate({str(i): c for i, c in enumerate(curves)}, budget)
    assert sum(found.bits.values()) <= budget * (1 + 1e-12)
    wanted = linear_programme(curves, budget)
    assert wanted.status == 0
    # HiGHS solves to 1e-7 of the sizes at hand
    assert found.error == pytest.approx(wanted.fun, abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(many, st.floats(0, 1))
def test_all_matrices_but_one_stand_on_measured_points(curves, share):
    least = sum(min(b for b, _ in c) for c in curves)
    found = allocate({str(i): c for i, c in enumerate(curves)}, least + share * 100)
    between = [i for i, c in enumerate(curves) if found.bits[str(i)] not in {float(b) for b, _ in c}]
    assert len(between) <= 1


@settings(max_examples=200, deadline=None)
@given(points)
def test_hull_is_convex_decreasing_and_below_every_point(curve):
    hull = convex_hull(curve)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert all(s < 0 for s in slopes)
    assert slopes == sorted(slopes)
    for bits, error in curve:
        here = np.interp(bits, [b for b, _ in hull], [e for _, e in hull])
        assert here <= error + 1e-9 * (1 + error)  # rounding of the interpolation


def test_whole_points_beat_every_other_choice_of_whole_points_within_what_they_take():
    rng = np.random.default_rng(0)
    curves = {str(i): [(float(b), float(e)) for b, e in zip(range(1, 6), rng.random() * 4.0 ** -np.arange(5), strict=True)]
              for i in range(4)}
    found = allocate(curves, 11.0)
    assert all(b == int(b) for b in found.bits.values())  # every step is one bit, so no matrix stands between
    best = min(
        sum(dict(c)[b] for c, b in zip(curves.values(), choice, strict=True))
        for choice in itertools.product(range(1, 6), repeat=4)
        if sum(choice) <= 11
    )
    assert found.error == pytest.approx(best, rel=1e-12)


def test_a_matrix_that_matters_more_gets_more():
    curve = [(float(b), 4.0**-b) for b in range(1, 7)]
    found = allocate({"dull": curve, "dear": [(b, 64 * e) for b, e in curve]}, 7.0)
    assert found.bits == {"dull": 2.0, "dear": 5.0}  # 64 = 4^3: three bits apart, by reverse water-filling


def test_budget_beyond_everything_gives_the_best_points():
    assert allocate({"a": [(1.0, 2.0), (3.0, 1.0)]}, 100.0).bits == {"a": 3.0}


def test_budget_below_the_cheapest_points_is_refused():
    with pytest.raises(RecipeError, match="below the 3 that"):
        allocate({"a": [(1.0, 2.0)], "b": [(2.0, 1.0)]}, 2.5)
