"""NormalFloat: 2^B levels in [-1, 1] that stand for about equal shares of a normal variable, zero among them.

    top = 1 - (1 / 2^(B+1) + 1 / (2^(B+1) - 2)) / 2, to seven digits as in the published table
    positive levels: Phi^-1 at 2^(B-1) equally spaced points from 1/2 (left out) to top; negative: 2^(B-1) - 1 of them, mirrored

all divided by the largest.  B = 4 is NF4 of QLoRA; 2 and 3 bits are the same construction.  `normal_scale` is the s that
minimises

    E (X - s Q(X / s))^2,      X ~ N(0, 1),  Q to the nearest level.

Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA", NeurIPS 2023, section 3 and appendix E.
"""

from __future__ import annotations

from functools import cache
from math import erf, exp, inf, pi, sqrt

import torch
from torch import Tensor

WIDTHS = (2.0, 3.0, 4.0)


def levels(bits: float) -> Tensor:
    """The levels (2^bits,), float32, rising from -1 to 1; ValueError where there is no such width."""
    if bits not in WIDTHS:
        raise ValueError(f"NormalFloat has no grid of {bits} bits: choose one of {', '.join(f'{w:g}' for w in WIDTHS)}")
    half = 1 << (int(bits) - 1)
    top = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)
    shares = [torch.linspace(top, 0.5, k, dtype=torch.float32, device="cpu")[:-1].double() for k in (half + 1, half)]
    positive, negative = (torch.special.ndtri(share).float() for share in shares)
    return torch.cat([-negative, torch.zeros(1, device="cpu"), positive.flip(0)]) / positive[0]


def round_to_levels(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and values, in x's type, of the levels nearest to x (any shape); the lower one in the middle of two."""
    points = levels(bits).to(x)
    codes = torch.bucketize(x.contiguous(), (points[1:] + points[:-1]) / 2)
    return codes.to(torch.uint8), points[codes]


@cache
def normal_scale(bits: float) -> float:
    """The multiplier of a normal row's rms that the grid has its least squared error at.

    For fixed cells the best scale is E <X, Q> / E Q^2, both in closed form; repeated with the cells of the new scale until it
    stays: each step lowers the error, which has one minimum.
    """
    points = levels(bits).double().tolist()
    edges = [-inf, *((a + b) / 2 for a, b in zip(points, points[1:], strict=False)), inf]
    scale, last = 2.0, 0.0
    while abs(scale - last) > 1e-12:
        last = scale
        density = [exp(-((e * scale) ** 2) / 2) / sqrt(2 * pi) for e in edges]
        below = [(1 + erf(e * scale / sqrt(2))) / 2 for e in edges]
        product = sum(v * (density[k] - density[k + 1]) for k, v in enumerate(points))
        power = sum(v * v * (below[k + 1] - below[k]) for k, v in enumerate(points))
        scale = product / power
    return scale
