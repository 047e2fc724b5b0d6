"""The Triton kernels of `kernels.matmul`: one token of the uniform grid, or a tile of tokens, of codes stored by rows or columns.

All sum over a part of the d inputs (split-K) in float32.  With one part the result is scaled and stored; with several, each
stores its sums, and `finish` adds them in a fixed order: the same numbers every time.  For a prompt, `points_*` write some rows
of the matrix for another product.
"""

# a compile-time constant is an int where it is passed and a `constexpr` where it is used:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl

from lplr.kernels.matmul.tiles import (
    apart,
    between_one_and_two,
    field,
    lattice_points,
    load_groups,
    row_points,
    trellis_points,
    trellis_words,
)


@triton.jit
def load_scaled(x, col, at, seen, COL: tl.constexpr):
    """x * col in float32; COL is the step between column scales: 1, 0 for one scale, -1 for none."""
    value = tl.load(x + at, mask=seen, other=0).to(tl.float32)
    if COL >= 0:
        value *= tl.load(col + at * COL, mask=seen, other=0).to(tl.float32)
    return value


@triton.jit
def store(y, row_scale, out, place, row, seen, part, size, ROW: tl.constexpr, PARTS: tl.constexpr):
    """Scale and store the sums y at `place` of out, or one part's sums as they are, `size` apart from the next part's."""
    if PARTS > 1:
        out += part.to(tl.int64) * size
        tl.store(out + place, y, mask=seen)
    else:
        if ROW >= 0:
            y *= tl.load(row_scale + row * ROW, mask=seen, other=0).to(tl.float32)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=seen)


@triton.jit
def decode_uniform(
    x, col, codes, table, row_scale, out, n, d, units, blocks, part, ratio,
    BITS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    COL: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One token: ROWS outputs a program, each thread sums over its own groups; one exchange between threads, at the end.

    With v = 1 + c / 2^B a uniform level is 2^(B+1) v - (2^(B+1) + 2^B - 1): sums of v x and of x are enough.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, GROUPS], tl.float32)
    of_x = tl.zeros([1, GROUPS], tl.float32)
    first = tl.program_id(1) * blocks
    for block in range(first, first + blocks):
        at = block * (GROUPS * 128) + tl.arange(0, GROUPS * 128)
        values = load_scaled(x, col, at, at < d, COL)  # before the codes: the layout of the later load is the one that is kept
        of_x += tl.sum(tl.reshape(values, [1, GROUPS, 128]), 2)
        each = apart(values, GROUPS)
        words = load_groups(codes, row, row < n, block * GROUPS, units, UNIT, BITS, 4, GROUPS)
        for k in tl.static_range(128):
            sums += between_one_and_two(field(words, k * BITS, BITS), BITS) * each[k]
    sums = sums * (2 << BITS) - of_x * ((2 << BITS) + (1 << BITS) - 1)
    y = tl.sum(sums, 1) * ratio
    store(y, row_scale, out, row, row, row < n, part + tl.program_id(1), n, ROW, PARTS)


@triton.jit
def load_tile(x, col, token, m, at, d, stride, COL: tl.constexpr):
    """A tile (tokens, inputs) of x * col."""
    seen = (token < m)[:, None] & (at < d)[None, :]
    first = tl.min(token, 0)  # offsets within a tile fit in 32 bits: fewer registers
    tile = tl.load(x + first.to(tl.int64) * stride + ((token - first)[:, None] * stride + at[None, :]), mask=seen, other=0)
    if COL >= 0:
        scale = tl.load(col + at * COL, mask=at < d, other=0).to(tl.float32)
        tile = tile.to(tl.float32) * scale[None, :]
    return tile


@triton.jit
def multiply(points, tile, sums, PIECES: tl.constexpr, EXACT: tl.constexpr):
    """sums (r, t) += points (r, k) tile^T (k, t), in bfloat16 products whose sums are float32.

    The tile is taken as a sum of PIECES bfloat16 tiles, 8 bits each; points that are not exact in bfloat16 as a sum of two.
    """
    high = points.to(tl.bfloat16)
    if PIECES == 1:
        return tl.dot(high, tl.trans(tile.to(tl.bfloat16)), sums)
    rest = tile.to(tl.float32)
    for _ in range(PIECES):  # not unrolled: one piece in registers at a time
        piece = rest.to(tl.bfloat16)
        sums = tl.dot(high, tl.trans(piece), sums)
        if not EXACT:
            sums = tl.dot((points - high.to(tl.float32)).to(tl.bfloat16), tl.trans(piece), sums)
        rest -= piece.to(tl.float32)
    return sums


@triton.jit
def store_tile(y, row_scale, out, token, m, row, n, part, ROW: tl.constexpr, PARTS: tl.constexpr):
    """`store` of a tile (tokens, outputs)."""
    first = tl.min(token, 0)
    seen = (token < m)[:, None] & (row < n)[None, :]
    place = (token - first)[:, None] * n + row[None, :]
    rows = tl.broadcast_to(row[None, :], y.shape)
    size = tl.full([], 1, tl.int64) * m * n  # a size of one is a number of the compiler's, not a tensor
    store(y, row_scale, out + first.to(tl.int64) * n, place, rows, seen, part, size, ROW, PARTS)


@triton.jit
def tile_rows(
    x, col, codes, table, row_scale, out, m, n, d, stride, units, blocks, part, ratio,
    GRID: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    PIECES: tl.constexpr, COL: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile (TOKENS, ROWS) of the result by tensor cores, 32 WIDE inputs at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    first = tl.program_id(2) * blocks
    for block in range(first, first + blocks):
        tile = load_tile(x, col, token, m, block * (32 * WIDE) + tl.arange(0, 32 * WIDE), d, stride, COL)
        words = load_groups(codes, row, row < n, block, units, UNIT, BITS, WIDE, 1)
        sums = multiply(row_points(words, table, GRID, BITS, WIDE), tile, sums, PIECES, GRID == "uniform")
    store_tile(tl.trans(sums) * ratio, row_scale, out, token, m, row, n, part + tl.program_id(2), ROW, PARTS)


@triton.jit
def tile_lattice(
    x, col, codes, table, row_scale, out, m, n, d, stride, units, blocks, part, ratio,
    BITS: tl.constexpr, UNIT: tl.constexpr, VECTORS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, SHIFT: tl.constexpr, EVEN_2: tl.constexpr, SHIFT_2: tl.constexpr,
    PIECES: tl.constexpr, COL: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile (TOKENS, VECTORS * 8) of the result by tensor cores, COLUMNS inputs at a time."""
    row = tl.program_id(0) * (VECTORS * 8) + tl.arange(0, VECTORS * 8)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    sums = tl.zeros([VECTORS * 8, TOKENS], tl.float32)
    first = tl.program_id(2) * blocks
    for block in range(first, first + blocks):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        tile = load_tile(x, col, token, m, column, d, stride, COL)
        points = lattice_points(
            codes, column, column < d, tl.program_id(0), units, table, UNIT, BITS, VECTORS, 1, EVEN, SHIFT, EVEN_2, SHIFT_2
        )
        sums = multiply(tl.trans(points), tile, sums, PIECES, True)
    store_tile(tl.trans(sums) * ratio, row_scale, out, token, m, row, n, part + tl.program_id(2), ROW, PARTS)


@triton.jit
def tile_trellis(
    x, col, codes, table, row_scale, out, m, n, d, stride, units, blocks, part, ratio,
    STEP: tl.constexpr, ENTRIES: tl.constexpr, HISTORY: tl.constexpr, UNIT: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, COL: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `tile_lattice`."""
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    sums = tl.zeros([128, TOKENS], tl.float32)
    states = tl.load(table + tl.arange(0, 4096))
    first = tl.program_id(2) * blocks
    for block in range(first, first + blocks):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        tile = load_tile(x, col, token, m, column, d, stride, COL)
        words = trellis_words(codes, column, column < d, tl.program_id(0), units, UNIT, STEP, ENTRIES, 1, HISTORY)
        points = trellis_points(words, states, STEP, ENTRIES)
        sums = multiply(tl.trans(points), tile, sums, PIECES, True)
    store_tile(tl.trans(sums) * ratio, row_scale, out, token, m, row, n, part + tl.program_id(2), ROW, PARTS)


@triton.jit
def store_points(points, out, along, across, seen_along, seen_across, stride):
    """Points (r, k) at rows `along` and columns `across` of out, whose rows are `stride` apart."""
    place = along.to(tl.int64)[:, None] * stride + across[None, :]
    tl.store(out + place, points.to(out.dtype.element_ty), mask=seen_along[:, None] & seen_across[None, :])


@triton.jit
def points_rows(
    codes, table, out, first, last, d, stride, units,
    GRID: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The points of rows first .. last - 1 by rows of out, a tile (ROWS, 32 WIDE) a program."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * (32 * WIDE) + tl.arange(0, 32 * WIDE)
    words = load_groups(codes, first + at, first + at < last, tl.program_id(1), units, UNIT, BITS, WIDE, 1)
    store_points(row_points(words, table, GRID, BITS, WIDE), out, at, column, first + at < last, column < d, stride)


@triton.jit
def points_lattice(
    codes, table, out, first, last, d, stride, units,
    BITS: tl.constexpr, UNIT: tl.constexpr, VECTORS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, SHIFT: tl.constexpr, EVEN_2: tl.constexpr, SHIFT_2: tl.constexpr,
):  # fmt: skip
    """The same by columns of out, a tile (COLUMNS, VECTORS * 8) a program; VECTORS * 8 divides `first`."""
    at = tl.program_id(0) * (VECTORS * 8) + tl.arange(0, VECTORS * 8)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group = first // (VECTORS * 8) + tl.program_id(0)
    points = lattice_points(
        codes, column, column < d, group, units, table, UNIT, BITS, VECTORS, 1, EVEN, SHIFT, EVEN_2, SHIFT_2
    )
    store_points(points, out, column, at, column < d, first + at < last, stride)


@triton.jit
def points_trellis(
    codes, table, out, first, last, d, stride, units,
    STEP: tl.constexpr, ENTRIES: tl.constexpr, HISTORY: tl.constexpr, UNIT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `points_lattice`; 128 divides `first`."""
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    states = tl.load(table + tl.arange(0, 4096))
    words = trellis_words(codes, column, column < d, first // 128 + tl.program_id(0), units, UNIT, STEP, ENTRIES, 1, HISTORY)
    points = trellis_points(words, states, STEP, ENTRIES)
    store_points(points, out, column, at, column < d, first + at < last, stride)


@triton.jit
def finish(parts, row_scale, out, size, n, PARTS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over the parts (PARTS, size), times the row scale."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        y += tl.load(parts + part * size + at, mask=at < size, other=0)
    if ROW >= 0:
        y *= tl.load(row_scale + (at % n) * ROW, mask=at < size, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < size)
