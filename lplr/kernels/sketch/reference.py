"""A random sign sketch in plain torch: S is formed."""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.philox import words


def signs(d: int, m: int, seed: int, like: Tensor) -> Tensor:
    """sqrt(m) S (d, m): +-1."""
    bits = (words(seed, d, -(-m // 32), like.device)[:, :, None] >> torch.arange(32, device=like.device)) & 1
    return (1 - 2 * bits.view(d, -1)[:, :m]).to(like.dtype)


def sign_sketch(A: Tensor, m: int, seed: int) -> Tensor:
    """See `lplr.kernels.sketch.sign_sketch`."""
    return (A @ signs(A.shape[1], m, seed, A)) * m**-0.5
