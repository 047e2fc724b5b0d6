"""y = x W^T for W = Q + L R, from packed codes and scales."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lplr.kernels.backend import form
from lplr.kernels.lowrank import reference

__all__ = ["lowrank_linear"]


def lowrank_linear(x: Tensor, **layer: Any) -> Tensor:
    """y (..., n) of x (..., d) for a layer's sizes, grids and tensors; see `reference.lowrank_linear`."""
    return form("lowrank", reference, x).lowrank_linear(x, **layer)
