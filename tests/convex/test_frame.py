"""Frames and drawn gates against numpy, exact arithmetic and the pairs of samples that the gates were drawn from."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex.frame import KINDS, Frame, draw, settled
from lplr.convex.gates import Gates
from lplr.convex.network import fold_gates
from lplr.errors import RecipeError


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def whole(seed: int, *shape: int, size: int = 3) -> torch.Tensor:
    """Whole numbers from -size to size."""
    return torch.randint(-size, size + 1, shape, generator=generator(seed)).double()


def exact(gates: Gates, X: torch.Tensor) -> list[list[Fraction]]:
    """Scores (n, P) without rounding."""
    columns = [[Fraction(v) for v in column] for column in torch.cat([gates.vectors, gates.offsets[None]]).T.tolist()]
    rows = [[Fraction(v) for v in row] + [Fraction(1)] for row in X.tolist()]
    return [[sum((a * b for a, b in zip(row, g, strict=True)), Fraction(0)) for g in columns] for row in rows]


@given(seed=st.integers(0, 9999), n=st.integers(2, 40), d=st.integers(1, 5), ones=st.booleans())
@settings(max_examples=30, deadline=None)
def test_features_are_standardised(seed, n, d, ones):
    X = normal(seed, n, d) * 10.0 ** whole(seed, d) + whole(seed + 1, d, size=50)
    frame = Frame.of(X, standardize=True, ones=ones)
    found, samples = frame.apply(X).numpy(), X.numpy()
    wanted = (samples - samples.mean(0)) / samples.std(0)
    # rounding of x - mean and of the spread, in spreads: two samples may be much nearer to each other than 1e-3
    apart = np.abs(samples).max(0) / samples.std(0)
    assert (np.abs(found[:, :d] - wanted) < 1e-16 * np.maximum(apart, 1) * n * 10).all()
    assert found.shape == (n, d + ones) and (not ones or (found[:, -1] == 1).all())
    new = normal(seed + 2, 3, d)
    assert frame.apply(new)[:, :d].numpy() == pytest.approx((new.numpy() - samples.mean(0)) / samples.std(0), rel=1e-9, abs=1e-9)


def test_without_standardisation_features_stay_as_they_are():
    X = torch.cat([normal(0, 6, 2), torch.full((6, 1), 7.0, dtype=torch.float64)], 1)
    frame = Frame.of(X, standardize=False, ones=True)
    assert torch.equal(frame.apply(X), torch.cat([X, torch.ones(6, 1, dtype=torch.float64)], 1))
    assert torch.equal(Frame.of(X, standardize=False, ones=False).apply(X), X) and bool(frame.varies.all())


CONSTANTS = {
    "zero": [0.0] * 6,
    "a number": [0.1] * 6,
    "but for rounding": [0.3, 0.1 + 0.2, 0.3, 0.3, 0.1 * 3, 0.3],
    "large, but for rounding": [1e8, 1e8 + 1.5e-8, 1e8, 1e8 - 1.5e-8, 1e8, 1e8],
    "largest": [1e300] * 6,
}


@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.parametrize("gates", KINDS)
def test_columns_that_are_constant_but_for_rounding(kind, gates):
    X = torch.cat([torch.tensor(CONSTANTS[kind], dtype=torch.float64)[:, None], normal(0, 6, 2)], 1)
    frame = Frame.of(X, standardize=True, ones=True)
    assert frame.varies.tolist() == [False, True, True] and frame.scale[0] == 1
    assert not frame.apply(X)[:, 0].any()
    other = X.clone()
    other[:, 0] = torch.arange(6.0)  # nothing was learned of it, so nothing is made of it
    assert torch.equal(frame.apply(other), frame.apply(X))
    found, D = draw(gates, X, 9, frame, generator(1), linear=True, offsets=True)
    assert not found.vectors[0].any() and torch.equal(found.patterns(other), D)


@pytest.mark.parametrize("size", [1e-180, 1e-160, 1e160, 1e200, 1e300])
def test_columns_whose_squares_leave_the_range(size):
    base = normal(0, 20, 2)
    X = base * torch.tensor([size, 1.0], dtype=torch.float64)
    frame = Frame.of(X, standardize=True, ones=False)
    wanted = (base - base.mean(0)) / base.std(0, correction=0)
    assert frame.varies.all() and (frame.apply(X) - wanted).abs().max() < 1e-13


@given(seed=st.integers(0, 9999), n=st.integers(2, 30), d=st.integers(1, 6), P=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_folded_gates_see_raw_samples_as_standardised_ones(seed, n, d, P):
    X = normal(seed, n, d) * torch.logspace(-2, 2, d, dtype=torch.float64) + 5
    frame = Frame.of(X, standardize=True, ones=False)
    gates = Gates(normal(seed + 1, d, P), normal(seed + 2, P))
    inside = frame.apply(X) @ gates.vectors + gates.offsets
    raw = fold_gates(gates, frame.mean, frame.scale)
    assert (X @ raw.vectors + raw.offsets - inside).abs().max() < 1e-10  # eps * mean / scale, at most 5 / 1e-3
    clear = inside.abs() > 1e-10
    assert torch.equal(raw.patterns(X)[clear], gates.patterns(frame.apply(X))[clear])


@given(seed=st.integers(0, 99_999), n=st.integers(2, 14), d=st.integers(1, 3), P=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_settled_leaves_no_sample_of_a_grid_on_a_hyperplane(seed, n, d, P):
    X, gates = whole(seed, n, d), Gates(whole(seed + 1, d, P), whole(seed + 2, P))
    before, moved = exact(gates, X), settled(gates, X)
    after = exact(moved, X)
    assert torch.equal(moved.vectors, gates.vectors)
    for i in range(P):
        old, new = [row[i] for row in before], [row[i] for row in after]
        if all(score == 0 for score in old):  # no other sample says how far to move
            assert moved.offsets[i] == gates.offsets[i]
            continue
        assert all(new), f"{old} became {new}"
        assert [score > 0 for score in new] == [score >= 0 for score in old], f"{old} became {new}"
        assert [score > 0 for score in new] == moved.patterns(X)[:, i].tolist()
        if all(old):
            assert new == old


def test_the_nearest_sample_below_stays_closed():
    X = torch.tensor([[2.0], [0.0], [-1.0]], dtype=torch.float64)
    found = settled(Gates(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)), X)
    assert found.patterns(X)[:, 0].tolist() == [True, True, False] and found.offsets.tolist() == [0.5]


@given(seed=st.integers(0, 9999), kind=st.sampled_from(KINDS), ones=st.booleans(), step=st.sampled_from([1.0, 0.1, 1 / 3]))
@settings(max_examples=40, deadline=None)
def test_gates_drawn_on_a_grid_do_not_depend_on_rounding(seed, kind, ones, step):
    X = whole(seed, 24, 2) * step
    frame = Frame.of(X, standardize=True, ones=ones)
    if not frame.varies.all():
        return
    gates, D = draw(kind, X, 12, frame, generator(seed), linear=False, offsets=True)
    scores = X @ gates.vectors + gates.offsets
    sizes = (X.abs() @ gates.vectors.abs()).amax(0) + gates.offsets.abs()
    assert (scores.abs() > 1e-13 * sizes).all()  # half of ON, 1e-10, and far from the rounding of a sum of three terms
    assert torch.equal((X.flip(1) @ gates.vectors.flip(0) + gates.offsets) > 0, D)


@given(
    seed=st.integers(0, 9999), kind=st.sampled_from(KINDS), P=st.integers(1, 20), ones=st.booleans(), linear=st.booleans(),
    offsets=st.booleans(), standardize=st.booleans(), n=st.integers(2, 12),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_drawn_gates(seed, kind, P, ones, linear, offsets, standardize, n):
    X = normal(seed, n, 3) * 3 + 1
    frame = Frame.of(X, standardize=standardize, ones=ones)
    try:
        gates, D = draw(kind, X, P, frame, generator(seed), linear=linear, offsets=offsets)
    except RecipeError as error:  # a hyperplane leaves all samples on its closed side with chance 1/2 at most
        assert not linear and P < 20 and "none is open" in str(error)
        return
    assert len(gates) == D.shape[1] <= P + linear and D.dtype == torch.bool
    assert torch.equal(D, (X @ gates.vectors + gates.offsets) > 0)
    columns = {tuple(column) for column in D.T.tolist()}
    assert len(columns) == len(gates) and tuple([False] * n) not in columns
    if linear:
        assert not gates.vectors[:, 0].any() and gates.offsets[0] > 0 and D[:, 0].all()
    rest = gates[torch.arange(int(linear), len(gates))]
    if not offsets and len(rest):
        middle = X.mean(0) if standardize else torch.zeros(3, dtype=torch.float64)
        assert (middle @ rest.vectors + rest.offsets).abs().max() < 1e-12 * (1 + rest.vectors.abs().max() * 10)
    again, _ = draw(kind, X, P, frame, generator(seed), linear=linear, offsets=offsets)
    assert torch.equal(again.vectors, gates.vectors) and torch.equal(again.offsets, gates.offsets)


@pytest.mark.parametrize("standardize", [False, True])
def test_gates_through_samples_leave_none_on_a_hyperplane(standardize):
    X = normal(4, 12, 3) + 1
    frame = Frame.of(X, standardize=standardize, ones=False)
    gates, D = draw("wedge", X, 20, frame, generator(0), linear=False, offsets=False)
    scores, sizes = X @ gates.vectors + gates.offsets, X.abs() @ gates.vectors.abs() + gates.offsets.abs()
    assert (scores.abs() > 1e-6 * sizes).all() and torch.equal(D, scores > 0)  # rounding is 1e-15 of the sizes


@pytest.mark.parametrize("standardize", [False, True])
def test_gates_of_data_lie_half_way_between_two_samples(standardize):
    X = normal(4, 9, 3) * torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64) + 2
    scale = X.std(0, correction=0) if standardize else torch.ones(3, dtype=torch.float64)
    gates, _ = draw("data", X, 20, Frame.of(X, standardize=standardize, ones=False), generator(0), linear=False, offsets=True)
    scores = X @ gates.vectors + gates.offsets
    for i in range(len(gates)):
        pairs = [
            (a, b)
            for a in range(9)
            for b in range(9)
            if torch.allclose((X[a] - X[b]) / scale.square(), gates.vectors[:, i], rtol=1e-9, atol=1e-12)
        ]
        assert len(pairs) == 1
        a, b = pairs[0]
        assert scores[a, i] > 0 and scores[b, i] == pytest.approx(-scores[a, i].item(), rel=1e-9)


def test_mixed_gates_are_of_both_kinds():
    X = normal(5, 200, 4)
    frame = Frame.of(X, standardize=True, ones=True)
    mixed, _ = draw("mixed", X, 7, frame, generator(3), linear=False, offsets=True)
    gaussian, _ = draw("gaussian", X, 4, frame, generator(3), linear=False, offsets=True)
    assert len(mixed) == 7 and torch.equal(mixed.vectors[:, :4], gaussian.vectors)


def test_samples_that_are_all_alike():
    X = torch.full((4, 2), 3.0, dtype=torch.float64)
    frame = Frame.of(X, standardize=True, ones=True)
    for kind in KINDS:
        gates, D = draw(kind, X, 6, frame, generator(0), linear=True, offsets=True)
        assert len(gates) == 1 and D.all()
    none = Frame.of(X, standardize=True, ones=False)
    with pytest.raises(RecipeError, match="of 6 gates none is open on a sample .n_samples = 4, n_features = 2.: raise n_gates"):
        draw("data", X, 6, none, generator(0), linear=False, offsets=False)
