"""The uniform grid: 2^B equally spaced points (2c - (2^B - 1)) s on [-range, range], range = (2^B - 1) s.

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

from lplr.quant.qtensor import QTensor, round_scale

Axis = Literal["tensor", "row", "column", "both"]

# half the optimal step of a 2^B-point uniform quantizer for N(0, 1) (Max 1960, table II; 7 and 8 bits computed alike)
NORMAL_SCALE = {1: 0.7979, 2: 0.4978, 3: 0.2930, 4: 0.1676, 5: 0.0941, 6: 0.0520, 7: 0.0285, 8: 0.0154}


def quantize(
    x: Tensor,
    bits: int,
    *,
    axis: Axis = "row",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    clip: Literal["max", "mse"] = "mse",
    generator: torch.Generator | None = None,
) -> QTensor:
    """Quantize x (n x d) to `bits` bits; a stochastic rounding draws from `generator`."""
    row_scale, col_scale = scales(x, bits, axis=axis, clip=clip)
    codes = round_to_grid(x, bits, row_scale, col_scale, generator if rounding == "stochastic" else None)
    return QTensor.from_codes(codes, bits, row_scale, col_scale)


def scales(x: Tensor, bits: int, *, axis: Axis, clip: Literal["max", "mse"]) -> tuple[Tensor | None, Tensor | None]:
    """The storable row and column scales of the grid that `axis` and `clip` ask for."""
    if axis == "both":
        # columns first, by their root mean square; the rows then carry the grid's range
        col = round_scale(_rms(x, 0))
        safe = torch.where(col == 0, torch.ones_like(col), col)
        row, _ = scales(x / safe.float(), bits, axis="row", clip=clip)
        return row, col
    if axis == "column":
        return None, scales(x.T, bits, axis="row", clip=clip)[0]
    rows = x.reshape(1, -1) if axis == "tensor" else x
    if clip == "max":
        return round_scale(rows.abs().amax(1) / ((1 << bits) - 1), up=True), None
    return _least_error_scale(rows, bits), None


def _rms(x: Tensor, dim: int) -> Tensor:
    # in float64: squares of float32 entries below 1e-22 or above 1e19 leave the range of float32
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64) * x.shape[dim] ** -0.5


def _least_error_scale(rows: Tensor, bits: int, rounds: int = 2) -> Tensor:
    """Scales (n,) near the least squared error of each row: Max's for a normal row, then Lloyd's step on the scale.

    For fixed levels v the best scale is <x, v> / <v, v>; for a fixed scale the best levels are the nearest.
    """
    scale = _rms(rows, 1) * NORMAL_SCALE[bits]
    for _ in range(rounds if bits > 1 else 0):
        levels = _levels(round_to_grid(rows, bits, scale, None, None), bits, rows.dtype)
        inner = torch.linalg.vecdot(rows, levels)
        scale = inner / torch.linalg.vecdot(levels, levels)
    if bits == 1:
        scale = rows.abs().mean(1)
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
    t = x
    for scale, dim in ((row_scale, 1), (col_scale, 0)):
        if scale is not None:
            inverse = torch.where(scale == 0, torch.zeros_like(scale), scale).to(x.dtype).reciprocal()
            inverse = torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))
            t = t * inverse.unsqueeze(dim)
    t = t.add(top) if t is x else t.add_(top)
    t.mul_(0.5)
    if generator is None:
        t.round_()
    else:
        t.add_(torch.rand(t.shape, generator=generator, device=t.device, dtype=t.dtype)).floor_()
    return t.clamp_(0, top).to(torch.uint8)
