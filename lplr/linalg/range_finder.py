"""The randomized range finder: Y whose columns nearly span the leading left singular vectors of A.

Source: Halko, Martinsson, Tropp, SIAM Review 2011, Algorithms 4.1 and 4.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.linalg.project import orth
from lplr.linalg.sketch import sketch


def range_finder(A: Tensor, m: int, kind: str, power_iterations: int, generator: torch.Generator) -> Tensor:
    """Y = (A A^T)^q A S (n x m) up to a change of basis: orthonormalised at each step, so nothing overflows.

    The columns come out equalised: with q > 0 they are mixed by a random rotation (d = A.shape[1], m <= min(n, d)),
    with q = 0 the sketch itself mixes them.
    """
    Y = sketch(A, m, kind, generator)
    for _ in range(power_iterations):
        Y = A @ orth(A.T @ orth(Y))
    if power_iterations:
        Y = Y @ random_rotation(m, Y, generator)
    return Y


def random_rotation(m: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (m x m), uniformly distributed, in the dtype and on the device of `like`."""
    G = torch.randn(m, m, generator=generator, device=like.device, dtype=like.dtype)
    Q, R = torch.linalg.qr(G)
    return Q * R.diagonal().sign()
