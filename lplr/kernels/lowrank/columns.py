"""Products with matrices that are packed by columns, trellis or lattice: y_i = sum_j x_j c_ij, one stretch of a column at a time.

Points are exact in bfloat16, so tables hold 16-bit words, two rows in 32 bits, whose halves are float32 after a shift or a mask.
Sixteen rows of four columns are decoded in registers and multiplied in float32 at once (`vectors`).

Trellis: the state of a row is a window of the stream of codes, so a table turned to that order of the bits is indexed by
what is read; where the window of two rows one below the other is short enough (15 bits), one entry holds both.
Lattice: the words of a pattern (8 rows) with either sign; signs choose between them bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from lplr.kernels import trellis
from lplr.kernels.backend import jit
from lplr.kernels.lattice.reference import one_bit, stage
from lplr.kernels.lowrank.vectors import add_points, add_windows, as_float, as_half, load64
from lplr.kernels.trellis.reference import CODES, STATE_BITS

UNIT = 16  # rows: a stretch starts and ends at whole bytes of codes
COLUMNS = 4  # multiplied at once
STRETCH = 2048  # rows of a stretch: its sums stay in the nearest cache
AHEAD = 8  # bytes before and behind a stretch that a read may touch
LONGEST = 15  # bits of a window
_compile = jit("contract")


def _window(step_bits: int, entries: int) -> tuple[int, int, bool]:
    """(symbols that a state knows, bits of the window of a look-up, whether it finds two rows)."""
    reach = -(-STATE_BITS // step_bits)
    both = entries == 2 or step_bits * (reach + 1) <= LONGEST
    return reach, step_bits * (reach + (both and entries == 1)), both


@cache
def trellis_book(bits: float) -> tuple[np.ndarray, int]:
    """(words, uint32, by the bits of a window as they lie in the stream; the history of the start, the last symbol on top)."""
    c = CODES[bits]
    reach, width, both = _window(c.step_bits, c.entries)
    window, symbol = np.arange(1 << width), (1 << c.step_bits) - 1
    states = []
    state = np.zeros_like(window)
    for i in range(width // c.step_bits):
        state = ((state << c.step_bits) | (window >> (i * c.step_bits) & symbol)) & ((1 << STATE_BITS) - 1)
        states.append(state)
    values = trellis.codebook(bits).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    if c.entries == 2:
        pair = [values[0, states[-1]], values[1, states[-1]]]
    else:
        pair = [values[0, states[-2]], values[0, states[-1]]] if both else [values[0, states[-1]]]
    words = np.stack(pair, 1).reshape(-1).view(np.uint32)
    history = sum((c.start >> (c.step_bits * i) & symbol) << (64 - c.step_bits * (i + 1)) for i in range(reach))
    return words, history & ((1 << 64) - 1)


@cache
def lattice_book(bits: float) -> np.ndarray:
    """Words, uint32: for each 2-bit stage 256 patterns of 8 entries -t + c, then t + c (bits that differ), then masks of signs
    (2, 256) by the parity and the byte of signs; the vectors of a 1-bit stage."""

    def words(values: torch.Tensor) -> np.ndarray:
        return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint32).reshape(-1)

    parts = []
    for name in [f"{bits:g}", *(["4 second"] if bits == 4 else [])]:
        grid = stage(name)
        minus = words(grid.shift - grid.table)
        parts += [minus, words(grid.shift + grid.table) ^ minus]
        signs = np.arange(256)
        rows = []
        odd = (np.arange(256)[:, None] >= grid.even) * 1  # by pattern
        for parity in (0, 1):
            negative = signs[:, None] >> np.arange(7) & 1
            last = (negative.sum(1, keepdims=True) + parity) & 1
            negative = np.concatenate([negative, last], 1).astype(bool)
            flipped = (signs >> 7).astype(bool)[:, None]
            # with the shift -c a point is -((-s) t + c)
            rows.append(np.where(negative ^ flipped, 0, 0xFFFF).astype(np.uint16))
        parts.append(np.ascontiguousarray(np.stack(rows)).view(np.uint32).reshape(-1))
        parts.append(odd.astype(np.uint32).reshape(-1))
    if bits == 3:
        parts.append(words(one_bit()))
    return np.concatenate(parts)


STAGE = 2 * 1024 + 2048 + 256  # words of a 2-bit stage of `lattice_book`


def _reader(step_bits: int, entries: int) -> Callable[..., None]:
    """read(address of a stream, words, out, units): UNIT rows a unit into out, uint32."""
    reach, width, both = _window(step_bits, entries)
    up = step_bits * (2 if both and entries == 1 else 1)  # bits a look-up
    behind = step_bits * (reach - 1)
    back = -(-behind // 8)
    low, mask = 8 * back - behind, np.uint64((1 << width) - 1)
    eights = 1 if both else 2  # reads of eight look-ups a unit

    def read(address: int, words: Any, out: Any, units: int) -> None:
        if both:
            for i in range(units):
                held = load64(address - back + i * up)
                for k in range(8):
                    out[8 * i + k] = words[(held >> np.uint64(low + up * k)) & mask]
        else:
            single, half = words.view(np.uint16), out.view(np.uint16)
            for i in range(units * eights):
                held = load64(address - back + i * up)
                for k in range(8):
                    half[8 * i + k] = single[(held >> np.uint64(low + up * k)) & mask]

    return jit()(read)


_half, _one, _one_half, _two, _two_half, _three, _three_half, _four, _five, _six = (
    _reader(c.step_bits, c.entries) for c in CODES.values()
)


@_compile
def _read_trellis(which: int, address: int, words: Any, out: Any, units: int) -> None:
    """By the place of the width in CODES."""
    if which == 0:
        _half(address, words, out, units)
    elif which == 1:
        _one(address, words, out, units)
    elif which == 2:
        _one_half(address, words, out, units)
    elif which == 3:
        _two(address, words, out, units)
    elif which == 4:
        _two_half(address, words, out, units)
    elif which == 5:
        _three(address, words, out, units)
    elif which == 6:
        _three_half(address, words, out, units)
    elif which == 7:
        _four(address, words, out, units)
    elif which == 8:
        _five(address, words, out, units)
    else:
        _six(address, words, out, units)


@_compile
def _read_lattice(bits: int, second: bool, codes: Any, words: Any, out: Any, units: int) -> None:
    """Vectors of 8 rows, `bits` bytes each, one stage of them."""
    base = STAGE if second else 0
    for i in range(2 * units):
        index = np.int64(codes[i * bits + (2 if second else 0)])
        if second and bits == 3:
            for k in range(4):
                out[4 * i + k] = words[base + 4 * index + k]
            continue
        high = np.int64(codes[i * bits + (3 if second else 1)])
        odd = np.int64(words[base + 4096 + index])
        flip = np.uint32(0x80008000) if high >> 7 else np.uint32(0)
        for k in range(4):
            chosen = words[base + 1024 + 4 * index + k] & words[base + 2048 + 4 * (256 * odd + high) + k]
            out[4 * i + k] = (words[base + 4 * index + k] ^ chosen) ^ flip


@_compile
def fetch(row: Any, start: int, count: int, history: int, out: Any) -> None:
    """Bytes start - AHEAD .. start + count of a column, and AHEAD more, into out: the history before them, zeros behind."""
    for i in range(AHEAD):
        at = start - AHEAD + i
        before = np.uint8((np.uint64(history) >> np.uint64(8 * ((at + AHEAD) & 7))) & np.uint64(255))
        out[i] = row[at] if at >= 0 else before
    have = min(count, len(row) - start)
    out[AHEAD : AHEAD + have] = row[start : start + have]
    out[AHEAD + have : 2 * AHEAD + count] = 0


@_compile
def _decode(code: Any, row: Any, words: Any, first: int, units: int, second: bool, held: Any, out: Any) -> None:
    """`units` units of a column, from unit `first` on, into out (8 words a unit); code = (lattice?, place or bits, half bytes a
    unit, history)."""
    count = units * code[2]
    fetch(row, first * code[2], count, code[3], held)
    if code[0]:
        _read_lattice(code[1], second, held[AHEAD:], words, out, units)
    else:
        _read_trellis(code[1], held.ctypes.data + AHEAD, words, out, units)


def windows_of(step_bits: int, entries: int) -> tuple[int, int, int, int, bool]:
    """(bytes before a unit where its first window starts, then constants of `vectors.windows`)."""
    reach, width, both = _window(step_bits, entries)
    behind = step_bits * (reach - 1)
    back = -(-behind // 8)
    return back, step_bits * (2 if both and entries == 1 else 1), 8 * back - behind, width, both


def _adder(step_bits: int, entries: int) -> Callable[..., None]:
    """add(address of the codes of four columns, bytes from one to the next, words, x, even, odd, units): for a trellis."""
    back, up, low, width, both = windows_of(step_bits, entries)
    advance = up if both else 2 * up

    def add(address: int, stride: int, words: int, x: int, even: int, odd: int, units: int) -> None:
        for i in range(units):
            add_windows(address - back + i * advance, stride, words, x, even + 32 * i, odd + 32 * i, up, low, width, both)

    return jit()(add)


_ADD = tuple(_adder(c.step_bits, c.entries) for c in CODES.values())
_add0, _add1, _add2, _add3, _add4, _add5, _add6, _add7, _add8, _add9 = _ADD


@_compile
def _add_trellis(which: int, address: int, stride: int, words: int, x: int, even: int, odd: int, units: int) -> None:
    """By the place of the width in CODES."""
    if which == 0:
        _add0(address, stride, words, x, even, odd, units)
    elif which == 1:
        _add1(address, stride, words, x, even, odd, units)
    elif which == 2:
        _add2(address, stride, words, x, even, odd, units)
    elif which == 3:
        _add3(address, stride, words, x, even, odd, units)
    elif which == 4:
        _add4(address, stride, words, x, even, odd, units)
    elif which == 5:
        _add5(address, stride, words, x, even, odd, units)
    elif which == 6:
        _add6(address, stride, words, x, even, odd, units)
    elif which == 7:
        _add7(address, stride, words, x, even, odd, units)
    elif which == 8:
        _add8(address, stride, words, x, even, odd, units)
    else:
        _add9(address, stride, words, x, even, odd, units)


@_compile
def _add_lattice(bits: int, address: int, stride: int, words: int, x: int, even: int, odd: int, units: int) -> None:
    for i in range(units):
        at, e, o = address + 2 * bits * i, even + 32 * i, odd + 32 * i
        if bits == 2:
            add_points(at, stride, words, x, e, o, 2, False)
        elif bits == 3:
            add_points(at, stride, words, x, e, o, 3, False)
            add_points(at, stride, words, x, e, o, 3, True)
        else:
            add_points(at, stride, words, x, e, o, 4, False)
            add_points(at, stride, words, x, e, o, 4, True)


@_compile
def _add(code: Any, address: int, stride: int, words: Any, x: int, even: Any, odd: Any, begin: int, units: int) -> None:
    """Four columns, units begin .. begin + units - 1 of a stretch's sums even and odd."""
    e, o = even.ctypes.data + 32 * begin, odd.ctypes.data + 32 * begin
    if code[0]:
        _add_lattice(code[1], address, stride, words.ctypes.data, x, e, o, units)
    else:
        _add_trellis(code[1], address, stride, words.ctypes.data, x, e, o, units)


@_compile
def multiply(x: Any, codes: Any, code: Any, words: Any, n: int, row: Any, y: Any, add: bool, first: int, last: int) -> None:
    """y (t, n) of row * (x C^T), set or added to, for x (t, d) and units first .. last - 1 of rows."""
    tokens, d = x.shape
    width, size = codes.shape[1], code[2]
    length = STRETCH // UNIT
    # a read may touch bytes before and behind a column: of its neighbours, or of a copy with room where there is none
    stride = length * size + 2 * AHEAD
    held, a = np.zeros((COLUMNS, stride), np.uint8), np.empty(COLUMNS, np.float32)
    even, odd = np.empty(8 * length, np.float32), np.empty(8 * length, np.float32)
    for t in range(tokens):
        for begin in range(first, last, length):
            units = min(length, last - begin)
            even[:], odd[:] = np.float32(0), np.float32(0)
            for j in range(0, d, COLUMNS):
                there = min(COLUMNS, d - j)
                for q in range(COLUMNS):
                    a[q] = x[t, j + q] if q < there else np.float32(0)
                copied = units if j == 0 or j + COLUMNS >= d else min(2, units) if begin == 0 else 0
                if copied:
                    for q in range(COLUMNS):
                        if q < there:
                            fetch(codes[j + q], begin * size, copied * size, code[3], held[q])
                        else:
                            held[q] = 0
                    _add(code, held.ctypes.data + AHEAD, stride, words, a.ctypes.data, even, odd, 0, copied)
                if units > copied:
                    address = codes.ctypes.data + j * width + (begin + copied) * size
                    _add(code, address, width, words, a.ctypes.data, even, odd, copied, units - copied)
            for k in range(min(UNIT * units, n - UNIT * begin)):
                at = UNIT * begin + k
                value = (odd[k >> 1] if k & 1 else even[k >> 1]) * row[at if len(row) > 1 else 0]
                y[t, at] = y[t, at] + value if add else value


@_compile
def unpack(codes: Any, code: Any, words: Any, out: Any, first: int) -> None:
    """out (columns, n), float32: columns of packed codes (d, bytes) from column `first` on."""
    n = out.shape[1]
    units = (n + UNIT - 1) // UNIT
    stages = 2 if code[0] and code[1] > 2 else 1
    held, found = np.empty(units * code[2] + 2 * AHEAD, np.uint8), np.empty(8 * units, np.uint32)
    up, mask = np.uint32(16), np.uint32(0xFFFF0000)
    for j in range(len(out)):
        to = out[j]
        for s in range(stages):
            _decode(code, codes[first + j], words, 0, units, s == 1, held, found)
            for k in range(n // 2):
                low, high = as_float(found[k] << up), as_float(found[k] & mask)
                to[2 * k] = to[2 * k] + low if s else low
                to[2 * k + 1] = to[2 * k + 1] + high if s else high
            if n % 2:
                low = as_float(found[n // 2] << up)
                to[n - 1] = to[n - 1] + low if s else low


@_compile
def unpack_halves(codes: Any, code: Any, words: Any, out: Any, column: int, unit: int) -> None:
    """out (columns, rows), bfloat16: of packed codes (d, bytes), columns from `column` and rows from a unit on."""
    m, up = out.shape[1], np.uint32(16)
    units = (m + UNIT - 1) // UNIT
    held, words_found = np.empty(units * code[2] + 2 * AHEAD, np.uint8), np.empty((2, 8 * units), np.uint32)
    found = words_found.view(np.uint16)
    for j in range(len(out)):
        _decode(code, codes[column + j], words, unit, units, False, held, words_found[0])
        out[j] = found[0, :m]
        if code[0] and code[1] > 2:
            _decode(code, codes[column + j], words, unit, units, True, held, words_found[1])
            for i in range(m):  # sums of two stages are exact in bfloat16
                out[j, i] = as_half(as_float(np.uint32(found[0, i]) << up) + as_float(np.uint32(found[1, i]) << up))


def code_of(grid: str, bits: float) -> tuple[np.ndarray, np.ndarray]:
    """(code, words) of a grid by columns, as `multiply` takes them; the history as a signed 64-bit number."""
    if grid == "lattice":
        return np.array([1, int(bits), 2 * int(bits), 0], np.int64), lattice_book(bits)
    words, history = trellis_book(bits)
    fields = np.array([0, trellis.WIDTHS.index(bits), int(2 * bits), 0], np.int64)
    fields[3] = np.array(history, np.uint64).view(np.int64)
    return fields, words
