"""A whole layer in one compiled call: rotate, scale, R, scale, L, backbone, scale, rotate back, for a few tokens.

A matrix is five arrays (fields, codes, words, row scale, column scale), see `matrix`; fields are (kind, n, d, first column of x,
then the code of `columns`).  The same functions, one product at a time, serve matrices that are worth two threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]  (documented as numba.carray)

from lplr.kernels import levels, normal_float
from lplr.kernels.backend import jit
from lplr.kernels.lowrank import columns, rows
from lplr.kernels.lowrank.rotation import rotate
from lplr.kernels.lowrank.vectors import GROUPS, LANES, TABLE, TILE, float_at, half_at, pointer, put_float, put_half

NOTHING, BY_ROW, BY_COLUMN = 0, 1, 2
_compile = jit("contract")
_UNIT = columns.UNIT
_blocks, _prepare, _by_row, _by_column = rows.blocks_of, rows.prepare, rows.multiply, columns.multiply

Matrix = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_FIELDS = 8
_HEAD, _PLACE = 4, _FIELDS + 9  # numbers of a `record` before its matrices, and of each of them


def points(grid: str, bits: float) -> np.ndarray:
    """The levels (2^bits,), float32, of a grid by rows."""
    if grid == "normal_float":
        return normal_float.levels(bits).numpy()
    return 2 * np.arange(1 << int(bits), dtype=np.float32) - ((1 << int(bits)) - 1)


def matrix(
    codes: np.ndarray, shape: tuple[int, int], grid: str, bits: float, row: np.ndarray, col: np.ndarray, first: int = 0
) -> Matrix:
    """The form in which the products read a packed matrix, whose columns belong to x from `first` on.

    By rows the codes are copied in the order in which tables are looked up, as many bytes up to padding; by columns they are
    the stored ones.
    """
    n, d = shape
    fields = np.array([BY_ROW, n, d, first, 0, 0, 0, 0], np.int64)
    if grid in levels.BY_COLUMN:
        code, words = columns.code_of(grid, bits)
        fields[0], fields[4:] = BY_COLUMN, code
        return fields, codes, words, row, col
    term = rows.terms(points(grid, bits))
    ordered = rows.interleave(codes, int(bits), d)
    fields[4] = bits
    return fields, ordered.reshape(len(ordered), -1), term.view(np.uint32).reshape(-1), row, col


def units(matrix: Matrix) -> int:
    """Pieces of rows that a product can be split into."""
    kind, n = matrix[0][:2]
    return -(-int(n) // (TILE if kind == BY_ROW else _UNIT))


@_compile
def feed(x: Any, fields: Any, col: Any, passes: int) -> Any:
    """(fit, tables, numbers): what a product reads of x (t, whole width), its part at a matrix's columns times their scale.

    By rows in 1 or 2 passes, see `rows.prepare`; by columns in float32, one pass.
    """
    tokens, d, first = len(x), fields[2], fields[3]
    part = x[:, first : first + d]
    if fields[0] == BY_ROW:
        tables = np.empty((tokens, passes, _blocks(d) * GROUPS * TABLE), np.uint8)
        numbers = np.empty((tokens, passes, _blocks(d) + 1), np.float32)
        return _prepare(part, col, tables, numbers), tables, numbers
    numbers = np.empty((tokens, 1, d), np.float32)
    for t in range(tokens):
        if len(col) == 1:
            for j in range(d):
                numbers[t, 0, j] = part[t, j] * col[0]
        else:
            for j in range(d):
                numbers[t, 0, j] = part[t, j] * col[j]
    return True, np.empty((0, 0, 0), np.uint8), numbers


@_compile
def product(
    tables: Any, numbers: Any, fields: Any, codes: Any, words: Any, row: Any, y: Any, add: bool, first: int, last: int
) -> None:
    """y (t, n), set or added to, in units first .. last - 1, from what `feed` returns."""
    if fields[0] == BY_ROW:
        planes = codes.reshape((len(codes), numbers.shape[2] - 1, fields[4], GROUPS, LANES))
        term = words.view(np.float32).reshape((2, len(words) // 2))
        _by_row(tables, numbers, planes, term, fields[1], row, y, add, first, last)
    else:
        _by_column(numbers[:, 0], codes, fields[4:], words, fields[1], row, y, add, first, last)


def record(d: int, n: int, signs: np.ndarray, out_signs: np.ndarray, matrices: Sequence[Matrix | None]) -> np.ndarray:
    """All that `layer` has to know of R, L, Q and the narrow columns of Q in one array of int64, addresses of their arrays
    among it: who keeps it keeps them.  Signs (2, 0): no rotation.

    (d, n, signs or 0, out signs or 0), then for each matrix its fields, all 0 where it is absent, codes and their two sizes,
    words, row and column scale with the size of each.
    """
    out = np.zeros(_HEAD + _PLACE * len(matrices), np.int64)
    out[:2] = d, n
    out[2:_HEAD] = [s.ctypes.data if s.shape[1] else 0 for s in (signs, out_signs)]
    for place, matrix in zip(out[_HEAD:].reshape(-1, _PLACE), matrices, strict=True):
        if matrix is not None:
            fields, codes, *vectors = matrix
            assert all(a.flags.c_contiguous for a in matrix)
            place[:_FIELDS] = fields
            place[_FIELDS:] = codes.ctypes.data, *codes.shape, *(x for v in vectors for x in (v.ctypes.data, len(v)))
    return out


@_compile
def _times(record: Any, which: int, x: Any, y: Any, add: bool, passes: int) -> bool:
    """y (t, n), set or added to, of x (t, d) for a matrix of a record; False when an activation is not finite."""
    p = record[_HEAD + _PLACE * which : _HEAD + _PLACE * (which + 1)]
    fields, codes = p[:_FIELDS], carray(pointer(p[8]), (p[9], p[10]), np.uint8)
    words, row = carray(pointer(p[11]), (p[12],), np.uint32), carray(pointer(p[13]), (p[14],), np.float32)
    fit, tables, numbers = feed(x, fields, carray(pointer(p[15]), (p[16],), np.float32), passes)
    unit = TILE if fields[0] == BY_ROW else _UNIT
    if fit:
        product(tables, numbers, fields, codes, words, row, y, add, 0, (fields[1] + unit - 1) // unit)
    return fit


@_compile
def layer(x_at: int, y_at: int, tokens: int, half: bool, record_at: int) -> bool:
    """y (tokens, n) of x (tokens, d), contiguous, bfloat16 (`half`) or float32, for a `record`; False when an activation is not
    finite and y is not written.

    All three by address: to look at two dozen arrays would add 2 us to the 5 us of a small layer (192 x 576, 1 bit).
    """
    record = carray(pointer(record_at), (_HEAD + 4 * _PLACE,), np.int64)
    d, n = record[0], record[1]
    x, y = np.empty((tokens, d), np.float32), np.empty((tokens, n), np.float32)
    for t in range(tokens):
        for j in range(d):
            x[t, j] = half_at(x_at + 2 * (t * d + j)) if half else float_at(x_at + 4 * (t * d + j))
    passes = 1 if half else 2
    fit, add = True, False
    if record[2]:
        rotate(x, carray(pointer(record[2]), (2, d), np.float32), False)
    if record[_HEAD]:
        z = np.empty((tokens, record[_HEAD + 1]), np.float32)
        fit = _times(record, 0, x, z, False, passes) and _times(record, 1, z, y, False, passes)
        add = True
    for which in (2, 3):
        if record[_HEAD + _PLACE * which]:
            fit = fit and _times(record, which, x, y, add, passes)
            add = True
    if not fit:
        return False
    if record[3]:
        rotate(y, carray(pointer(record[3]), (2, n), np.float32), True)
    for t in range(tokens):
        for i in range(n):
            if half:
                put_half(y[t, i], y_at + 2 * (t * n + i))
            else:
                put_float(y[t, i], y_at + 4 * (t * n + i))
    return True
