"""The Triton product with packed matrices against the torch one in float64: grids, widths, types, odd shapes, narrow columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lplr.kernels.levels import BY_COLUMN, WIDTHS, narrower, nearest
from lplr.kernels.matmul import gpu, reference
from lplr.kernels.pack import pack

GRIDS = [(grid, bits) for grid, widths in WIDTHS.items() for bits in widths]
# (n, d, tokens): rows of bytes that 16, 4 and 1 divide, one token, a tile, several tiles, many parts, a prompt
SHAPES = [(37, 150, 1), (256, 1024, 1), (5, 1100, 1), (130, 257, 35), (130, 257, 65)]


def codes_of(n: int, d: int, grid: str, bits: float, generator: torch.Generator) -> Tensor:
    if grid in BY_COLUMN:
        return nearest(torch.randn(d, n, generator=generator), grid, bits)[0]
    return pack(torch.randint(0, 1 << int(bits), (n, d), generator=generator, dtype=torch.uint8), int(bits))


def check(y: Tensor, x: Tensor, *args) -> None:
    """Against float64 of the same x, entry by entry.

    |y - want| <= r |want| + t size,    size = ||x * col|| ||points of the row|| |row scale| >= sum of the terms' magnitudes

    r: one rounding to x's type, doubled since the interpreter cuts off.  t: what rounds the terms; a tile in bfloat16 has x * col
    and NormalFloat points rounded, 2^-7 each; else float32 sums of up to 5000 terms, and float32 as three bfloat16 numbers:
    2^-20; in float16, and for NormalFloat points, as two of them: 2^-14.
    """
    cpu = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    want = reference.matmul(x.cpu().double(), *cpu)
    assert y.dtype == x.dtype and y.shape == want.shape and y.isfinite().all()
    codes, n, grid, row, col, narrow_codes, narrow = cpu
    points = reference.points(codes, (n, x.shape[-1]), grid, narrow_codes, narrow, torch.float64)
    terms = x.cpu().double() * (1 if col is None else col.double())
    size = terms.norm(dim=-1, keepdim=True) * points.norm(dim=1) * (1 if row is None else row.double())
    r = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[x.dtype]
    t = 2.0**-6 if x.dtype == torch.bfloat16 else 2.0**-14 if x.dtype == torch.float16 or grid[0] == "normal_float" else 2.0**-20
    assert ((y.cpu().double() - want).abs() <= r * want.abs() + t * size).all()


@pytest.mark.parametrize("n, d, tokens", SHAPES)
@pytest.mark.parametrize("grid, bits", GRIDS)
def test_all_grids_and_widths(grid: str, bits: float, n: int, d: int, tokens: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(n + d)
    codes = codes_of(n, d, grid, bits, generator).to(device)
    x = torch.randn(tokens, d, generator=generator).to(device)
    row, col = (torch.rand(size, generator=generator).bfloat16().to(device) for size in (n, d))
    args = (codes, n, (grid, bits), row, col, None, 0)
    check(gpu.matmul(x, *args), x, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 17, 66])
def test_types_and_scales(dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(tokens)
    n, d = 40, 141
    for grid, bits in (("uniform", 3.0), ("normal_float", 4.0), ("lattice", 3.0), ("trellis", 1.5)):
        codes = codes_of(n, d, grid, bits, generator).to(device)
        # neither contiguous nor aligned
        x = torch.randn(d + 1, tokens, generator=generator).T[:, 1:].to(device, dtype)
        for rows, cols in ((n, d), (1, 1), (0, d), (n, 0)):
            row, col = (torch.rand(k, generator=generator).bfloat16().to(device) if k else None for k in (rows, cols))
            args = (codes, n, (grid, bits), row, col, None, 0)
            check(gpu.matmul(x, *args), x, *args)


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("grid, bits", GRIDS)
def test_narrow_columns(grid: str, bits: float, tokens: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    n, d, narrow = 24, 240, 101
    lower, _ = narrower(grid, bits)
    codes = codes_of(n, d - narrow, grid, bits, generator).to(device)
    fewer = codes_of(n, narrow, grid, lower, generator).to(device) if lower else None
    x = torch.randn(tokens, d, generator=generator).to(device)
    row, col = (torch.rand(size, generator=generator).bfloat16().to(device) for size in (n, d))
    args = (codes, n, (grid, bits), row, col, fewer, narrow)
    check(gpu.matmul(x, *args), x, *args)


def test_leading_sizes_are_kept(device: torch.device) -> None:
    codes = codes_of(9, 33, "uniform", 1, torch.Generator().manual_seed(0)).to(device)
    for lead in ((), (2, 3), (4, 0, 2)):
        x = torch.ones(*lead, 33, device=device)
        assert gpu.matmul(x, codes, 9, ("uniform", 1.0), None, None, None, 0).shape == (*lead, 9)


def test_the_start_of_a_trellis_is_its_history() -> None:
    for bits in WIDTHS["trellis"]:
        code = gpu.trellis.code(bits)
        state, word = 0, gpu.history(bits)
        reach = -(-12 // code.step_bits)
        for i in range(reach):
            state = (state << code.step_bits) | ((word >> (32 - code.step_bits * (reach - i))) & ((1 << code.step_bits) - 1))
        assert state & 0xFFF == code.start


def test_a_prompt_meets_the_points_of_some_rows_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 50, generator=generator).to(device)
    row = torch.rand(300, generator=generator).bfloat16().to(device)
    for grid, bits in (("uniform", 3.0), ("normal_float", 2.0), ("lattice", 3.0), ("trellis", 2.5)):
        codes = codes_of(300, 50, grid, bits, generator).to(device)
        args = (codes, 300, (grid, bits), row, None, None, 0)
        monkeypatch.setattr(gpu, "AT_ONCE", 1 << 24)
        whole = gpu.matmul(x, *args)
        monkeypatch.setattr(gpu, "AT_ONCE", 1)
        check(gpu.matmul(x, *args), x, *args)
        check(whole, x, *args)


def test_the_same_numbers_every_time(device: torch.device) -> None:
    codes = codes_of(64, 5000, "uniform", 2, torch.Generator().manual_seed(0)).to(device)
    x = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)).to(device)
    first, second = (gpu.matmul(x, codes, 64, ("uniform", 2.0), None, None, None, 0) for _ in range(2))
    assert torch.equal(first, second)
