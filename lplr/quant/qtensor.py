"""A packed matrix: points of a grid times a row scale and a column scale.

    X_ij = row_scale_i * v_ij * col_scale_j,      v the points of `kernels.levels` that the codes stand for

The first `narrow` columns may have the next lower width of the grid, with the step lengthened as `kernels.levels.narrower`
says: any fractional number of bits a column on average, from one scale a row.  A column of no bits is zero.

Scales are stored as bfloat16 and the codes are chosen for the *stored* scale, so its 8 significant bits cost no accuracy, and
reading them as float32 (or as float16, within its range) gives the same number; the points are exact in bfloat16 too, but for
normal_float: a cast never changes a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.kernels.levels import levels, narrower
from lplr.kernels.pack import pack

SCALE_DTYPE = torch.bfloat16
SCALE_BITS = 16
SCALE_MIN, SCALE_MAX = 2.0**-126, torch.finfo(torch.bfloat16).max


def round_scale(scale: Tensor, *, up: bool = False) -> Tensor:
    """The nearest storable scale (with `up`, the smallest one that is not below `scale`), as bfloat16.

    Scales are magnitudes in [SCALE_MIN, SCALE_MAX]; zero stays zero.
    """
    scale = scale.float()
    bounded = scale.clamp(SCALE_MIN, SCALE_MAX)
    rounded = bounded.to(SCALE_DTYPE)
    if up:
        low = rounded.float() < bounded
        rounded = torch.where(low, (bounded * (1 + 2.0**-8)).to(SCALE_DTYPE), rounded)
    rounded = rounded.float().clamp(max=SCALE_MAX).to(SCALE_DTYPE)
    return torch.where(scale == 0, torch.zeros_like(rounded), rounded)


@dataclass(frozen=True)
class QTensor:
    """A quantized matrix of `shape` (n, d).

    codes, narrow_codes: packed uint8 as in `kernels.levels.packed_shape` for the last d - narrow and the first `narrow`
    columns, narrow_codes None where that is nothing; row_scale: (n,) or (1,) or None; col_scale: (d,) or (1,) or None.  A missing
    scale is one.
    """

    codes: Tensor
    bits: float
    shape: tuple[int, int]
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    narrow_codes: Tensor | None = None
    narrow: int = 0
    grid: str = "uniform"

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        bits: int,
        row_scale: Tensor | None = None,
        col_scale: Tensor | None = None,
        *,
        narrow: int = 0,
        grid: str = "uniform",
    ) -> QTensor:
        """Pack unpacked codes (n, d) of a grid that is stored by rows, the first `narrow` columns with one bit less."""
        n, d = codes.shape
        lower = int(narrower(grid, bits)[0])
        fewer = pack(codes[:, :narrow], lower) if narrow and lower else None
        return cls(pack(codes[:, narrow:], bits), bits, (n, d), row_scale, col_scale, fewer, narrow, grid)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The points (n, d), in the first `narrow` columns times the longer step; without scales."""
        n, d = self.shape
        if not self.narrow:
            return levels(self.codes, (n, d), self.grid, self.bits, dtype)
        out = torch.zeros(self.shape, dtype=dtype, device=self.codes.device)
        out[:, self.narrow :] = levels(self.codes, (n, d - self.narrow), self.grid, self.bits, dtype)
        if self.narrow_codes is not None:
            lower, ratio = narrower(self.grid, self.bits)
            out[:, : self.narrow] = levels(self.narrow_codes, (n, self.narrow), self.grid, lower, dtype) * ratio
        return out

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (n, d) itself."""
        x = self.levels(dtype)
        if self.row_scale is not None:
            x *= self.row_scale.to(dtype)[:, None]
        if self.col_scale is not None:
            x *= self.col_scale.to(dtype)
        return x

    def zeroed(self) -> QTensor:
        """The same layout with every scale, and so every entry, zero."""
        row, col = (None if s is None else torch.zeros_like(s) for s in (self.row_scale, self.col_scale))
        return replace(self, row_scale=row, col_scale=col)

    def stored_bits(self) -> int:
        """Every stored bit: codes with their padding, and scales."""
        scales = sum(s.numel() for s in (self.row_scale, self.col_scale) if s is not None)
        codes = self.codes.numel() + (0 if self.narrow_codes is None else self.narrow_codes.numel())
        return 8 * codes + SCALE_BITS * scales
