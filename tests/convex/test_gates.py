"""Gates and their patterns, against one dot product at a time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.convex.gates import Gates, clean, gaussian, patterns, sample


def test_patterns_are_strict():
    X = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 2.0]])
    G = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    assert patterns(X, G).tolist() == [[True, False], [False, False], [False, False]]
    assert patterns(X, G, torch.tensor([0.1, 0.0])).tolist() == [[True, False], [True, False], [True, False]]


@given(n=st.integers(1, 20), P=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_clean_keeps_one_of_each_pattern_and_no_empty_one(n, P, seed):
    D = torch.rand(n, P, generator=torch.Generator().manual_seed(seed)) < 0.3
    kept = clean(D)
    columns = {tuple(column) for column in D.T.tolist()} - {(False,) * n}
    assert {tuple(column) for column in D[:, kept].T.tolist()} == columns and len(kept) == len(columns)
    assert kept.tolist() == sorted(kept.tolist())


def test_the_seed_decides_gaussian_gates():
    draw = [gaussian(5, 4, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2]) and draw[0].shape == (5, 4)


def test_gates_from_data_separate_two_samples():
    X = torch.randn(15, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = sample(X, 50, torch.Generator().manual_seed(1))
    D = gates.patterns(X)
    assert len(gates) == 50 and D.shape == (15, 50) and D.any(0).all() and not D.all(0).any()
    assert torch.equal(gates[clean(D)].patterns(X), D[:, clean(D)])


def test_gates_from_one_sample():
    X = torch.tensor([[3.0, -1.0]])
    assert sample(X, 4, torch.Generator().manual_seed(0)).patterns(X).all()


def test_gates_know_their_offsets():
    gates = Gates(torch.eye(2), torch.tensor([-1.0, 2.0]))
    X = torch.tensor([[0.5, -1.0], [1.5, -3.0]])
    assert gates.patterns(X).tolist() == [[False, True], [True, False]]
