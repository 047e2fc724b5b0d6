"""The two baselines that compute a full singular value decomposition A C = U Sigma V^T.

    lplr_svd     Z = U_k Sigma_k^(1/2) O with a random rotation O;   L = Q(Z),  R = Q'(argmin_X ||L X - A||_F)
    direct_svd   L = Q(U_k),  R = Q'(U_k^T A) = Q'(Sigma_k V_k^T C^-1):  rounded independently, nothing is solved again

Source: Saha, Srivastava, Pilanci, NeurIPS 2023, section 4 ("LPLR-SVD" and "direct SVD"); there Z = U_k Sigma_k.  The square
root halves the spread of the columns between the factors, which came out better at 2 bits on a
4096 x 4096 matrix with spectrum i^(-1/2) (the only case that was compared).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.factor.alternating import project, quantize_l, quantize_r
from lplr.factor.factorization import Factorization
from lplr.linalg.range_finder import random_rotation
from lplr.recipe import FactorSpec


def lplr_svd(A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> Factorization:
    """A (n x d) ~ L R with the exact leading subspace; O(n d min(n, d))."""
    U, s, _ = torch.linalg.svd(A if C is None else A @ C, full_matrices=False)
    assert spec.rank
    Z = (U[:, : spec.rank] * s[: spec.rank].sqrt()) @ random_rotation(spec.rank, A, generator)
    return project(A, Z, spec, C, generator)


def direct_svd(A: Tensor, spec: FactorSpec, C: Tensor | None, generator: torch.Generator) -> Factorization:
    """A (n x d) ~ L R, each factor of the truncated decomposition rounded on its own."""
    U, _, _ = torch.linalg.svd(A if C is None else A @ C, full_matrices=False)
    assert spec.rank and spec.l and spec.r
    U = U[:, : spec.rank].contiguous()
    l, left_out = quantize_l(U, spec.l, generator)
    return Factorization(l, quantize_r(left_out[:, None] * (U.T @ A), spec.r, generator))
