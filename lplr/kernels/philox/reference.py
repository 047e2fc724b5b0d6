"""Philox-4x32-10 in plain torch: 32 random bits for each (row, column) of a matrix.

Ten rounds of two 32-bit multiplications of the counter (column, row, 0, 0) under the key (seed mod 2^32, seed / 2^32); the first
of the four words that come out.  Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = (1 << 32) - 1
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85


def words(seed: int, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """The words (rows, columns), int64 below 2^32, of a seed below 2^63."""
    c0 = torch.arange(columns, device=device).expand(rows, columns)
    c1 = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & LOW, seed >> 32
    for _ in range(10):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high2, low2 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product of 32-bit numbers."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b  # below 2^48
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & LOW
