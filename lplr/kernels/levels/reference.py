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

import torch
from torch import Tensor

from lplr.kernels import lattice, normal_float, trellis
from lplr.kernels.pack import packed_width, unpack

# step of the next lower width over that of a width, for a normal variable, in 8 significant bits: a level times it is exact
UNIFORM = {1: 0.0, 2: 1.6015625, 3: 1.6953125, 4: 1.75, 5: 1.78125, 6: 1.8125, 7: 1.828125, 8: 1.8515625}
WIDTHS: dict[str, tuple[float, ...]] = {
    "uniform": tuple(map(float, UNIFORM)),
    "normal_float": normal_float.WIDTHS,
    "lattice": lattice.WIDTHS,
    "trellis": trellis.WIDTHS,
}
BY_COLUMN = ("lattice", "trellis")
AT_ONCE = 1 << 22  # points of a grid by columns that are decoded at once: what a decoder needs besides is several times that


def narrower(grid: str, bits: float) -> tuple[float, float]:
    """(the next lower width, its step over this one's); the width and the ratio are 0 below the lowest."""
    at = WIDTHS[grid].index(bits)
    lower = WIDTHS[grid][at - 1] if at else 0.0
    if grid == "uniform":
        return lower, UNIFORM[int(bits)]
    return lower, normal_step(grid, lower) / normal_step(grid, bits) if at else 0.0


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
    if grid in BY_COLUMN:
        decode = lattice.decode if grid == "lattice" else trellis.decode
        if n * d <= AT_ONCE:
            return decode(codes, bits, n, dtype).T
        return torch.cat([decode(part, bits, n, dtype) for part in codes.split(max(1, AT_ONCE // n))]).T
    unpacked = unpack(codes, int(bits), d)
    if grid == "normal_float":
        return normal_float.levels(bits).to(codes.device, dtype)[unpacked.long()]
    return unpacked.to(dtype).mul_(2).sub_((1 << int(bits)) - 1)


def nearest(x: Tensor, grid: str, bits: float, feedback: trellis.Feedback | None = None) -> tuple[Tensor, Tensor]:
    """The points nearest to the sequences x (m, n), columns of a matrix over their scales: (codes, points (m, n)).

    Codes are packed (m, bytes) on a grid that is stored by columns, else uint8 (m, n).  Feedback is for the trellis alone.
    """
    if grid == "trellis":
        return trellis.encode(x, bits, feedback)
    assert feedback is None
    if grid == "lattice":
        return lattice.encode(x, bits)
    if grid == "normal_float":
        return normal_float.round_to_levels(x, bits)
    top = (1 << int(bits)) - 1
    code = torch.add(top / 2, x, alpha=0.5).round_().clamp_(0, top)
    return code.to(torch.uint8), 2 * code - top


def normal_step(grid: str, bits: float) -> float:
    """The scale with which a grid other than the uniform one fits a normal variable of unit variance best."""
    return normal_float.normal_scale(bits) if grid == "normal_float" else 1.0
