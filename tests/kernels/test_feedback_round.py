"""Feedback rounding and coordinate descent: the two forms against each other, and against entry by entry in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lplr.kernels import feedback
from lplr.kernels.backend import compiled
from lplr.kernels.feedback import descend, feedback_round, reference

SHAPES = [(1, 1), (1, 9), (9, 1), (5, 7), (13, 6), (9, 65), (17, 130)]  # on both sides of the panel and the block


@pytest.fixture(params=["compiled", "reference"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each form behind the public functions."""
    if request.param == "reference":
        monkeypatch.setenv("LPLR_BACKEND", "reference")
    else:
        pytest.importorskip("numba", reason="the compiled form needs numba")
        monkeypatch.delenv("LPLR_BACKEND", raising=False)
    compiled.cache_clear()
    assert (compiled("feedback") is None) == (request.param == "reference")
    yield request.param
    compiled.cache_clear()


def spd(size: int, generator: torch.Generator) -> Tensor:
    X = torch.randn(2 * size, size, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, size, dtype=torch.float64)
    return X.T @ X / size + 0.01 * torch.eye(size, dtype=torch.float64)


def unit_upper(size: int, generator: torch.Generator) -> Tensor:
    U = torch.randn(size, size, generator=generator, dtype=torch.float64) * size**-0.5
    return U.triu(1) + torch.eye(size, dtype=torch.float64)


def setting(r: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    X = torch.randn(r, d, generator=generator, dtype=torch.float64)
    return X, torch.rand(r, generator=generator).double() + 0.2, torch.rand(d, generator=generator).double() + 0.5


def entry_by_entry(X: Tensor, bits: int, row: Tensor, col: Tensor, U_H: Tensor, U_G: Tensor) -> tuple[Tensor, Tensor]:
    r, d = X.shape
    E, codes = torch.zeros_like(X), torch.zeros(r, d, dtype=torch.uint8)
    points = torch.arange(1 << bits, dtype=X.dtype) * 2 - ((1 << bits) - 1)
    for i in range(r):  # rows first: another order than either form's, with the same dependencies
        for j in range(d):
            wanted = X[i, j] + U_G[: i + 1, i] @ E[: i + 1, : j + 1] @ U_H[: j + 1, j]
            at = (wanted - points * row[i] * col[j]).abs().argmin()
            codes[i, j], E[i, j] = at, X[i, j] - points[at] * row[i] * col[j]
    return codes, E


@pytest.mark.parametrize(("r", "d"), SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("sides", [1, 2])
def test_rounding_entry_by_entry(form: str, r: int, d: int, bits: int, sides: int, generator: torch.Generator) -> None:
    X, row, col = setting(r, d, generator)
    U_H, U_G = unit_upper(d, generator), unit_upper(r, generator) if sides == 2 else None
    arguments = [X, row / (1 << bits), col, U_H]
    before = [t.clone() for t in arguments]
    codes, E = feedback_round(X, bits, arguments[1], col, U_H, U_G)
    expected, E_expected = entry_by_entry(X, bits, arguments[1], col, U_H, torch.eye(r).double() if U_G is None else U_G)
    assert codes.dtype == torch.uint8 and torch.equal(codes, expected)
    torch.testing.assert_close(E, E_expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_strided_and_single_precision(form: str, generator: torch.Generator) -> None:
    X, row, col = setting(70, 20, generator)
    U_H, U_G = unit_upper(70, generator), unit_upper(20, generator)
    codes, E = feedback_round(X.T, 3, col, row, U_H, U_G)
    again, _ = feedback_round(X.T.contiguous(), 3, col, row, U_H.T.contiguous().T, U_G)
    assert torch.equal(codes, again) and codes.is_contiguous() and E.shape == (20, 70)
    single, E_single = feedback_round(*(t.float() if isinstance(t, Tensor) else t for t in (X.T, 3, col, row, U_H, U_G)))
    assert E_single.dtype == torch.float32
    # one entry that falls on the other side of a tie in float32 changes those after it
    assert float((single == codes).double().mean()) > 0.98


def test_zero_scales_give_zero(form: str, generator: torch.Generator) -> None:
    X, row, col = setting(6, 11, generator)
    row[2], col[4] = 0, 0
    for U_G in (None, unit_upper(6, generator)):
        codes, E = feedback_round(X, 2, row, col, unit_upper(11, generator), U_G)
        assert bool(torch.isfinite(E).all()) and torch.equal(E[2], X[2]) and torch.equal(E[:, 4], X[:, 4])
        form_before = torch.full((6, 11), 1, dtype=torch.uint8)
        after = descend(form_before, X, 2, row, col, spd(11, generator), None if U_G is None else spd(6, generator))
        assert bool((after[2] == 1).all()) and bool((after[:, 4] == 1).all())
        assert codes.shape == (6, 11)


@pytest.mark.parametrize(("r", "d"), SHAPES)
@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("sides", [1, 2])
def test_descent_entry_by_entry(form: str, r: int, d: int, bits: int, sides: int, generator: torch.Generator) -> None:
    X, row, col = setting(r, d, generator)
    row = row / (1 << bits)
    H, G = spd(d, generator), spd(r, generator) if sides == 2 else None
    dense = torch.eye(r).double() if G is None else G
    T = dense @ X @ H
    start = torch.randint(0, 1 << bits, (r, d), generator=generator).to(torch.uint8)
    before = start.clone()
    codes = descend(start, T, bits, row, col, H, G)
    top = (1 << bits) - 1

    def value(c: Tensor) -> Tensor:
        return (2 * c.double() - top) * row[:, None] * col

    expected, points = value(start), torch.arange(1 << bits).double() * 2 - top
    for j in range(d):
        for i in range(r):
            slope = T[i, j] - dense[i] @ expected @ H[:, j]
            best = expected[i, j] + slope / (dense[i, i] * H[j, j])
            expected[i, j] = points[(points * row[i] * col[j] - best).abs().argmin()] * row[i] * col[j]
    torch.testing.assert_close(value(codes), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(start, before)

    def form_of(c: Tensor) -> float:
        E = X - value(c)
        return float((E * (dense @ E @ H)).sum())

    assert form_of(codes) <= form_of(start) * (1 + 1e-12)


def test_without_numba_the_reference_serves(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.delenv("LPLR_BACKEND", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "lplr.kernels.feedback.cpu", None)
    monkeypatch.delattr(feedback, "cpu", raising=False)
    compiled.cache_clear()
    try:
        assert compiled("feedback") is None
        X, row, col = setting(3, 4, generator)
        U_H = unit_upper(4, generator)
        assert torch.equal(feedback_round(X, 2, row, col, U_H)[0], reference.feedback_round(X, 2, row, col, U_H)[0])
    finally:
        compiled.cache_clear()
