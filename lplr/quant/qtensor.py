"""A packed matrix: integer levels times a row scale and a column scale.

    X_ij = row_scale_i * (2 c_ij - (2^B - 1)) * col_scale_j,      c_ij in {0, .., 2^B - 1}

Levels are the odd integers -(2^B - 1), .., 2^B - 1, exact in every float type.  Scales are stored as
bfloat16 and the codes are chosen for the *stored* scale, so its 8 significant bits cost no accuracy, and reading
them as float32 (or as float16, within its range) gives the same number: a cast never changes a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    codes: packed uint8, (n, ceil(d * bits / 8)); row_scale: (n,) or (1,) or None;
    col_scale: (d,) or (1,) or None.  A missing scale is one.
    """

    codes: Tensor
    bits: int
    shape: tuple[int, int]
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None

    @classmethod
    def from_codes(
        cls, codes: Tensor, bits: int, row_scale: Tensor | None = None, col_scale: Tensor | None = None
    ) -> QTensor:
        """Pack unpacked codes (n, d)."""
        return cls(pack(codes, bits), bits, (codes.shape[0], codes.shape[1]), row_scale, col_scale)

    def levels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The odd integer levels (n, d), without scales."""
        codes = unpack(self.codes, self.bits, self.shape[1]).to(dtype)
        return codes.mul_(2).sub_((1 << self.bits) - 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (n, d) itself."""
        x = self.levels(dtype)
        if self.row_scale is not None:
            x *= self.row_scale.to(dtype)[:, None]
        if self.col_scale is not None:
            x *= self.col_scale.to(dtype)
        return x

    def stored_bits(self) -> int:
        """Every stored bit: codes with their row padding, and scales."""
        scales = [s.numel() for s in (self.row_scale, self.col_scale) if s is not None]
        return 8 * self.codes.numel() + SCALE_BITS * sum(scales)
