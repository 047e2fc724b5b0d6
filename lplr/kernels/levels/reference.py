"""The grids of packed matrices: how many bytes codes take, and which points they stand for, before any scale.

    name          what a code stands for                                                   stored
    uniform       an odd integer 2c - (2^B - 1)                                            by rows
    normal_float  one of 2^B levels in [-1, 1], equal shares of a normal variable          by rows
    lattice       a point of a shifted E8 lattice for 8 entries below one another          by columns
    trellis       a path through a trellis for the entries of a column                     by columns

By columns: row j of the codes is column j of the matrix.  The first columns of a backbone may have the next lower width of its
grid ("narrow"); `narrower` gives it and the ratio of the two grids' steps for a normal variable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lplr.kernels import lattice, normal_float, trellis
from lplr.kernels.pack import packed_width, unpack


@dataclass(frozen=True)
class Grid:
    """The widths of a grid, and for each the next lower one with the ratio of the steps (width 0: nothing is stored)."""

    by_column: bool
    narrow: dict[float, tuple[float, float]]

    @property
    def widths(self) -> tuple[float, ...]:
        """Bits an entry, rising."""
        return tuple(self.narrow)


def _ladder(widths: tuple[float, ...], steps: tuple[float, ...]) -> dict[float, tuple[float, float]]:
    """Each width -> the one below and the ratio of their steps."""
    ratios = [0.0, *(low / high for low, high in zip(steps, steps[1:], strict=False))]
    return dict(zip(widths, zip((0.0, *widths), ratios, strict=False), strict=True))


# ratios in 8 significant bits, so that a level times its ratio is exact in float32
_UNIFORM = (0.0, 1.6015625, 1.6953125, 1.75, 1.78125, 1.8125, 1.828125, 1.8515625)
GRIDS: dict[str, Grid] = {
    "uniform": Grid(False, {b: (b - 1.0, r) for b, r in zip(map(float, range(1, 9)), _UNIFORM, strict=True)}),
    "normal_float": Grid(False, _ladder(normal_float.WIDTHS, tuple(normal_float.normal_scale(b) for b in normal_float.WIDTHS))),
    "lattice": Grid(True, _ladder(lattice.WIDTHS, (1.0,) * len(lattice.WIDTHS))),
    "trellis": Grid(True, _ladder(trellis.WIDTHS, (1.0,) * len(trellis.WIDTHS))),
}


def narrower(grid: str, bits: float) -> tuple[float, float]:
    """(the next lower width, its step over this one's); the width is 0 below the lowest."""
    return GRIDS[grid].narrow[bits]


def packed_shape(shape: tuple[int, int], grid: str, bits: float) -> tuple[int, int]:
    """Shape of the packed codes (uint8) of a matrix of this shape; no bytes at all at 0 bits."""
    n, d = shape
    if not bits:
        return (0, 0)
    if grid == "lattice":
        return d, lattice.packed_width(n, bits)
    if grid == "trellis":
        return d, trellis.packed_width(n, bits)
    return n, packed_width(d, int(bits))


def levels(codes: Tensor, shape: tuple[int, int], grid: str, bits: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The points (n, d) that packed codes stand for, in float32 at least exact, before scales."""
    n, d = shape
    if grid == "lattice":
        return lattice.decode(codes, bits, n, dtype).T
    if grid == "trellis":
        return trellis.decode(codes, bits, n, dtype).T
    unpacked = unpack(codes, int(bits), d)
    if grid == "normal_float":
        return normal_float.levels(bits).to(codes.device, dtype)[unpacked.long()]
    return unpacked.to(dtype).mul_(2).sub_((1 << int(bits)) - 1)


def nearest(x: Tensor, grid: str, bits: float) -> tuple[Tensor, Tensor]:
    """The points nearest to the sequences x (m, n), columns of a matrix over their scales: (codes, points (m, n)).

    Codes are packed (m, bytes) on a grid that is stored by columns, else uint8 (m, n).
    """
    if grid == "lattice":
        return lattice.encode(x, bits)
    if grid == "trellis":
        return trellis.encode(x, bits)
    if grid == "normal_float":
        return normal_float.round_to_levels(x, bits)
    top = (1 << int(bits)) - 1
    code = torch.add(top / 2, x, alpha=0.5).round_().clamp_(0, top)
    return code.to(torch.uint8), 2 * code - top


def normal_step(grid: str, bits: float) -> float:
    """The scale with which a grid other than the uniform one fits a normal variable of unit variance best."""
    return normal_float.normal_scale(bits) if grid == "normal_float" else 1.0
