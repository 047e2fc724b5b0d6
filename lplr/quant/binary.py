"""Signs with a magnitude of rank one: X_ij ~ u_i sign(X_ij) v_j, u, v >= 0.

For fixed signs the squared error is || |X| - u v^T ||^2, least at the leading singular pair of |X|, whose entries are
nonnegative (Perron-Frobenius); power iterations find it.
Source: Xu et al., "OneBit", NeurIPS 2024, section 3.2 (sign-value-independent decomposition, SVID).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.quant.qtensor import QTensor, round_scale

ITERATIONS = 16


def sign_rank_one(X: Tensor, iterations: int = ITERATIONS) -> QTensor:
    """argmin ||X - sign(X) * u v^T||_F over u (n,), v (d,), stored with one bit an entry; zero counts as positive."""
    u, v = rank_one(X.abs(), iterations)
    return QTensor.from_codes((X >= 0).to(torch.uint8), 1, round_scale(u), round_scale(v))


def rank_one(P: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """u (n,), v (d,) >= 0 near the minimum of ||P - u v^T||_F for P (n x d) >= 0; the norm is split evenly between them.

    v = P^T u / ||u||^2 is exact for the u that was found, whatever the number of iterations.
    """
    largest = P.amax()
    if not float(largest) > 0:
        return P.new_zeros(P.shape[0]), P.new_zeros(P.shape[1])
    P = P / largest
    v = P.mean(0)
    u = v.new_zeros(P.shape[0])
    for _ in range(max(1, iterations)):
        u = P @ (v / torch.linalg.vector_norm(v))
        u = u / torch.linalg.vector_norm(u)
        v = P.T @ u
    root = torch.linalg.vector_norm(v).sqrt()
    half = largest.sqrt()
    return u * (root * half), v / root * half
