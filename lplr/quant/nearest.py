"""The packed matrix of a given layout that is nearest to a dense one: codes are chosen again, scales stay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lplr.kernels.levels import BY_COLUMN, levels, narrower, nearest
from lplr.kernels.pack import pack
from lplr.quant.qtensor import QTensor


def nearest_of(q: QTensor, x: Tensor) -> tuple[QTensor, Tensor]:
    """(packed, its points (n, d)): the matrix of q's grid, widths and scales whose points are nearest to x (n, d).

    x is in units of the points, before scales, as `QTensor.levels` gives them: that of q itself gives q.  The lattice of 3 and 4
    bits is rounded in two stages, which is not always the nearest: there a column that was nearer keeps its codes.  O(n d), and
    the grid's encoder.  Raises ValueError on another shape.
    """
    if x.shape != q.shape:
        raise ValueError(f"points of shape {tuple(x.shape)} for a packed matrix of {q.shape}: give one for each entry")
    codes, wide = _rounded(x[:, q.narrow :], q.grid, q.bits, q.codes)
    if not q.narrow:
        return replace(q, codes=codes), wide
    lower, ratio = narrower(q.grid, q.bits)
    if not lower:
        few, narrow = None, torch.zeros_like(x[:, : q.narrow])
    else:
        few, narrow = _rounded(x[:, : q.narrow] / ratio, q.grid, lower, q.narrow_codes)
        narrow = narrow * ratio
    return replace(q, codes=codes, narrow_codes=few), torch.cat([narrow, wide], 1)


def _rounded(x: Tensor, grid: str, bits: float, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """(packed codes, points (n, d)) of one width, `before` the codes that there were."""
    wanted = x.T.contiguous()
    codes, points = nearest(wanted, grid, bits)
    if grid == "lattice" and bits > 2 and before is not None:
        old = levels(before, (x.shape[0], x.shape[1]), grid, bits, x.dtype).T
        keep = ((old - wanted).square().sum(1) <= (points - wanted).square().sum(1))[:, None]
        codes, points = torch.where(keep, before, codes), torch.where(keep, old, points)
    return codes if grid in BY_COLUMN else pack(codes.T.contiguous(), int(bits)), points.T
