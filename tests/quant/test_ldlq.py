"""Feedback rounding: the exact error identity, and the gain over plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lplr.kernels.levels import narrower, nearest, packed_shape
from lplr.quant.ldlq import ONE_BIT, along_columns, gain_along_columns, ldlq, output_damping, unit_upper
from lplr.quant.uniform import quantize, scales


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(d: int, seed: int = 1) -> torch.Tensor:
    X = torch.randn(3 * d, d, generator=seeded(seed), dtype=torch.float64)
    X = X @ torch.randn(d, d, generator=seeded(seed + 1), dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    return X.T @ X / (3 * d) + 1e-3 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2, 9, 40])
def test_unit_upper_factor(d: int) -> None:
    H = correlated(d)
    U = unit_upper(H)
    assert torch.equal(U, U.triu()) and torch.equal(U.diagonal(), torch.ones(d, dtype=torch.float64))
    D = torch.linalg.solve(U, torch.linalg.solve(U, H).T)
    torch.testing.assert_close(D, torch.diag(D.diagonal()), rtol=0, atol=1e-9 * float(H.diagonal().max()))
    # scipy's factorization of the reversed matrix, reversed again
    lower, diagonal, order = scipy.linalg.ldl(H.flip(0, 1).numpy())
    if (np.diag(np.diag(diagonal)) == diagonal).all() and (order == np.arange(d)).all():
        np.testing.assert_allclose(np.flip(lower, (0, 1)), U.numpy(), atol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("n", "d"), [(5, 7), (12, 130), (3, 300), (1, 1)])
def test_error_identity(n: int, d: int, bits: int) -> None:
    """tr(E H E^T) = sum_j D_jj ||rho_j||^2, rho_j recomputed here as what rounding left of column j and its feedback."""
    H, X = correlated(d), torch.randn(n, d, generator=seeded(3), dtype=torch.float64)
    q = ldlq(X, bits, H)
    Xhat = q.dequantize(torch.float64)
    E = X - Xhat
    U = unit_upper(H)
    D = torch.linalg.solve(U, torch.linalg.solve(U, H).T).diagonal()
    wanted = X + E @ (U - torch.eye(d, dtype=torch.float64))
    rho = wanted - Xhat
    left = float(torch.trace(E @ H @ E.T))
    assert left == pytest.approx(float((D * rho.square().sum(0)).sum()), rel=1e-8)
    # and every code is the nearest to what was wanted
    row, _ = scales(X * (ONE_BIT if bits == 1 else 1), bits, axis="row", clip="mse")
    assert row is not None
    points = (torch.arange(1 << bits, dtype=torch.float64) * 2 - ((1 << bits) - 1)) * row.double()[:, None]
    nearest = (wanted[..., None] - points[:, None, :]).abs().amin(-1)
    assert bool((rho.abs() <= nearest + 1e-9).all())


@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("narrow", [1, 6, 11])
def test_narrow_columns(bits: int, narrow: int) -> None:
    """The identity holds for any rounding; the first columns have one bit less, zero where that leaves none."""
    H, X = correlated(12), torch.randn(7, 12, generator=seeded(4), dtype=torch.float64)
    q = ldlq(X, bits, H, narrow=narrow)
    E = X - q.dequantize(torch.float64)
    U = unit_upper(H)
    D = torch.linalg.solve(U, torch.linalg.solve(U, H).T).diagonal()
    rho = X + E @ (U - torch.eye(12, dtype=torch.float64)) - q.dequantize(torch.float64)
    assert float(torch.trace(E @ H @ E.T)) == pytest.approx(float((D * rho.square().sum(0)).sum()), rel=1e-8)
    assert q.row_scale is not None
    values = q.dequantize(torch.float64) / q.row_scale.double()[:, None]
    few, many = values[:, :narrow], values[:, narrow:]
    assert len(many.unique()) <= 1 << bits and len(few.unique()) <= 1 << (bits - 1)
    ratio = narrower("uniform", bits)[1]
    levels = (few / ratio if ratio else few).round(decimals=9)
    assert bool((levels.remainder(2) == (1 if bits > 1 else 0)).all())
    assert q.stored_bits() == 8 * (7 * (-(-(12 - narrow) * bits // 8) - (-narrow * (bits - 1) // 8))) + 16 * 7


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_plain_rounding_on_average(bits: int) -> None:
    ratios = []
    for seed in range(12):
        H, X = correlated(48, 10 * seed), torch.randn(20, 48, generator=seeded(seed), dtype=torch.float64)
        plain, feedback = (
            X - quantize(X, bits, axis="row").dequantize(torch.float64),
            X - ldlq(X, bits, H).dequantize(torch.float64),
        )
        ratios.append(float(torch.trace(feedback @ H @ feedback.T) / torch.trace(plain @ H @ plain.T)))
    assert np.mean(ratios) < 1


def test_identity_metric_is_plain_rounding() -> None:
    X = torch.randn(9, 200, generator=seeded(5))
    plain = quantize(X, 3, axis="row")
    assert torch.equal(ldlq(X, 3, torch.eye(200)).dequantize(), plain.dequantize())


def test_zero_rows_stay_zero() -> None:
    X = torch.randn(4, 10, generator=seeded(6))
    X[1] = 0
    for axis in ("row", "tensor", "both"):
        q = ldlq(X, 2, correlated(10).float(), axis=axis).dequantize()  # type: ignore[arg-type]
        assert bool(torch.isfinite(q).all())
        assert axis == "tensor" or not q[1].any()


GRID_WIDTHS = [("trellis", 1.0), ("trellis", 1.5), ("lattice", 2.0), ("normal_float", 3.0), ("uniform", 2)]


@pytest.mark.parametrize(("grid", "bits"), GRID_WIDTHS)
@pytest.mark.parametrize(("group", "narrow"), [(1, 0), (1, 5), (4, 0), (7, 5), (200, 0)])
def test_any_grid_any_group(grid: str, bits: float, group: int, narrow: int) -> None:
    """tr(E H E^T) = sum_b tr(rho_b D_bb rho_b^T), D = U^-1 H U^-T, and rho_b is what the grid's own rounding leaves."""
    n, d = 11, 150  # on both sides of a block of feedback
    H, X = correlated(d), torch.randn(n, d, generator=seeded(3), dtype=torch.float64)
    q = ldlq(X, bits, H, grid=grid, axis="tensor", narrow=narrow, group=group)
    E = X - q.dequantize(torch.float64)
    edges = [*range(0, narrow, group), *range(narrow, d, group)]
    U = unit_upper(H, edges)
    D = torch.linalg.solve(U, torch.linalg.solve(U, H).T)
    inside = torch.zeros(d, d, dtype=torch.bool)
    for start, stop in zip(edges, [*edges[1:], d], strict=True):
        inside[start:stop, start:stop] = True
        torch.testing.assert_close(U[start:stop, start:stop], torch.eye(stop - start, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(D[~inside].abs().max() if bool((~inside).any()) else 0) < 1e-9 * float(H.diagonal().max())
    rho = E @ U
    assert float(torch.trace(E @ H @ E.T)) == pytest.approx(float(torch.trace(rho @ (D * inside) @ rho.T)), rel=1e-8)
    assert q.row_scale is not None
    scale, (lower, ratio) = float(q.row_scale), narrower(grid, bits)
    wanted = (q.dequantize(torch.float64) + rho).T / scale
    left = (rho.T / scale).square().sum(1)
    for part, width, step in ((slice(narrow, d), bits, 1.0), (slice(0, narrow), lower, ratio)):
        if part.stop > part.start:
            points = nearest(wanted[part] / step, grid, width)[1] * step if width else 0.0
            # equally near points are told apart by float32 sums made in another order: compare distances, not points
            torch.testing.assert_close((points - wanted[part]).square().sum(1), left[part], rtol=1e-5, atol=1e-9)
    shapes = packed_shape((n, d - narrow), grid, bits), packed_shape((n, narrow), grid, lower if narrow else 0.0)
    assert q.stored_bits() == 16 + 8 * sum(a * b for a, b in shapes)


def test_two_sided_identity_and_gain() -> None:
    """tr(G E H E^T) = sum_j D_j r_j^T S r_j for the damped G, and feedback along the columns lowers it by what is promised."""
    n, d = 384, 24
    basis = torch.linalg.qr(torch.randn(n, n, generator=seeded(5), dtype=torch.float64)).Q
    G, H = basis * torch.logspace(0, -2, n, dtype=torch.float64) @ basis.T, correlated(d, 7)
    H = H / H.diagonal().mean() + torch.eye(d, dtype=torch.float64)  # mild: feedback from both sides widens what is rounded
    X = torch.randn(n, d, generator=seeded(3), dtype=torch.float64)
    plain, directed = (ldlq(X, 2.0, H, G=given, grid="trellis", axis="tensor").dequantize(torch.float64) for given in (None, G))

    def loss(Q: torch.Tensor) -> float:
        return float(torch.trace(G @ (X - Q) @ H @ (X - Q).T))

    promised = gain_along_columns(G)
    # the ends of blocks of 16 entries cost the trellis a sixth of its error at two bits
    assert promised < 0.6 and promised < loss(directed) / loss(plain) < 1.3 * promised
    Gd = G + output_damping(2.0) * G.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    V, U = along_columns(G, 2.0).U.double(), unit_upper(H)
    S = torch.linalg.solve(V, torch.linalg.solve(V, Gd).T)
    D = torch.linalg.solve(U, torch.linalg.solve(U, H).T).diagonal()
    E = X - directed
    r = V.T @ E @ U
    assert float((r * (S @ r) * D).sum()) == pytest.approx(float(torch.trace(Gd @ E @ H @ E.T)), rel=1e-5)  # V is float32
    blocks = torch.block_diag(*[S[a : a + 16, a : a + 16] for a in range(0, n, 16)])
    torch.testing.assert_close(S, blocks, rtol=0, atol=1e-5 * float(G.diagonal().max()))
    weights = along_columns(G, 2.0).weights.double()
    torch.testing.assert_close(weights, S.diagonal() / S.diagonal().mean(), rtol=1e-5, atol=0)
    white = torch.linalg.inv(V)
    assert promised == pytest.approx(float(torch.trace(white @ G @ white.T) / torch.trace(G)), rel=1e-6)


def test_output_metric_of_any_scale_or_none() -> None:
    """A multiple of G rounds alike, a zero G like none, the identity next to alike; other grids leave it out."""
    n, d = 40, 20
    G, H, X = correlated(n, 5), correlated(d, 7), torch.randn(n, d, generator=seeded(3), dtype=torch.float64)

    def rounded(G: torch.Tensor | None, grid: str = "trellis") -> torch.Tensor:
        return ldlq(X, 2.0, H, G=G, grid=grid, axis="tensor").dequantize(torch.float64)

    assert torch.equal(rounded(G), rounded(G * 4.0**20)) and not torch.equal(rounded(G), rounded(None))
    assert torch.equal(rounded(torch.zeros(n, n, dtype=torch.float64)), rounded(torch.eye(n, dtype=torch.float64)))
    for grid in ("uniform", "lattice", "normal_float"):
        assert torch.equal(rounded(G, grid), rounded(None, grid))
    assert gain_along_columns(torch.zeros(3, 3)) == 1.0
