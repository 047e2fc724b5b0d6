"""The Walsh-Hadamard transform, an operator of torch, and an orthogonal rotation of any size built on it."""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.backend import direct, form
from lplr.kernels.hadamard import reference
from lplr.kernels.hadamard.reference import rotation_signs

__all__ = ["hadamard", "rotate", "rotation_signs"]


def hadamard(x: Tensor) -> Tensor:
    """x H with H the orthonormal Hadamard matrix (Sylvester order) of size p = x.shape[-1], a power of two: (..., p) -> (..., p).

    H is symmetric and H H = I, so the transform is its own inverse, and its own derivative.  Raises ValueError on any other size.
    """
    return form("hadamard", reference, x).hadamard(x) if direct(x) else _hadamard(x)


@torch.library.custom_op("lplr::hadamard", mutates_args=())
def _hadamard(x: Tensor) -> Tensor:
    return form("hadamard", reference, x).hadamard(x)


@_hadamard.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_hadamard.register_autograd(lambda ctx, dy: hadamard(dy))


def rotate(x: Tensor, signs: Tensor, *, inverse: bool = False) -> Tensor:
    """x O (..., d) with O orthogonal, d any size; with `inverse`, x O^T.  signs: (2, d), see `rotation_signs`.

    O = D_1 (H_p (+) I) D_2 (I (+) H_p), p the largest power of two up to d: random signs and a Hadamard transform of the
    first p entries, then the same of the last p; one transform suffices where p = d.
    """
    d = x.shape[-1]
    p = 1 << (d.bit_length() - 1)
    first, second = signs.to(x.device, x.dtype)
    if p == d:
        return hadamard(x) * first if inverse else hadamard(x * first)
    # split, not slices: what comes back of its parts is put together once, not added to zeros
    if inverse:
        x = _last(x, p) * second
        return _first(x, p) * first
    return _last(_first(x * first, p) * second, p)


def _first(x: Tensor, p: int) -> Tensor:
    """The first p entries transformed."""
    head, tail = x.split([p, x.shape[-1] - p], -1)
    return torch.cat([hadamard(head), tail], -1)


def _last(x: Tensor, p: int) -> Tensor:
    """The last p entries transformed."""
    head, tail = x.split([x.shape[-1] - p, p], -1)
    return torch.cat([head, hadamard(tail)], -1)
