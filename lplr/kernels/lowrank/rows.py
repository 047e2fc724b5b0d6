"""Products with matrices that are packed by rows, uniform or of any levels, from tables of signed sums (see `vectors`).

Any function of the B bits of a code is a sum over sets of its bits: with signs s_k = 2 bit_k - 1 and coefficients from the Walsh
transform of the levels,

    level(c) = sum over masks m of a_m prod_{k in m} s_k,        sum_j level(c_ij) x_j = sum_m a_m sum_j s^m_ij x_j,

and a product of signs is the sign of an exclusive or of bits.  A uniform grid has B terms, a_m = 2^k at m = {k}, normal_float up
to 2^B.  Activations are rounded to whole numbers of at most 1023 for each 32 of them, about as finely as bfloat16 does; a second
pass with what that leaves makes it 2^-20 of the largest, for activations of more bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lplr.kernels.backend import jit
from lplr.kernels.lowrank.vectors import BLOCK, GROUPS, LANES, LARGEST, TABLE, TILE, add_block, write_tables

_compile = jit("contract")


def terms(levels: np.ndarray) -> np.ndarray:
    """Masks m and coefficients a_m of levels (2^B,), float64: (2, count), float32; the first is the constant."""
    a = levels.astype(np.float64)
    for k in range(len(a).bit_length() - 1):
        pairs = a.reshape(-1, 2, 1 << k)
        # level = mean + half difference * s_k
        a = np.stack([(pairs[:, 0] + pairs[:, 1]) / 2, (pairs[:, 1] - pairs[:, 0]) / 2], 1).reshape(-1)
    # a product of signs 2 b - 1 is the sign of the bits' exclusive or, but for (-1)^(|m| - 1)
    odd = np.array([(bin(m).count("1") - 1) % 2 if m else 0 for m in range(len(a))])
    kept = [0, *(m for m in range(1, len(a)) if a[m])]
    return np.array([kept, np.where(odd == 1, -a, a)[kept]], np.float32)


def blocks(d: int) -> int:
    """Blocks of activations in d of them."""
    return -(-d // BLOCK)


def interleave(codes: np.ndarray, bits: int, d: int) -> np.ndarray:
    """Packed codes (n, bytes) of d columns -> (tiles, blocks, bits, GROUPS, LANES) bytes: bit planes for `add_block`."""
    tiles = -(-len(codes) // TILE)
    out = np.zeros((tiles, blocks(d), bits, GROUPS, LANES), np.uint8)
    _interleave(codes, bits, d, out)
    return out


@_compile
def _interleave(codes: Any, bits: int, d: int, out: Any) -> None:
    for i in range(len(codes)):
        tile, lane = i // TILE, i % TILE
        up = 0 if lane < LANES else 4
        lane %= LANES
        for j in range(d):
            block, group, place = j // BLOCK, j % BLOCK // 4, j % 4
            for k in range(bits):
                at = j * bits + k
                out[tile, block, k, group, lane] |= (codes[i, at >> 3] >> (at & 7) & 1) << (up + place)


@_compile
def prepare(x: Any, col: Any, tables: Any, scales: Any) -> bool:
    """Tables (t, passes, blocks * GROUPS * TABLE) and scales (t, passes, blocks + 1) of x (t, d) * col.

    A second pass rounds what the first leaves.  The last scale of the first pass is the sum of what all of them stand for.
    False when a number is not finite: there is no whole number for it.
    """
    d, passes, count = x.shape[1], scales.shape[1], scales.shape[2] - 1
    part, numbers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int16)
    for t in range(len(x)):
        total = np.float32(0)
        for k in range(count):
            first = k * BLOCK
            have = min(BLOCK, d - first)
            part[have:] = np.float32(0)
            if len(col) > 1:
                for i in range(have):
                    part[i] = x[t, first + i] * col[first + i]
            else:
                for i in range(have):
                    part[i] = x[t, first + i] * col[0]
            for p in range(passes):
                top, spoiled = np.float32(0), np.float32(0)
                for i in range(BLOCK):
                    top = max(top, abs(part[i]))
                    spoiled += part[i] * np.float32(0)
                if spoiled != 0:  # infinity or no number
                    return False
                scale = top / np.float32(LARGEST)
                inverse = np.float32(1) / scale if scale > np.float32(1e-37) else np.float32(0)
                whole = np.int32(0)
                for i in range(BLOCK):
                    number = np.rint(part[i] * inverse)
                    part[i] -= number * scale
                    numbers[i] = np.int16(number)
                    whole += np.int32(number)
                scales[t, p, k] = scale
                total += np.float32(whole) * scale
                write_tables(numbers.ctypes.data, tables[t, p].ctypes.data + k * GROUPS * TABLE)
        scales[t, 0, count] = total
    return True


@_compile
def blocks_of(d: int) -> int:
    """`blocks`, compiled."""
    return (d + BLOCK - 1) // BLOCK


@_compile
def _exclusive(planes: Any, out: Any) -> None:
    """out (2^B, bytes): the exclusive or of every set of planes (B, bytes)."""
    out[0] = 0
    for b in range(len(planes)):
        for m in range(1 << b):
            to, rest, plane = out[(1 << b) + m], out[m], planes[b]
            for i in range(len(plane)):
                to[i] = rest[i] ^ plane[i]


@_compile
def _add_signs(codes: int, tables: int, scales: Any, count: int, coefficient: float, sums: int) -> None:
    """The blocks of a tile of signs in one pass: a loop that has to be short."""
    for k in range(count):
        add_block(codes + k * GROUPS * LANES, tables + k * GROUPS * TABLE, scales[k] * coefficient, sums)


@_compile
def multiply(tables: Any, scales: Any, codes: Any, term: Any, n: int, row: Any, y: Any, add: bool, first: int, last: int) -> None:
    """y (t, n) of row * (x C^T), set or added to, in tiles first .. last - 1, for `interleave`d codes and coefficients term."""
    tokens, passes, count = scales.shape[0], scales.shape[1], scales.shape[2] - 1
    planes, plane, many = codes.shape[2], GROUPS * LANES, term.shape[1] - 1
    joined = many > planes  # there are exclusive ors among the terms
    mixed, sums = np.empty((1 << planes if joined else 1, plane), np.uint8), np.empty(TILE, np.float32)
    offset, coefficient = np.empty(many, np.int64), np.empty(many, np.float32)  # of the bytes of each term; its a_m
    for i in range(many):
        m, lowest = int(term[0, 1 + i]), 0
        while not m >> lowest & 1:
            lowest += 1
        offset[i], coefficient[i] = (m if joined else lowest) * plane, term[1, 1 + i]
    codes_at, tables_at, mixed_at, sums_at = codes.ctypes.data, tables.ctypes.data, mixed.ctypes.data, sums.ctypes.data
    pass_bytes = count * GROUPS * TABLE
    for tile in range(first, last):
        rows = min(TILE, n - tile * TILE)
        for t in range(tokens):
            sums[:] = term[1, 0] * scales[t, 0, count]
            if many == 1 and passes == 1 and not joined:
                block = codes_at + tile * count * plane
                _add_signs(block, tables_at + t * pass_bytes, scales[t, 0], count, coefficient[0], sums_at)
            for k in range(count if many > 1 or passes > 1 or joined else 0):
                block = codes_at + (tile * count + k) * planes * plane
                table = tables_at + t * passes * pass_bytes + k * GROUPS * TABLE
                if joined:
                    _exclusive(codes[tile, k].reshape(planes, plane), mixed)
                    block = mixed_at
                for p in range(passes):
                    scale = scales[t, p, k]
                    for i in range(many):
                        add_block(block + offset[i], table + p * pass_bytes, scale * coefficient[i], sums_at)
            for i in range(rows):
                at = tile * TILE + i
                value = sums[i] * row[at if len(row) > 1 else 0]
                y[t, at] = y[t, at] + value if add else value


@_compile
def unpack(codes: Any, bits: int, levels: Any, out: Any, first: int) -> None:
    """out (rows, d): the levels of packed codes (n, bytes) from row `first` on."""
    mask = (1 << bits) - 1
    for i in range(len(out)):
        row = codes[first + i]
        for j in range(out.shape[1]):
            at = j * bits
            byte, shift = at >> 3, at & 7
            word = np.uint32(row[byte])
            if shift + bits > 8:
                word |= np.uint32(row[byte + 1]) << np.uint32(8)
            out[i, j] = levels[(word >> np.uint32(shift)) & np.uint32(mask)]
