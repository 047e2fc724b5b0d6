"""Gates: hyperplanes that say which samples a neuron sees, D_ji = 1(x_j g_i + o_i > 0).

A programme with P sampled gates is a restriction of the one with all patterns; its optimum is at least as large.  Gaussian gates
draw a pattern with the probability of its cone; gates from data separate two samples, half way between them, so that they cut
where the samples are.
Source: Pilanci, Ergen, ICML 2020, remark 3.3 (sampling); strict inequality as in pyscnn, so a sample at zero sees no gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gates:
    """vectors (d, P) and offsets (P,)."""

    vectors: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return self.vectors.shape[1]

    def __getitem__(self, kept: Tensor) -> Gates:
        return Gates(self.vectors[:, kept], self.offsets[kept])

    def patterns(self, X: Tensor) -> Tensor:
        """D (n, P) bool."""
        return patterns(X, self.vectors, self.offsets)


def gaussian(d: int, P: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """G (d, P) of independent standard normal entries."""
    return torch.randn(d, P, generator=generator, dtype=dtype, device=generator.device)


def sample(X: Tensor, P: int, generator: torch.Generator) -> Gates:
    """P hyperplanes through the midpoints of pairs of samples, across the line between them; n = 1: half way to zero."""
    n = len(X)
    first = torch.randint(n, (P,), generator=generator, device=generator.device).to(X.device)
    shift = torch.randint(max(n - 1, 1), (P,), generator=generator, device=generator.device).to(X.device)
    second = (first + 1 + shift) % n
    a, b = X[first], X[second] if n > 1 else torch.zeros_like(X[first])
    normal = a - b
    return Gates(normal.T.contiguous(), -(normal * (a + b)).sum(1) / 2)


def patterns(X: Tensor, G: Tensor, offset: Tensor | None = None) -> Tensor:
    """D (n, P) bool: x_j g_i + o_i > 0, X (n, d), G (d, P), offset (P,) or None."""
    scores = X @ G.to(X)
    return (scores if offset is None else scores + offset.to(X)) > 0


def clean(D: Tensor) -> Tensor:
    """Indices (K,), ascending, of columns of D (n, P): first of equal ones, none that is all zero."""
    packed = np.packbits(D.T.cpu().numpy(), axis=1)
    seen: set[bytes] = set()
    kept = []
    for i, column in enumerate(packed):
        key = column.tobytes()
        if key not in seen and any(key):
            kept.append(i)
        seen.add(key)
    return torch.tensor(kept, dtype=torch.long, device=D.device)
