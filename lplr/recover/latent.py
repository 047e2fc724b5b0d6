"""A packed matrix as a function that gradients pass through: latents that are rounded to its grids whenever it is asked for.

    W = P (Q + L R) O^T,     Q, L, R = scales times round(X),     dW/dX := dW/dround(X)        (straight-through)

The latents X stand in units of their grid's points and begin at the points themselves, so that a latent W begins as exactly the
matrix that was packed; rounding is to the nearest points of the grid, by the Viterbi encoder where it is a trellis.  Scales are
what is stored, bfloat16, their gradients straight through that rounding as well.
Sources: Bengio, Leonard, Courville, "Estimating or propagating gradients through stochastic neurons", 2013 (straight-through);
Hubara et al., NeurIPS 2016 (latent weights).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lplr.factor.factorization import Factorization, rotated
from lplr.quant.nearest import nearest_of
from lplr.quant.qtensor import QTensor, round_scale

PARTS = ("q", "l", "r")
SCALES = ("row_scale", "col_scale")


class Latent(nn.Module):
    """W (n x d) of a factorization, differentiable in `codes()` and `scales()`; `factorization()` is what it has become.

    With fixed=True codes stay as they are, and only scales are parameters.
    """

    def __init__(self, f: Factorization, *, fixed: bool = False) -> None:
        super().__init__()
        self.made, self.fixed = f, fixed
        self.points = nn.ParameterDict()
        self.gains = nn.ParameterDict()  # scale = stored * exp(gain)
        for name, part in self._parts():
            points = part.levels().contiguous()
            self.points[name] = nn.Parameter(points, requires_grad=not fixed)
            for scale in SCALES:
                if (stored := getattr(part, scale)) is not None:
                    self.gains[f"{name}_{scale}"] = nn.Parameter(torch.zeros(stored.shape, device=stored.device))

    def codes(self) -> list[nn.Parameter]:
        """The latents."""
        return [] if self.fixed else list(self.points.values())

    def scales(self) -> list[nn.Parameter]:
        """Logarithms of the scales, from 0."""
        return list(self.gains.values())

    def forward(self) -> Tensor:
        """W in float32."""
        dense = {}
        for name, part in self._parts():
            x = self.points[name]
            value = x if self.fixed else x + (nearest_of(part, x.detach())[1] - x).detach()
            for scale, dim in (("row_scale", 1), ("col_scale", 0)):
                if (stored := getattr(part, scale)) is not None:
                    value = value * self._scale(f"{name}_{scale}", stored).unsqueeze(dim)
            dense[name] = value
        out = dense.get("q")
        if "l" in dense:
            product = dense["l"] @ dense["r"]
            out = product if out is None else out + product
        assert out is not None
        return rotated(out, self.made.rotation, self.made.output_rotation, inverse=True)

    @torch.no_grad()
    def factorization(self) -> Factorization:
        """The packed value of W as it is now."""
        parts: dict[str, QTensor] = {}
        for name, part in self._parts():
            made = part if self.fixed else nearest_of(part, self.points[name])[0]
            scales = {s: getattr(part, s) for s in SCALES if getattr(part, s) is not None}
            parts[name] = replace(made, **{s: round_scale(self._raw(f"{name}_{s}", old)) for s, old in scales.items()})
        return replace(self.made, **parts)

    def _parts(self) -> list[tuple[str, QTensor]]:
        return [(name, part) for name in PARTS if (part := getattr(self.made, name)) is not None]

    def _raw(self, name: str, stored: Tensor) -> Tensor:
        return stored.float() * self.gains[name].exp()

    def _scale(self, name: str, stored: Tensor) -> Tensor:
        raw = self._raw(name, stored)
        return raw + (round_scale(raw.detach()).float() - raw).detach()
