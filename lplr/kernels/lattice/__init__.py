"""Rounding to a shifted E8 lattice codebook, 8 entries of a sequence at a time."""

from __future__ import annotations

from torch import Tensor

from lplr.kernels.backend import form
from lplr.kernels.lattice import reference
from lplr.kernels.lattice.reference import WIDTHS, decode, packed_width

__all__ = ["WIDTHS", "decode", "encode", "packed_width"]


def encode(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Codes and values of the grid points near x; see `reference.encode`.

    The two forms agree but where two points are equally near within the rounding of floating-point sums.
    """
    return form("lattice", reference, x).encode(x, bits)
