"""y = x W^T for W = Q + L R, from packed codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lplr.kernels.backend import compiled, direct, form, plain
from lplr.kernels.lowrank import op, reference
from lplr.kernels.lowrank.state import state

__all__ = ["Layer", "lowrank_linear"]


def lowrank_linear(x: Tensor, **layer: Any) -> Tensor:
    """y (..., n) of x (..., d) for a layer's sizes, grids and tensors; see `reference.lowrank_linear`.

    Through the op lplr::lowrank_linear where something is to be compiled or differentiated, else straight to the form that
    serves x: the op costs more than a small layer.  float64 is for checks, and left to autograd.
    """
    if not direct(x, *layer.values()):
        return op.lowrank_linear(x, **layer) if x.dtype != torch.float64 else reference.lowrank_linear(x, **layer)
    return form("lowrank", reference, x).lowrank_linear(x, **layer)


class Layer:
    """A layer's sizes, grids and tensors, looked at once: layer(x) = lowrank_linear(x, **sizes, **tensors).

    For few tokens on the CPU, where looking at the arguments would cost more than the product.  `stored` are the tensors, in
    the order given: who keeps a Layer makes another when it holds others.  A tensor that was written to is noticed.
    """

    def __init__(self, sizes: dict[str, Any], tensors: dict[str, Tensor | None]) -> None:
        self.arguments = {**sizes, **tensors}
        self.stored = tuple(tensors.values())
        self._there = [t for t in self.stored if t is not None]
        self._state: list[int] | None = None
        self._run: Callable[[Tensor], Tensor | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """y (..., n) of x (..., d)."""
        if not torch.is_grad_enabled() and x.is_cpu and plain(x):
            found = state(self._there)
            if found != self._state:
                module = compiled("lowrank")
                self._run = None if module is None else module.prepared(x.shape[-1], **self.arguments)
                self._state = found if self._run is not None else None
            y = None if self._run is None or x.dtype is torch.float64 else self._run(x)
            if y is not None:
                return y
        return lowrank_linear(x, **self.arguments)
