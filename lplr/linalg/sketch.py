"""Random sketches Y = A S of a matrix A (n x d) with S (d x m), scaled so that E[S S^T] = I.

    gaussian   S_ij ~ N(0, 1/m)                                       O(n d m)
    srht       S = sqrt(p/m) D H P: random signs, Hadamard, m columns of p = 2^ceil(log2 d)    O(n p log p)
    sparse     `sparsity` entries +-1/sqrt(sparsity) in each row of S (sparse Johnson-Lindenstrauss)   O(n d)

Sources: Saha, Srivastava, Pilanci, NeurIPS 2023 (Algorithm 1, gaussian and sparse); Tropp, Adv. Adapt.
Data Anal. 2011 (SRHT); Kane, Nelson, J. ACM 2014 (sparse).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.errors import choose
from lplr.kernels.hadamard import hadamard

SPARSITY = 8  # entries a row of the sparse sketch


def gaussian(A: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """A S with independent normal entries of variance 1/m."""
    S = torch.randn(A.shape[1], m, generator=generator, device=A.device, dtype=A.dtype)
    return (A @ S).mul_(m**-0.5)


def srht(A: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """A S with the subsampled randomized Hadamard transform; columns are drawn without replacement while they last."""
    n, d = A.shape
    p = 1 << max(d - 1, 0).bit_length()
    signs = _signs((d,), A, generator)
    padded = torch.zeros(n, p, dtype=A.dtype, device=A.device)
    padded[:, :d] = A * signs
    rounds = -(-m // p)
    order = torch.cat([torch.randperm(p, generator=generator, device=A.device) for _ in range(rounds)])
    return hadamard(padded)[:, order[:m]].mul_((p / m) ** 0.5)


def sparse(A: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """A S with min(SPARSITY, m) entries in each row of S, one in each of as many blocks of columns."""
    n, d = A.shape
    entries = min(SPARSITY, m)
    edges = [m * t // entries for t in range(entries + 1)]
    out = torch.zeros(n, m, dtype=A.dtype, device=A.device)
    for low, high in zip(edges, edges[1:], strict=False):
        columns = torch.randint(low, high, (d,), generator=generator, device=A.device)
        out.index_add_(1, columns, A * _signs((d,), A, generator))
    return out.mul_(entries**-0.5)


SKETCHES = {"gaussian": gaussian, "srht": srht, "sparse": sparse}


def sketch(A: Tensor, m: int, kind: str, generator: torch.Generator) -> Tensor:
    """Y = A S (n x m) with a sketch of the table SKETCHES."""
    return choose(SKETCHES, kind, "sketch")(A, m, generator)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    coins = torch.randint(0, 2, shape, generator=generator, device=like.device)
    return coins.to(like.dtype).mul_(2).sub_(1)
