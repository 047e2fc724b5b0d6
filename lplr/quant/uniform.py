"""Rounding without feedback, and scales: the uniform grid of 2^B equally spaced points (2c - (2^B - 1)) s on [-range, range].

range = (2^B - 1) s.  Every other grid of `kernels.levels` is rounded to its nearest points, with its scale for a normal variable.

Rounding is to the nearest point, or *stochastic*: up with the probability that makes it unbiased inside the range
(the same law as subtracting nothing after a uniform dither), with variance at most s^2 = (range / (2^B - 1))^2.
Ranges: one for the matrix, one a row, one a column, or a product of both, from the largest magnitude (`max`) or of
least mean squared error (`mse`).

Sources: Saha, Srivastava, Pilanci, NeurIPS 2023, section 2 (quantizer); Max, IRE Trans. Inf. Theory 1960 (the
optimal steps for a normal variable, where the search for the least error starts).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lplr.errors import RecipeError
from lplr.kernels.levels import BY_COLUMN, nearest, normal_step
from lplr.kernels.pack import pack
from lplr.quant.qtensor import QTensor, round_scale

Axis = Literal["tensor", "row", "column", "both"]

SAMPLE = 512  # entries of a row that the search for its best scale looks at
# half the optimal step of a 2^B-point uniform quantizer for N(0, 1) (Max 1960, table II; 7 and 8 bits computed alike)
NORMAL_SCALE = {1: 0.7979, 2: 0.4978, 3: 0.2930, 4: 0.1676, 5: 0.0941, 6: 0.0520, 7: 0.0285, 8: 0.0154}


def quantize(
    x: Tensor,
    bits: float,
    *,
    axis: Axis = "row",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    clip: Literal["max", "mse"] = "mse",
    grid: str = "uniform",
    generator: torch.Generator | None = None,
) -> QTensor:
    """Quantize x (n x d) to `bits` bits; a stochastic rounding draws from `generator`.

    Raises RecipeError on stochastic rounding to another than the uniform grid.
    """
    row_scale, col_scale = scales(x, bits, axis=axis, clip=clip, grid=grid)
    if grid == "uniform":
        codes = round_to_grid(x, int(bits), row_scale, col_scale, generator if rounding == "stochastic" else None)
        return QTensor.from_codes(codes, int(bits), row_scale, col_scale)
    if rounding == "stochastic":
        raise RecipeError(f"stochastic rounding needs the uniform grid, not {grid}: choose one of the two")
    for scale, dim in ((row_scale, 1), (col_scale, 0)):
        x = x if scale is None else x * _inverse(scale, x.dtype).unsqueeze(dim)
    codes, _ = nearest(x.T.contiguous(), grid, bits)
    codes = codes if grid in BY_COLUMN else pack(codes.T.contiguous(), int(bits))
    return QTensor(codes, bits, (x.shape[0], x.shape[1]), row_scale, col_scale, grid=grid)


def scales(
    x: Tensor, bits: float, *, axis: Axis, clip: Literal["max", "mse"], grid: str = "uniform"
) -> tuple[Tensor | None, Tensor | None]:
    """The storable row and column scales that `axis` and `clip` ask for; another grid gets its scale for a normal variable."""
    if axis == "both":
        # columns first, by their root mean square; the rows then carry the grid's range
        col = round_scale(_rms(x, 0))
        safe = torch.where(col == 0, torch.ones_like(col), col)
        row, _ = scales(x / safe.float(), bits, axis="row", clip=clip, grid=grid)
        return row, col
    if axis == "column":
        return None, scales(x.T, bits, axis="row", clip=clip, grid=grid)[0]
    rows = x.reshape(1, -1) if axis == "tensor" else x
    if grid != "uniform":
        return round_scale(_rms(rows, 1) * normal_step(grid, bits)), None
    bits = int(bits)
    if clip == "max":
        return round_scale(rows.abs().amax(1) / ((1 << bits) - 1), up=True), None
    return _least_error_scale(rows, bits), None


def _rms(x: Tensor, dim: int) -> Tensor:
    rms = torch.linalg.vector_norm(x, dim=dim) * x.shape[dim] ** -0.5
    if bool(((rms < 1e-18) | (rms > 1e18)).any()):
        # squares of float32 entries below 1e-22 or above 1e19 leave the range of float32
        rms = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64) * x.shape[dim] ** -0.5
    return rms


def _least_error_scale(rows: Tensor, bits: int, rounds: int = 2) -> Tensor:
    """Scales (n,) near the least squared error of each row: Max's for a normal row, then Lloyd's step on the scale.

    For fixed levels v the best scale is <x, v> / <v, v>; for a fixed scale the best levels are the nearest.  Lloyd's
    steps see about SAMPLE entries of a longer row: the error is flat around the best scale.
    """
    if bits == 1:
        return round_scale(rows.abs().mean(1))
    scale = _rms(rows, 1) * NORMAL_SCALE[bits]
    sample = rows[:, :: max(1, rows.shape[1] // SAMPLE)].contiguous()
    for _ in range(rounds):
        levels = _levels(round_to_grid(sample, bits, scale, None, None), bits, rows.dtype)
        weight = torch.linalg.vecdot(levels, levels)  # never zero: levels are odd
        # a sample that misses what is large in its row must not shrink the scale to nothing
        scale = torch.maximum(torch.linalg.vecdot(sample, levels) / weight, 0.5 * scale)
    return round_scale(scale)


def _levels(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_(2).sub_((1 << bits) - 1)


def round_to_grid(
    x: Tensor, bits: int, row_scale: Tensor | None, col_scale: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Codes (n x d), uint8, of the grid points that x is rounded to: nearest, or stochastic with a generator.

    Where a scale is zero the value is zero whatever the code.
    """
    top = (1 << bits) - 1
    inverses = [0.5 * _inverse(s, x.dtype).unsqueeze(dim) for s, dim in ((row_scale, 1), (col_scale, 0)) if s is not None]
    if len(inverses) == 2:
        x, inverses = x * inverses[0], [2 * inverses[1]]
    # code = x / (2 scale) + top / 2
    t = torch.addcmul(x.new_full((), top / 2), x, inverses[0] if inverses else x.new_full((), 0.5))
    if generator is None:
        t.round_()
    else:
        t.add_(torch.rand(t.shape, generator=generator, device=t.device, dtype=t.dtype)).floor_()
    return t.clamp_(0, top).to(torch.uint8)


def _inverse(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / scale, zero where that is not finite."""
    inverse = scale.to(dtype).reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))
