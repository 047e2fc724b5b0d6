"""The lattice encoder of `reference.encode`, compiled for the CPU.

The 256 patterns of a shift are compared in loops over patterns that the compiler turns into vector instructions; patterns are
sorted by parity, so that those in need of a flip are one stretch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lplr.kernels.backend import jit
from lplr.kernels.lattice.reference import SIZE, one_bit, packed_width, stage, vectors


def encode(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """See `reference.encode`."""
    m, n = x.shape
    width = packed_width(n, bits)
    whole = vectors(x.detach()).contiguous()
    codes = torch.empty(len(whole), int(bits), dtype=torch.uint8)
    values = torch.empty_like(whole)
    _round(whole.numpy(), *_tables(bits, x.dtype), codes.numpy(), values.numpy())
    return codes.view(m, width), values.view(m, width // int(bits) * SIZE)[:, :n].contiguous()


@cache
def _tables(bits: float, dtype: torch.dtype) -> tuple[Any, ...]:
    """(columns (8, 256), halved squared norms (256,), even, shift) of the first stage, then of the second.

    The second is the first again, and not used, at 2 bits; the 1-bit stage has no parity and no shift.
    """
    first = stage(f"{bits:g}")
    second = stage("4 second") if bits == 4 else first
    last = (one_bit(), one_bit().square().sum(1) / 2, 0, 0.0) if bits == 3 else _parts(second)
    scalar = torch.empty(0, dtype=dtype).numpy().dtype.type
    return tuple(
        part
        for table, half, even, shift in (_parts(first), last)
        for part in (table.T.contiguous().to(dtype).numpy(), half.to(dtype).numpy(), even, scalar(shift))
    )


def _parts(grid: Any) -> tuple[Tensor, Tensor, int, float]:
    return grid.table, grid.half_norm, grid.even, grid.shift


_compile = jit("nnan", "nsz", "contract", "reassoc")


@_compile
def _largest(score: np.ndarray) -> int:
    """The first place of the largest score."""
    top = score[0]
    for k in range(len(score)):
        top = max(top, score[k])
    for k in range(len(score)):
        if score[k] == top:
            return k
    return 0


@_compile
def _nearest(
    x: np.ndarray, table: np.ndarray, half: np.ndarray, even: int, shift: float, scratch: np.ndarray, out: np.ndarray
) -> int:
    """The word of the nearest point with this shift; the point goes to `out`."""
    score, flip = scratch[0], scratch[1]
    count, odd = len(half), 0
    for k in range(count):
        score[k] = -half[k]
        flip[k] = np.inf
    for i in range(SIZE):
        size = abs(x[i] - shift)
        odd ^= int(x[i] < shift)
        for k in range(count):
            product = size * table[i, k]
            score[k] += product
            flip[k] = min(flip[k], product)
    for k in range(0 if odd else even, even if odd else count):
        score[k] -= flip[k] + flip[k]
    best = _largest(score)
    repair, least = -1, x[0]
    if (best >= even) != (odd == 1):
        for i in range(SIZE):
            product = abs(x[i] - shift) * table[i, best]
            if repair < 0 or product < least:
                repair, least = i, product
    word = best
    for i in range(SIZE):
        minus = (x[i] < shift) != (i == repair)
        out[i] = shift - table[i, best] if minus else shift + table[i, best]
        if minus and i < SIZE - 1:
            word |= 256 << i
    return word if shift > 0 else word | 1 << 15


@_compile
def _nearest_of_both(
    x: np.ndarray, table: np.ndarray, half: np.ndarray, even: int, shift: float, scratch: np.ndarray, out: np.ndarray
) -> int:
    """The word of the nearest point of a 2-bit stage; the point goes to `out`."""
    other = scratch[2, :SIZE]
    word = _nearest(x, table, half, even, shift, scratch, out)
    other_word = _nearest(x, table, half, even, -shift, scratch, other)
    if _error(x, other, scratch[3]) < _error(x, out, scratch[3]):
        out[:] = other
        return other_word
    return word


@_compile
def _nearest_row(x: np.ndarray, table: np.ndarray, half: np.ndarray, score: np.ndarray, out: np.ndarray) -> int:
    """The row nearest to x of a table given by columns; the row goes to `out`."""
    for k in range(len(half)):
        score[k] = -half[k]
    for i in range(SIZE):
        for k in range(len(half)):
            score[k] += x[i] * table[i, k]
    best = _largest(score)
    out[:] = table[:, best]
    return best


@_compile
def _error(x: np.ndarray, value: np.ndarray, scratch: np.ndarray) -> float:
    scratch[0] = 0
    for i in range(SIZE):
        scratch[0] += (x[i] - value[i]) ** 2
    return scratch[0]


@_compile
def _round(
    x: np.ndarray,
    table: np.ndarray,
    half: np.ndarray,
    even: int,
    shift: float,
    table2: np.ndarray,
    half2: np.ndarray,
    even2: int,
    shift2: float,
    codes: np.ndarray,
    values: np.ndarray,
) -> None:
    """Codes (v, bits) and values (v, 8) of vectors x (v, 8); stages as in `_tables`."""
    bits = codes.shape[1]
    scratch = np.empty((4, len(half)), x.dtype)
    first, rest, second = np.empty(SIZE, x.dtype), np.empty(SIZE, x.dtype), np.zeros(SIZE, x.dtype)
    for v in range(len(x)):
        least = x[v, 0]
        for turn in range(2):
            word, word2 = _nearest(x[v], table, half, even, -shift if turn else shift, scratch, first), 0
            for i in range(SIZE):
                rest[i] = x[v, i] - first[i]
            if bits == 3:
                word2 = _nearest_row(rest, table2, half2, scratch[0], second)
            elif bits == 4:
                word2 = _nearest_of_both(rest, table2, half2, even2, shift2, scratch, second)
            error = _error(rest, second, scratch[3])
            if turn == 0 or error < least:
                least = error
                for i in range(SIZE):
                    values[v, i] = first[i] + second[i]
                codes[v, 0], codes[v, 1] = word & 255, word >> 8
                if bits > 2:
                    codes[v, 2] = word2 & 255
                if bits > 3:
                    codes[v, 3] = word2 >> 8
