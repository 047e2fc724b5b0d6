"""y = x W^T for W = Q + L R, from packed codes and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lplr.kernels.backend import form
from lplr.kernels.lowrank import op, reference

__all__ = ["lowrank_linear"]


def lowrank_linear(x: Tensor, **layer: Any) -> Tensor:
    """y (..., n) of x (..., d) for a layer's sizes, grids and tensors; see `reference.lowrank_linear`.

    Through the op lplr::lowrank_linear where something is to be compiled or differentiated, else straight to the form that
    serves x: the op costs more than a small layer.  float64 is for checks, and left to autograd.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _differentiated(x, layer)):
        return op.lowrank_linear(x, **layer) if x.dtype != torch.float64 else reference.lowrank_linear(x, **layer)
    return form("lowrank", reference, x).lowrank_linear(x, **layer)


def _differentiated(x: Tensor, layer: dict[str, Any]) -> bool:
    return x.requires_grad or any(isinstance(v, Tensor) and v.requires_grad for v in layer.values())
