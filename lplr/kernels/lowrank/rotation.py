"""`kernels.hadamard.rotate`, compiled, in place: butterflies in registers, three steps at a time; and changes of type alone.

Changes of type are not left to torch: its threads go on waiting busily when they are done, on the cores that the product needs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from lplr.kernels.backend import jit
from lplr.kernels.lowrank.emit import F32, I64, case, instruction, load, places, repeated, store, vector
from lplr.kernels.lowrank.vectors import as_float, as_half

SHORT = 64  # entries whose whole transform stays in registers
_LANES = 16
_WIDE = ir.VectorType(F32, _LANES)
_compile = jit("contract")


def _butterflies(b: Any, parts: list[Any]) -> list[Any]:
    """The unscaled transform across a power of two of vectors."""
    h = 1
    while h < len(parts):
        pairs = [(parts[i], parts[i ^ h]) for i in range(len(parts))]
        parts = [b.fsub(other, one) if i & h else b.fadd(one, other) for i, (one, other) in enumerate(pairs)]
        h *= 2
    return parts


@instruction
def _transform_short(context: Any, address: Any, scale: Any) -> Any:
    """The unscaled transform of SHORT float32, times scale, in place."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        address, scale = args
        scales = repeated(b, scale, _LANES)
        parts = [b.fmul(load(b, address, 4 * i, _WIDE), scales) for i in range(0, SHORT, _LANES)]
        for h in (1, 2, 4, 8):
            signs = vector(F32, [-1.0 if lane & h else 1.0 for lane in range(_LANES)])
            turned = [places(b, v, [lane ^ h for lane in range(_LANES)]) for v in parts]
            signed = [b.fmul(v, signs, flags=("contract",)) for v in parts]
            parts = [b.fadd(*pair, flags=("contract",)) for pair in zip(turned, signed, strict=True)]
        for i, value in enumerate(_butterflies(b, parts)):
            store(b, value, address, 4 * _LANES * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@instruction
def _combine(context: Any, address: Any, h: Any, steps: Any) -> Any:
    """1, 2 or 3 steps of the transform, from the distance h on, a multiple of 16, of the 2^steps h float32 at an address."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        address, h, steps = args

        def emit(count: int) -> None:
            apart = b.mul(h, ir.Constant(I64, 4))
            with cgutils.for_range(b, b.udiv(h, ir.Constant(I64, _LANES)), intp=I64) as loop:
                first = b.add(address, b.mul(loop.index, ir.Constant(I64, 4 * _LANES)))
                at = [b.add(first, b.mul(apart, ir.Constant(I64, i))) for i in range(1 << count)]
                for to, value in zip(at, _butterflies(b, [load(b, a, 0, _WIDE) for a in at]), strict=True):
                    store(b, value, to, 0)

        case(b, steps, {count: partial(emit, count) for count in (1, 2, 3)})
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@_compile
def _transform(v: Any) -> None:
    """The orthonormal Walsh-Hadamard transform of v (p,), contiguous, in place."""
    p, h = len(v), 1
    scale = np.float32(1 / np.sqrt(p))
    if p < SHORT:
        while h < p:
            for i in range(0, p, 2 * h):
                for k in range(i, i + h):
                    v[k], v[k + h] = v[k] + v[k + h], v[k] - v[k + h]
            h *= 2
        v *= scale
        return
    at = v.ctypes.data
    for i in range(0, p, SHORT):
        _transform_short(at + 4 * i, scale)
    h = SHORT
    while h < p:
        steps = 3 if 8 * h <= p else 2 if 4 * h <= p else 1
        for i in range(0, p, h << steps):
            _combine(at + 4 * i, h, steps)
        h <<= steps


@_compile
def rotate(x: Any, signs: Any, inverse: bool) -> None:
    """x (t, d) in place, see `kernels.hadamard.rotate`; signs float32 (2, d)."""
    d = x.shape[1]
    p = 1
    while 2 * p <= d:
        p *= 2
    for t in range(len(x)):
        v = x[t]
        if not inverse:
            v *= signs[0]
            _transform(v[:p])
            if p < d:
                v *= signs[1]
                _transform(v[d - p :])
        else:
            if p < d:
                _transform(v[d - p :])
                v *= signs[1]
            _transform(v[:p])
            v *= signs[0]


@_compile
def rotate_halves(x: Any, signs: Any, out: Any) -> None:
    """out (t, d), float32: x, bfloat16, rotated, a token at a time: it stays in the nearest cache."""
    for t in range(len(x)):
        for j in range(x.shape[1]):
            out[t, j] = as_float(np.uint32(x[t, j]) << np.uint32(16))
        rotate(out[t : t + 1], signs, False)


@_compile
def rotate_back(y: Any, signs: Any, out: Any) -> None:
    """out (t, n), bfloat16: y, float32, rotated back, which overwrites it."""
    for t in range(len(y)):
        rotate(y[t : t + 1], signs, True)
        for i in range(y.shape[1]):
            out[t, i] = as_half(y[t, i])


@_compile
def widened(x: Any, out: Any) -> None:
    """out (t, d), float32: x (t, d), bfloat16 as uint16."""
    for t in range(len(x)):
        for j in range(x.shape[1]):
            out[t, j] = as_float(np.uint32(x[t, j]) << np.uint32(16))


@_compile
def rounded(y: Any, out: Any) -> None:
    """out (t, n), bfloat16 as uint16: y (t, n), float32."""
    for t in range(len(y)):
        for i in range(y.shape[1]):
            out[t, i] = as_half(y[t, i])
