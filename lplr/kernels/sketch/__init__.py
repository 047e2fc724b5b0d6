"""Y = A S for a random matrix S of signs that is never stored."""

from __future__ import annotations

from torch import Tensor

from lplr.kernels.backend import form
from lplr.kernels.sketch import reference

__all__ = ["sign_sketch"]


def sign_sketch(A: Tensor, m: int, seed: int) -> Tensor:
    """A S (n, m) for A (n, d), S_ij = +-1 / sqrt(m) from bit j mod 32 of the word (i, j / 32) of `kernels.philox`: E[S S^T] = I.

    float32, bfloat16 or float16, in A's type; the GPU form has S in registers only, and sums in float32.
    """
    return form("sketch", reference, A).sign_sketch(A, m, seed)
