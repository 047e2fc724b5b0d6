"""A packed matrix: integer levels times a row scale and a column scale.

    X_ij = row_scale_i * (2 c_ij - (2^B - 1)) * col_scale_j,      c_ij in {0, .., 2^B - 1}

The first `narrow` columns may carry one bit less, with the step lengthened by NARROW_RATIO: any fractional number of bits
a column on average, from one scale a row.  A column of no bits is zero.

Levels are the odd integers -(2^B - 1), .., 2^B - 1, exact in every float type.  Scales are stored as
bfloat16 and the codes are chosen for the *stored* scale, so its 8 significant bits cost no accuracy, and reading
them as float32 (or as float16, within its range) gives the same number: a cast never changes a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lplr.kernels.lowrank import NARROW_RATIO
from lplr.kernels.pack import pack, unpack

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

    codes: packed uint8 (n, ceil((d - narrow) * bits / 8)); narrow_codes: (n, ceil(narrow * (bits - 1) / 8)), None where that
    is nothing; row_scale: (n,) or (1,) or None; col_scale: (d,) or (1,) or None.  A missing scale is one.
    """

    codes: Tensor
    bits: int
    shape: tuple[int, int]
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    narrow_codes: Tensor | None = None
    narrow: int = 0

    @classmethod
    def from_codes(
        cls, codes: Tensor, bits: int, row_scale: Tensor | None = None, col_scale: Tensor | None = None, *, narrow: int = 0
    ) -> QTensor:
        """Pack unpacked codes (n, d), the first `narrow` columns with one bit less."""
        n, d = codes.shape
        fewer = pack(codes[:, :narrow], bits - 1) if narrow and bits > 1 else None
        return cls(pack(codes[:, narrow:], bits), bits, (n, d), row_scale, col_scale, fewer, narrow)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The odd integer levels (n, d), in the first `narrow` columns times NARROW_RATIO; without scales."""
        d = self.shape[1]
        if not self.narrow:
            return _odd(self.codes, self.bits, d, dtype)
        out = torch.zeros(self.shape, dtype=dtype, device=self.codes.device)
        out[:, self.narrow :] = _odd(self.codes, self.bits, d - self.narrow, dtype)
        if self.narrow_codes is not None:
            out[:, : self.narrow] = _odd(self.narrow_codes, self.bits - 1, self.narrow, dtype) * NARROW_RATIO[self.bits]
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
        """Every stored bit: codes with their row padding, and scales."""
        scales = sum(s.numel() for s in (self.row_scale, self.col_scale) if s is not None)
        codes = self.codes.numel() + (0 if self.narrow_codes is None else self.narrow_codes.numel())
        return 8 * codes + SCALE_BITS * scales


def _odd(codes: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    return unpack(codes, bits, columns).to(dtype).mul_(2).sub_((1 << bits) - 1)
