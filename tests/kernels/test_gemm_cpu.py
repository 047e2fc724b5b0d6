"""Products of many tokens of bfloat16 on the CPU, by panels or by tiles, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("numba")
from kernels.test_lowrank_cpu import BOUND, GRIDS, distance, inputs, layer, reference  # noqa: E402

from lplr.kernels.hadamard import rotate, rotation_signs  # noqa: E402
from lplr.kernels.lowrank import cpu, gemm, rotation, sharing  # noqa: E402

HALF = torch.bfloat16
# Of the norm: x times the column scale, what is between two factors and the result are rounded by 2^-9 at most each.
NEAR = 2 * BOUND[HALF]
EXACT = [grid for grid in GRIDS if grid[0] != "normal_float"]  # points that bfloat16 holds


@pytest.fixture(params=["panels", "tiles of bfloat16", "tiles of float32", "AMX"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Panels for any number of tokens, or a processor without their instruction, or one that has better."""
    if request.param == "panels":
        if not gemm.AVAILABLE:
            pytest.skip("this processor does not multiply bfloat16 numbers")
        monkeypatch.setattr(cpu, "FEW_HALVES", dict.fromkeys(cpu.FEW_HALVES, 0))
    else:
        monkeypatch.setattr(gemm, "AVAILABLE", False)
        monkeypatch.setattr(gemm, "in_torch", lambda: request.param != "tiles of float32")
    monkeypatch.setattr(gemm, "AMX", request.param == "AMX")
    monkeypatch.setattr(cpu, "MANY_AMX", 1)
    monkeypatch.setattr(cpu, "AT_ONCE_HALVES", 1 << 14)
    monkeypatch.setattr(sharing, "WORTH", 1)
    yield request.param


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 33), (70, 1), (133, 97), (300, 1100)])
def test_every_grid(grid: tuple[str, float], n: int, d: int, way: str) -> None:
    for arguments in (layer(n, d, grid), layer(n, d, grid, rank=71, narrow=d // 3, rotated=True)):
        for tokens in (5, 17, 100):
            x = inputs(tokens, d).to(HALF)
            y = cpu.lowrank_linear(x, **arguments)
            assert y.dtype == HALF and y.shape == (tokens, n)
            # few numbers, and sums that cancel, may be further off than the norm of many
            assert distance(y, reference.lowrank_linear(x.double(), **arguments)) <= (1 if n > 1 and d > 1 else 20) * NEAR


@pytest.mark.parametrize("grid", EXACT, ids=str)
@pytest.mark.skipif(not gemm.AVAILABLE, reason="this processor does not multiply bfloat16 numbers")
def test_points_are_exact(grid: tuple[str, float]) -> None:
    """One activation of 1 a token, no scales: every point as it is."""
    n, d = 150, 40
    arguments = {k: v for k, v in layer(n, d, grid).items() if not k.endswith("scale")}
    y = cpu.lowrank_linear(torch.eye(d).to(HALF), **arguments)
    assert torch.equal(y.double(), reference.lowrank_linear(torch.eye(d, dtype=torch.float64), **arguments))


@pytest.mark.parametrize("grid", [("uniform", 1.0), ("uniform", 6.0), ("trellis", 1.0), ("lattice", 3.0)], ids=str)
def test_not_finite_huge_and_zero(grid: tuple[str, float], way: str) -> None:
    arguments = layer(70, 130, grid)
    arguments["q_row_scale"][3] = 0
    arguments["q_col_scale"][5] = 0
    for size in (1e-30, 1e30):
        x = (inputs(40, 130) * size).to(HALF)
        x[0, 0] *= 1e3
        y = cpu.lowrank_linear(x, **arguments)
        assert not y[:, 3].any() and distance(y, reference.lowrank_linear(x.double(), **arguments)) <= NEAR
    assert not cpu.lowrank_linear(torch.zeros(40, 130, dtype=HALF), **arguments).any()
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = inputs(40, 130).to(HALF)
        x[1, 7] = bad
        y, want = cpu.lowrank_linear(x, **arguments), reference.lowrank_linear(x.float(), **arguments)
        assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
        rest = [t for t in range(40) if t != 1]
        assert distance(y[rest], want[rest].double()) <= NEAR


@pytest.mark.parametrize("grid", [("uniform", 2.0), ("trellis", 2.0)], ids=str)
def test_strides_threads_and_many_tokens(grid: tuple[str, float], way: str) -> None:
    arguments = layer(260, 70, grid, rank=66, rotated=True)
    x = inputs(2, 600, 70).to(HALF)
    y = cpu.lowrank_linear(x, **arguments)
    assert distance(y, reference.lowrank_linear(x.double(), **arguments)) <= NEAR
    strided = x.new_zeros(2, 600, 140)[..., ::2].copy_(x)
    assert torch.equal(cpu.lowrank_linear(strided, **arguments), y)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        again = cpu.lowrank_linear(x, **arguments)
    finally:
        torch.set_num_threads(before)
    if way == "panels":  # torch may share a sum between threads
        assert torch.equal(again, y)


@pytest.mark.skipif(not gemm.AVAILABLE, reason="this processor does not multiply bfloat16 numbers")
@pytest.mark.parametrize("grid", [("uniform", 2.0), ("trellis", 1.0)], ids=str)
def test_threads_do_not_share_panels(grid: tuple[str, float]) -> None:
    """What a product holds is its own until it ends: at first it was freed before, and next taken by another thread."""
    arguments = layer(700, 300, grid)
    xs = [inputs(30, 300, seed=s).to(HALF) for s in range(4)]
    want = [cpu.lowrank_linear(x, **arguments) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(30):
            found = list(pool.map(lambda x: cpu.lowrank_linear(x, **arguments), xs))
            assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("d", [1, 2, 48, 64, 65, 128, 576, 1000, 1024, 2048, 4096, 11008])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation(d: int, inverse: bool) -> None:
    x, signs = inputs(3, d), rotation_signs(4, d)
    want = rotate(x.double(), signs, inverse=inverse)
    found = x.clone()
    rotation.rotate(found.numpy(), signs.float().numpy(), inverse)
    assert distance(found, want) < 1e-6  # at most 28 roundings of float32, as often up as down
