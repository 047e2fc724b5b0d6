"""The orthonormal Walsh-Hadamard transform of the last axis in plain torch, and random signs."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 1 << 20  # entries transformed at once: what two small matrix products touch stays in the cache


def hadamard(x: Tensor) -> Tensor:
    """x H with H the orthonormal Hadamard matrix (Sylvester order) of size p = x.shape[-1], a power of two: (..., p) -> (..., p).

    H is symmetric and H H = I, so the transform is its own inverse.  Raises ValueError on any other size.
    """
    p = x.shape[-1]
    if p < 1 or p & (p - 1):
        raise ValueError(f"the last axis has {p} entries: a power of two is expected, pad it with zeros")
    lead, low = x.shape[:-1], (p.bit_length() - 1) // 2
    inner = (_matrix(low) * p**-0.5).to(x.device, x.dtype)  # H_p = H_outer (x) H_inner: two small products, not log2(p) passes
    outer = _matrix(p.bit_length() - 1 - low).to(x.device, x.dtype)

    def transform(rows: Tensor) -> Tensor:
        return torch.matmul(outer, (rows.reshape(-1, len(inner)) @ inner).view(-1, len(outer), len(inner))).view(-1, p)

    flat = x.reshape(-1, p)
    if flat.numel() <= AT_ONCE:
        return transform(flat).view(*lead, p)
    return torch.cat([transform(rows) for rows in flat.split(max(1, AT_ONCE // p))]).view(*lead, p)


@lru_cache(maxsize=8)
def _matrix(bits: int) -> Tensor:
    """The Hadamard matrix of size 2^bits, entries +-1, float64."""
    with torch.inference_mode(False):  # it outlives the mode of its first caller
        H = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        for _ in range(bits):
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        return H


@lru_cache(maxsize=64)
def rotation_signs(seed: int, d: int) -> Tensor:
    """Two rows of d signs, int8, on the CPU: the bits of SHAKE-256 of the seed, the same on every machine for ever."""
    raw = hashlib.shake_256(f"lplr rotation {seed} {d}".encode()).digest(2 * d)
    with torch.inference_mode(False):
        return torch.from_numpy((np.frombuffer(raw, dtype=np.uint8) & 1).astype(np.int8) * 2 - 1).view(2, d)
