"""The orthonormal Walsh-Hadamard transform of the last axis (Sylvester order), in log2(p) passes."""

from __future__ import annotations

from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x H with H the orthonormal Hadamard matrix of size p = x.shape[-1], a power of two: (..., p) -> (..., p).

    H is symmetric and H H = I, so the transform is its own inverse.  Raises ValueError on any other size.
    """
    p = x.shape[-1]
    if p < 1 or p & (p - 1):
        raise ValueError(f"the last axis has {p} entries: a power of two is expected, pad it with zeros")
    lead = x.shape[:-1]
    half = 1
    while half < p:
        pairs = x.reshape(*lead, p // (2 * half), 2, half)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        x = pairs.new_empty(pairs.shape)
        x[..., 0, :] = even + odd
        x[..., 1, :] = even - odd
        half *= 2
    return x.reshape(*lead, p) * p**-0.5
