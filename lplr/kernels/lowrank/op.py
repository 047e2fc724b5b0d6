"""The op lplr::lowrank_linear: what torch.compile sees of a compressed layer, and how gradients pass it.

Its schema is the signature of `reference.lowrank_linear`, a grid being two arguments.  The gradient is an op too, so that a
compiled backward pass holds one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lplr.kernels.backend import form
from lplr.kernels.lowrank import reference
from lplr.kernels.lowrank.gradient import gradient

_GRIDS = ("l_grid", "r_grid", "q_grid")
_SCALES = ("row_scale", "rank_scale", "col_scale", "q_row_scale", "q_col_scale")
_SIZES = "int n, int rank, str l_grid, float l_bits, str r_grid, float r_bits, str q_grid, float q_bits, int q_narrow"
_TENSORS = (
    "Tensor? signs, Tensor? out_signs, Tensor? l_codes, Tensor? r_codes, Tensor? q_codes, Tensor? q_narrow_codes, "
    "Tensor? row_scale, Tensor? rank_scale, Tensor? col_scale, Tensor? q_row_scale, Tensor? q_col_scale"
)
_NAMES = tuple(field.split()[-1] for field in f"{_SIZES}, {_TENSORS}".split(", "))


def _layer(values: tuple[Any, ...]) -> dict[str, Any]:
    """The keywords of `reference.lowrank_linear` from the op's arguments after x."""
    layer = dict(zip(_NAMES, values, strict=True))
    for grid in _GRIDS:
        layer[grid] = (layer[grid], layer.pop(grid.replace("grid", "bits")))
    return layer


@torch.library.custom_op("lplr::lowrank_linear", mutates_args=(), schema=f"(Tensor x, {_SIZES}, {_TENSORS}) -> Tensor")
def _op(x: Tensor, *values: Any) -> Tensor:
    return form("lowrank", reference, x).lowrank_linear(x, **_layer(values))


@_op.register_fake
def _(x: Tensor, n: int, *values: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


@torch.library.custom_op(
    "lplr::lowrank_linear_gradient",
    mutates_args=(),
    schema=f"(Tensor g, Tensor x, {_SIZES}, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gradient_op(g: Tensor, x: Tensor, *values: Any) -> tuple[Tensor, ...]:
    return gradient(g, x, **_layer(values))


@_gradient_op.register_fake
def _(g: Tensor, x: Tensor, *values: Any) -> tuple[Tensor, ...]:
    layer = _layer(values)
    scales = [x.new_empty(0) if layer[name] is None else torch.empty_like(layer[name]) for name in _SCALES]
    return (torch.empty_like(x, memory_format=torch.contiguous_format), *scales)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
    ctx.rest = [None if isinstance(v, Tensor) else (v,) for v in inputs]


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if held is None else held[0] for held in ctx.rest]
    d_x, *d_scales = _gradient_op(g, *inputs)
    grads: dict[str, Tensor | None] = dict.fromkeys(_NAMES)
    grads.update({name: d for name, d in zip(_SCALES, d_scales, strict=True) if inputs[1 + _NAMES.index(name)] is not None})
    return (d_x, *grads.values())


_op.register_autograd(_backward, setup_context=_keep)


def lowrank_linear(x: Tensor, **layer: Any) -> Tensor:
    """`reference.lowrank_linear` through the op."""
    for grid in _GRIDS:
        layer[grid], layer[grid.replace("grid", "bits")] = layer.get(grid, ("uniform", 0))
        layer[grid.replace("grid", "bits")] = float(layer[grid.replace("grid", "bits")])
    for size in ("n", "rank", "q_narrow"):
        layer.setdefault(size, 0)
    return _op(x, *(layer.get(name) for name in _NAMES))
