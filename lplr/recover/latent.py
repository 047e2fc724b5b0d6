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
from typing import Any

import torch
from torch import Tensor, nn

from lplr.factor.factorization import Factorization, rotated
from lplr.kernels.hadamard import rotate, rotation_signs
from lplr.quant.nearest import nearest_of
from lplr.quant.qtensor import QTensor, round_scale

PARTS = ("q", "l", "r")
SCALES = ("row_scale", "col_scale")


class Latent(nn.Module):
    """W (n x d) of a factorization, by `tensors()` differentiable in `codes()` and `scales()`; `factorization()` packs it.

    With `fixed`, a type, codes stay as they are, and only scales are parameters; where no scale hinders it the parts then stand,
    in that type, in the bases of x and y, so that nothing has to be rotated.  rotations: of the bases in which the parts stand.
    """

    def __init__(self, f: Factorization, *, fixed: torch.dtype | None = None) -> None:
        super().__init__()
        self.made, self.fixed = f, fixed is not None
        turned = self.fixed and any((f.rotation, f.output_rotation)) and _one_scale_along_rotations(f)
        self.rotations = (0, 0) if turned else (f.rotation, f.output_rotation)
        self.points = nn.ParameterDict()
        self._rounded: dict[str, tuple[int, QTensor, Tensor]] = {}  # version of a latent, and what it was rounded to
        self.gains = nn.ParameterDict()  # scale = stored * exp(gain)
        for name, part in self._parts():
            points = part.levels().contiguous()
            if turned:
                points = rotated(points, *_axes(f)[name], inverse=True).to(fixed)
            elif self.fixed and torch.equal(points.bfloat16().float(), points):
                points = points.bfloat16()
            self.points[name] = nn.Parameter(points, requires_grad=not self.fixed)
            for scale in SCALES:
                if (stored := getattr(part, scale)) is not None:
                    self.gains[f"{name}_{scale}"] = nn.Parameter(torch.zeros(stored.shape, device=stored.device))

    def codes(self) -> list[nn.Parameter]:
        """The latents."""
        return [] if self.fixed else list(self.points.values())

    def scales(self) -> list[nn.Parameter]:
        """Logarithms of the scales, from 0."""
        return list(self.gains.values())

    def tensors(self) -> dict[str, Tensor]:
        """What W is a product of: the points of each part under its name, rounded, and its scales as they are stored.

        float32; points that nothing changes in the type that they are kept in.
        """
        out = {}
        for name, part in self._parts():
            x = self.points[name]
            out[name] = x if self.fixed else _Straight.apply(x, self._round(name, part)[1])
            for scale in SCALES:
                if (stored := getattr(part, scale)) is not None:
                    out[f"{name}_{scale}"] = self._scale(f"{name}_{scale}", stored)
        return out

    @torch.no_grad()
    def factorization(self) -> Factorization:
        """The packed value of W as it is now."""
        parts: dict[str, QTensor] = {}
        for name, part in self._parts():
            made = part if self.fixed else self._round(name, part)[0]
            scales = {s: getattr(part, s) for s in SCALES if getattr(part, s) is not None}
            parts[name] = replace(made, **{s: round_scale(self._raw(f"{name}_{s}", old)) for s, old in scales.items()})
        return replace(self.made, **parts)

    def _round(self, name: str, part: QTensor) -> tuple[QTensor, Tensor]:
        """The points nearest to a latent, packed and as numbers; found anew when it has moved."""
        x = self.points[name]
        known = self._rounded.get(name)
        if known is None or known[0] != x._version:
            known = self._rounded[name] = (x._version, *nearest_of(part, x.detach()))
        return known[1], known[2]

    def _parts(self) -> list[tuple[str, QTensor]]:
        return [(name, part) for name in PARTS if (part := getattr(self.made, name)) is not None]

    def _raw(self, name: str, stored: Tensor) -> Tensor:
        return stored.float() * self.gains[name].exp()

    def _scale(self, name: str, stored: Tensor) -> Tensor:
        raw = self._raw(name, stored)
        return raw + (round_scale(raw.detach()).float() - raw).detach()


def _axes(f: Factorization) -> dict[str, tuple[int, int]]:
    """Part -> the rotations of its columns and of its rows, 0 for none."""
    return {"q": (f.rotation, f.output_rotation), "l": (0, f.output_rotation), "r": (f.rotation, 0)}


def _one_scale_along_rotations(f: Factorization) -> bool:
    """Whether no axis that is rotated has scales of its own for each index: then scales and rotations commute."""
    for name, (columns, rows) in _axes(f).items():
        part = getattr(f, name)
        for rotation, scale in ((columns, "col_scale"), (rows, "row_scale")):
            stored = None if part is None else getattr(part, scale)
            if rotation and stored is not None and stored.numel() > 1:
                return False
    return True


class _Straight(torch.autograd.Function):
    """(x, value) -> value, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Applied(nn.Module):
    """y = x W^T + b (..., n) for x (..., d): a Latent as a linear layer.

    It has the names of `Latent.tensors`, and a bias if asked to, but no values: `torch.func.functional_call` gives them.
    Products are taken in the bases in which Q, L and R stand: it is x and y that are rotated, and neither W nor its gradient is
    formed.
    """

    def __init__(self, latent: Latent, *, bias: bool = False) -> None:
        super().__init__()
        n, d = latent.made.shape
        rotation, output_rotation = latent.rotations
        self.signs = rotation_signs(rotation, d) if rotation else None
        self.output_signs = rotation_signs(output_rotation, n) if output_rotation else None
        shapes = {name: tensor.shape for name, tensor in latent.tensors().items()}
        self.names = tuple(shapes)
        for name, shape in ({**shapes, "bias": torch.Size((n,))} if bias else shapes).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.signs is None else rotate(x, self.signs)
        parts = []
        if "q" in self.names:
            parts.append(self._times("q", z))
        if "l" in self.names:
            parts.append(self._times("l", self._times("r", z)))
        y = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        y = y if self.output_signs is None else rotate(y, self.output_signs, inverse=True)
        bias = getattr(self, "bias", None)
        return y if bias is None else y + bias

    def _times(self, name: str, z: Tensor) -> Tensor:
        """z X^T for a part X with its scales."""
        row, col = (getattr(self, f"{name}_{scale}", None) for scale in SCALES)
        points = getattr(self, name)
        z = _scaled(z, col)
        return _scaled(nn.functional.linear(z, points if torch.is_autocast_enabled(z.device.type) else points.to(z.dtype)), row)


def _scaled(z: Tensor, scale: Tensor | None) -> Tensor:
    """z * scale in the type of z, of which a wider scale would make a wider one; a single scale is a number."""
    if scale is None:
        return z
    return z * (scale.reshape(()) if scale.numel() == 1 else scale.to(z.dtype))
