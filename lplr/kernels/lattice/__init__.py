"""Rounding to a shifted E8 lattice codebook, 8 entries of a sequence at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from lplr.kernels.lattice import reference
from lplr.kernels.lattice.reference import WIDTHS, decode, packed_width

__all__ = ["WIDTHS", "decode", "encode", "packed_width"]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The compiled form, None where numba is absent or LPLR_BACKEND=reference asks for the torch one; chosen once."""
    if os.environ.get("LPLR_BACKEND") == "reference":
        return None
    try:
        from lplr.kernels.lattice import cpu
    except ImportError:
        return None
    return cpu.encode


def encode(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Codes and values of the grid points near x; see `reference.encode`.

    The two forms agree but where two points are equally near within the rounding of floating-point sums.
    """
    compiled = _compiled() if x.device.type == "cpu" else None
    return (compiled or reference.encode)(x, bits)
