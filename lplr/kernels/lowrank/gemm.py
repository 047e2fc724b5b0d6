"""Products of many tokens, in bfloat16 with float32 sums, where the processor multiplies pairs of bfloat16 (avx512_bf16).

A panel is PANEL outputs of a stretch of inputs, in the order the product reads: for each pair of neighbouring inputs PANEL pairs
of points.  Panels are decoded just before they are used, BOTH at once, and stay in the nearer caches; all tokens go over
them, at most TOKENS at a time, whose sums stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from lplr.kernels.backend import jit
from lplr.kernels.lowrank.columns import AHEAD, COLUMNS, UNIT, fetch, windows_of
from lplr.kernels.lowrank.emit import F32, I8, I16, I32, I64, call, case, instruction, load, places, repeated, store, vector
from lplr.kernels.lowrank.layer import BY_ROW
from lplr.kernels.lowrank.vectors import BLOCK, FEATURES, GROUPS, LANES, as_half, lattice_points, prefetch, windows
from lplr.kernels.trellis.reference import CODES, Code

# before LLVM 16 (numba 0.61) the product of pairs takes words, not bfloat
AVAILABLE = llvm.llvm_version_info[0] >= 16 and all(FEATURES.get(name) for name in ("avx512bf16", "avx512bw", "avx512f"))
AMX = FEATURES.get("amx-bf16", False)  # torch's products are then several times as fast
VECTORS = 4  # vectors of 16 outputs of a panel
PANEL = 16 * VECTORS
BOTH = 2  # panels decoded at once: the rows of a tile of `rows`
TOKENS = 6  # TOKENS * VECTORS sums, VECTORS of points and one of an activation fit 32 registers
FAR = 8  # fours of columns that are fetched ahead
STRETCH = 1024  # inputs of a panel
_TABLE_BITS = 5  # of an index into a vector of points
_compile = jit("contract")
_PAIR_BYTES = 4 * PANEL  # of a pair of inputs in a panel


class _BFloat(ir.Type):
    """llvmlite knows no bfloat."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_HALVES, _SUMS, _WORDS, _SHORTS = (ir.VectorType(e, k) for e, k in ((_BFloat(), 32), (F32, 16), (I32, 16), (I16, 32)))


@instruction
def add_products(context: Any, tokens: Any, x: Any, stride: Any, panel: Any, pairs: Any, sums: Any) -> Any:
    """sums (tokens, PANEL) += x panel^T, for 1 .. TOKENS tokens and `pairs` pairs of inputs, one at least.

    Addresses: of x, bfloat16, tokens `stride` bytes apart, of a panel and of float32 sums.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        tokens, x, stride, panel, pairs, sums = args
        case(b, tokens, {n: partial(_products, b, n, x, stride, panel, pairs, sums) for n in range(1, TOKENS + 1)})
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _products(b: Any, tokens: int, x: Any, stride: Any, panel: Any, pairs: Any, sums: Any) -> None:
    """A loop over pairs for a number of tokens."""
    one = ir.Constant(I64, 1)
    place = [(t, v) for t in range(tokens) for v in range(VECTORS)]
    at = [b.add(x, b.mul(stride, ir.Constant(I64, t))) for t in range(tokens)]
    start = [load(b, sums, 4 * (PANEL * t + 16 * v), _SUMS) for t, v in place]
    before, loop, after = b.block, b.append_basic_block("pairs"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    i, totals = b.phi(I64), [b.phi(_SUMS) for _ in place]
    points = b.add(panel, b.mul(i, ir.Constant(I64, _PAIR_BYTES)))
    vectors = [b.bitcast(load(b, points, 64 * v, _WORDS), _HALVES) for v in range(VECTORS)]
    found = []
    for t in range(tokens):
        pair = repeated(b, load(b, b.add(at[t], b.mul(i, ir.Constant(I64, 4))), 0, I32), 16)
        for v in range(VECTORS):
            arguments = [totals[VECTORS * t + v], b.bitcast(pair, _HALVES), vectors[v]]
            found.append(call(b, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, arguments))
    following = b.add(i, one)
    b.cbranch(b.icmp_signed("<", following, pairs), loop, after)
    for phi, first, later in zip([i, *totals], [ir.Constant(I64, 0), *start], [following, *found], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)
    b.position_at_end(after)
    for (t, v), value in zip(place, found, strict=True):
        store(b, value, sums, 4 * (PANEL * t + 16 * v))


@instruction
def spread_group(context: Any, bits: Any, codes: Any, table: Any, out: Any, apart: Any) -> Any:
    """The points of four inputs (a group) and 2 LANES rows, from codes of `rows.interleave`, into two panels `apart` bytes.

    Addresses: of the first plane, of 32 points (bfloat16) that repeat the levels, of the first panel.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        bits, codes, table, out, apart = args
        case(b, bits, {n: partial(_spread, b, n, codes, table, out, apart) for n in range(1, 9)})
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _spread(b: Any, bits: int, codes: Any, table: Any, out: Any, apart: Any) -> None:
    levels = load(b, table, 0, _SHORTS)
    outs = out, b.add(out, apart)
    for v in range(VECTORS):
        # every byte in both halves of a word, twice
        planes = []
        for k in range(bits):
            some = load(b, codes, GROUPS * LANES * k + 16 * v, ir.VectorType(I8, 16))
            planes.append(b.bitcast(places(b, some, [i // 4 for i in range(64)]), _SHORTS))
        for half in (0, 1):
            for pair in (0, 1):
                place = [4 * half + 2 * pair + i % 2 for i in range(32)]
                words = _points(b, planes, place, levels)
                store(b, words, outs[half], _PAIR_BYTES * pair + 64 * v)


def _points(b: Any, planes: list[Any], place: list[int], levels: Any) -> Any:
    """The points, bfloat16, of codes whose bits are at a place of a byte, repeated, of their planes."""
    bits = len(planes)
    if bits == 1:  # signs
        sign = b.and_(b.shl(planes[0], vector(I16, [7 - p for p in place])), vector(I16, [0x8000] * 32))
        return b.xor(sign, vector(I16, [0xBF80] * 32))
    code = None
    for k, plane in enumerate(planes):
        moved = b.lshr(plane, vector(I16, [p + 8 - k for p in place]))
        lower = vector(I16, [(1 << k) - 1] * 32)
        code = moved if code is None else b.or_(b.and_(code, lower), b.and_(moved, b.not_(lower)))
    if bits <= _TABLE_BITS:
        return call(b, "llvm.x86.avx512.permvar.hi.512", _SHORTS, [levels, code])
    top = (1 << bits) - 1
    code = b.bitcast(b.and_(code, vector(I16, [top] * 32)), _WORDS)
    low, high = b.and_(code, vector(I32, [top] * 16)), b.lshr(code, vector(I32, [16] * 16))
    found = []
    for part in (low, high):
        number = b.sub(b.shl(part, vector(I32, [1] * 16)), vector(I32, [top] * 16))
        found.append(b.bitcast(b.sitofp(number, _SUMS), _WORDS))
    joined = b.or_(b.lshr(found[0], vector(I32, [16] * 16)), b.and_(found[1], vector(I32, [0xFFFF0000] * 16)))
    return b.bitcast(joined, _SHORTS)


@instruction
def spread_columns(context: Any, lattice: Any, which: Any, codes: Any, stride: Any, words: Any, out: Any, apart: Any) -> Any:
    """The points of four columns, 2 PANEL rows, into two panels `apart` bytes; the first fields of `columns.code_of`.

    Addresses: of the codes of the first column, the others `stride` bytes on, of their words and of the first panel.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        lattice, which, codes, stride, words, out, apart = args

        def trellis(c: Code) -> None:
            back, up, low, width, both = windows_of(c.step_bits, c.entries)
            start = b.sub(codes, ir.Constant(I64, back))
            size = UNIT * c.step_bits // (8 * c.entries)
            _spread_units(b, lambda at: windows(b, at, stride, words, up, low, width, both), start, size, out, apart)

        def points(bits: int, at: Any) -> list[Any]:
            found = lattice_points(b, at, stride, words, bits, False)
            if bits == 2:
                return found
            return [_sum(b, *pair) for pair in zip(found, lattice_points(b, at, stride, words, bits, True), strict=True)]

        with b.if_else(b.icmp_signed("==", lattice, ir.Constant(I64, 0))) as (then, otherwise):
            with then:
                case(b, which, {i: partial(trellis, c) for i, c in enumerate(CODES.values())})
            with otherwise:
                emit = {k: partial(_spread_units, b, partial(points, k), codes, 2 * k, out, apart) for k in (2, 3, 4)}
                case(b, which, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def _spread_units(b: Any, points: Callable[[Any], list[Any]], codes: Any, size: int, out: Any, apart: Any) -> None:
    """Units of 16 rows, `size` bytes of a column: for each a vector of pairs of the first two columns, one of the others."""
    with cgutils.for_range(b, ir.Constant(I64, BOTH * VECTORS), intp=I64) as loop:
        found = points(b.add(codes, b.mul(loop.index, ir.Constant(I64, size))))
        panel, place = b.udiv(loop.index, ir.Constant(I64, VECTORS)), b.urem(loop.index, ir.Constant(I64, VECTORS))
        to = b.add(b.add(out, b.mul(panel, apart)), b.mul(place, ir.Constant(I64, 64)))
        for k in (0, 1):
            pair = [b.bitcast(words, ir.VectorType(I16, UNIT)) for words in found[2 * k : 2 * k + 2]]
            joined = b.shuffle_vector(*pair, vector(I32, [UNIT * (i % 2) + i // 2 for i in range(2 * UNIT)]))
            store(b, joined, to, k * _PAIR_BYTES)


def _sum(b: Any, first: Any, second: Any) -> Any:
    """The sums of both halves, bfloat16, of two vectors of 8 words; they are exact in it."""
    up, mask, wide = vector(I32, [16] * 8), vector(I32, [0xFFFF0000] * 8), ir.VectorType(F32, 8)
    low = b.fadd(*(b.bitcast(b.shl(v, up), wide) for v in (first, second)))
    high = b.fadd(*(b.bitcast(b.and_(v, mask), wide) for v in (first, second)))
    return b.or_(b.lshr(b.bitcast(low, first.type), up), b.bitcast(high, first.type))


@_compile
def _fill_by_row(codes: int, bits: int, table: int, begin: int, end: int, panels: Any) -> None:
    """Two panels of a tile's blocks begin .. end - 1."""
    for k in range(begin, end):
        for g in range(GROUPS):
            to = panels.ctypes.data + ((k - begin) * GROUPS + g) * 2 * _PAIR_BYTES
            spread_group(bits, codes + (k * bits * GROUPS + g) * LANES, table, to, panels.strides[0])


@_compile
def _fill_by_column(codes: Any, code: Any, words: int, tile: int, begin: int, end: int, held: Any, panels: Any) -> None:
    """Two panels of columns begin .. end - 1, and of as many more as make fours, whatever these hold."""
    d, width = codes.shape
    size = BOTH * PANEL // UNIT * code[2]
    start = tile * size
    for j in range(begin, end, COLUMNS):
        at, stride = codes.ctypes.data + j * width + start, width
        for q in range(COLUMNS):
            prefetch(at + (q + FAR * COLUMNS) * width)  # no prefetcher of a processor sees that one line a column is read
        # what a read touches before and behind has to be there, and before the first rows a history
        if tile == 0 or (j + COLUMNS - 1) * width + start + size + AHEAD > d * width:
            at, stride = held.ctypes.data + AHEAD, held.shape[1]
            for q in range(min(COLUMNS, d - j)):
                fetch(codes[j + q], start, size, code[3], held[q])
        to = panels.ctypes.data + (j - begin) // 2 * _PAIR_BYTES
        spread_columns(code[0], code[1], at, stride, words, to, panels.strides[0])


@_compile
def multiply(x: Any, fields: Any, codes: Any, words: Any, row: Any, y: Any, add: bool, first: int, last: int) -> None:
    """y (t, n), float32, set or added to: row * (x C^T) in tiles first .. last - 1 of BOTH * PANEL rows, for x by `halves`.

    words: `table`, of a matrix by columns its own.  What is made here is handed on as arrays: one whose address alone is used
    later is freed before.
    """
    n, d, by_row = fields[1], fields[2], fields[0] == BY_ROW
    panels, sums = np.empty((BOTH, STRETCH * PANEL), np.uint16), np.empty((BOTH, len(x), PANEL), np.float32)
    held = np.zeros((COLUMNS, BOTH * PANEL // UNIT * fields[6] + 2 * AHEAD), np.uint8)
    for tile in range(first, last):
        sums[:] = np.float32(0)
        for begin in range(0, d, STRETCH):
            end = min(d, begin + STRETCH)
            if by_row:
                blocks = begin // BLOCK, (end + BLOCK - 1) // BLOCK
                _fill_by_row(codes[tile].ctypes.data, fields[4], words.ctypes.data, blocks[0], blocks[1], panels)
            else:
                _fill_by_column(codes, fields[4:], words.ctypes.data, tile, begin, end, held, panels)
            _accumulate(x, begin, (end - begin + 1) // 2, panels, sums)
        _finish(sums, row, y, add, tile * BOTH * PANEL, n)


@_compile
def _accumulate(x: Any, begin: int, pairs: int, panels: Any, sums: Any) -> None:
    """sums (BOTH, t, PANEL) += x (t, from `begin` on, `pairs` pairs) times the panels."""
    tokens, stride = len(x), x.strides[0]
    groups = (tokens + TOKENS - 1) // TOKENS
    for p in range(BOTH):
        for g in range(groups):
            t, end = tokens * g // groups, tokens * (g + 1) // groups
            at = x.ctypes.data + t * stride + 2 * begin
            add_products(end - t, at, stride, panels[p].ctypes.data, pairs, sums[p, t].ctypes.data)


@_compile
def _finish(sums: Any, row: Any, y: Any, add: bool, start: int, n: int) -> None:
    """y (t, n), set or added to, of sums (BOTH, t, PANEL) of rows from `start` on."""
    scale = np.empty(PANEL, np.float32)
    for p in range(BOTH):
        i = start + p * PANEL
        here = min(PANEL, n - i)
        for k in range(here):
            scale[k] = row[i + k if len(row) > 1 else 0]
        for t in range(len(y) if here > 0 else 0):
            total, to = sums[p, t], y[t, i : i + here]
            if add:
                for k in range(here):
                    to[k] += total[k] * scale[k]
            else:
                for k in range(here):
                    to[k] = total[k] * scale[k]


@_compile
def halves(x: Any, col: Any, first: int, d: int, out: Any) -> None:
    """out (t, at least d), bfloat16: x (t, from `first` on), float32, times col (d,) or (1,), rounded once; zeros behind."""
    for t in range(len(x)):
        part, to = x[t, first : first + d], out[t]
        if len(col) > 1:
            for j in range(d):
                to[j] = as_half(part[j] * col[j])
        else:
            for j in range(d):
                to[j] = as_half(part[j] * col[0])
        to[d:] = 0


@cache
def in_torch() -> bool:
    """Whether torch's products of bfloat16 are the processor's."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def width(d: int) -> int:
    """Activations a token that `multiply` reads."""
    return -(-d // BLOCK) * BLOCK


def tiles(n: int) -> int:
    """Tiles of n rows."""
    return -(-n // (BOTH * PANEL))


@cache
def table(bits: int) -> np.ndarray:
    """What `multiply` takes for words of a uniform grid: its points in bfloat16, repeated to 32; wider ones are computed."""
    if bits > _TABLE_BITS:
        return np.zeros(16, np.uint32)
    points = 2 * torch.arange(32, device="cpu") % (2 << bits) - ((1 << bits) - 1)
    return points.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint32)
