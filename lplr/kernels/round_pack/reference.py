"""Rounding to the uniform grid and packing in plain torch."""

from __future__ import annotations

from torch import Tensor

from lplr.kernels.pack import pack
from lplr.kernels.philox import words


def round_and_pack(X: Tensor, bits: int, row: Tensor, col: Tensor, seed: int | None) -> Tensor:
    """See `lplr.kernels.round_pack.round_and_pack`."""
    top = (1 << bits) - 1
    t = X * row[:, None] * col + top / 2
    u = 0.5 if seed is None else (words(seed, len(X), X.shape[1], X.device) >> 8).float() * 2.0**-24
    return pack((t + u).floor_().clamp_(0, top).byte(), bits)
