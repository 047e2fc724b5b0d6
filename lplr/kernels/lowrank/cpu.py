"""`reference.lowrank_linear` on the CPU, compiled by numba, for float32, bfloat16 and float16; float64 is left to the reference.

Few tokens: matrices by rows as sums looked up in tables (`rows`), matrices by columns decoded a stretch at a time (`columns`), a
whole layer in one call (`layer`) or, where the work is worth it, one product at a time in torch.get_num_threads() threads.
Many tokens of bfloat16, where the processor multiplies such numbers: panels of points, decoded as they are read (`gemm`).
Else the same tables for grids of one or two bits, which beat a dense product, or tiles of points, never the whole matrix, times
x by torch: in bfloat16 where x and the processor are, also where that has matrices of them (AMX), which beat panels.

Sums are float32; what tables make of float32 and float16 is rounded twice as finely as of bfloat16, at twice the time.  Where an
activation is not finite the reference answers, or the float32 sums do.

What the products read is made of the stored tensors once and kept beside them as long as they live (`_PLANS`); the tensors
themselves stay as they are.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lplr.kernels.levels import BY_COLUMN, narrower, packed_shape
from lplr.kernels.lowrank import columns, gemm, reference, rows
from lplr.kernels.lowrank.layer import BY_ROW, Matrix, feed, layer, matrix, points, product, record, units
from lplr.kernels.lowrank.rotation import rotate, rotate_back, rotate_halves, rounded, widened
from lplr.kernels.lowrank.sharing import shared, worth_threads
from lplr.kernels.lowrank.state import state

FEW = 16  # tokens up to which a product is always made row by row, or column by column
FEW_BY_COLUMN = 4  # of the grids by columns
FEW_HALVES = {"one term": 32, "more": 4, "by column": 1}  # tokens of bfloat16 up to which panels of points do not pay: measured
CHEAP_TERMS = 2  # terms of a level up to which tables of sums beat a dense product whatever the number of tokens: measured
TOKENS = 512  # of a product by panels: their sums stay in the cache
AT_ONCE = 1 << 20  # points of a tile, and entries of x in tables
AT_ONCE_HALVES = 1 << 22  # points of a tile of bfloat16: torch is slow with few outputs
MANY_AMX = 64  # tokens from which to decode tiles is paid by products of AMX: estimated
UNPACKED = 64  # entries of one bit by rows that cost as much as one that is unpacked by rows
DECODED = 16  # entries of one bit by rows that cost as much as one of a grid by columns: measured
PASS, ROTATION = 16, 128  # what to round or to rotate an activation costs, in such entries: measured
_NO_SIGNS, _ONE = np.ones((2, 0), np.float32), np.ones(1, np.float32)


@dataclass(frozen=True)
class Part:
    """A packed matrix: as the products read it, and as it is stored."""

    matrix: Matrix
    codes: np.ndarray
    grid: str
    bits: float

    @property
    def terms(self) -> int:
        """Tables of sums that a group of entries needs, see `rows.terms`; by columns as good as too many."""
        return 1 << 8 if self.grid in BY_COLUMN else len(self.matrix[2]) // 2 - 1

    @property
    def by_halves(self) -> bool:
        """Whether products may be of bfloat16: it holds the points, and the rows are enough for a panel."""
        return self.grid != "normal_float" and bool(self.matrix[0][1] >= gemm.PANEL)

    @property
    def few(self) -> int:
        """Tokens up to which a product of bfloat16 is not made by panels."""
        if not (gemm.AVAILABLE and self.by_halves):
            return sys.maxsize
        return FEW_HALVES["by column" if self.grid in BY_COLUMN else "one term" if self.terms == 1 else "more"]

    @property
    def cost(self) -> int:
        """What a token costs, in entries of one bit by rows."""
        fields = self.matrix[0]
        return int(fields[1] * fields[2]) * (DECODED if self.grid in BY_COLUMN else self.terms)


@dataclass(frozen=True)
class Plan:
    """What is made once of the tensors of a layer; valid as long as none of them changed."""

    key: tuple[Any, ...]
    others: tuple[Tensor | None, ...]  # all but the one it is kept by
    versions: list[int]  # `state` of all
    n: int
    signs: np.ndarray
    out_signs: np.ndarray
    parts: tuple[Part | None, Part | None, Part | None, Part | None]  # R, L, Q, the narrow columns of Q
    record: np.ndarray  # of signs, out_signs and parts, for `layer`
    record_at: int
    few: int  # tokens up to which `layer` serves
    few_halves: int  # of bfloat16
    cost: int  # of a token, in entries of a grid by rows


_PLANS: dict[int, tuple[weakref.ref[Tensor], Plan]] = {}
_TENSORS = (
    "l_codes", "r_codes", "q_codes", "q_narrow_codes", "row_scale", "rank_scale", "col_scale", "q_row_scale", "q_col_scale",
    "signs", "out_signs",
)  # fmt: skip


def lowrank_linear(
    x: Tensor,
    *,
    n: int = 0,
    rank: int = 0,
    l_grid: tuple[str, float] = ("uniform", 0),
    r_grid: tuple[str, float] = ("uniform", 0),
    q_grid: tuple[str, float] = ("uniform", 0),
    q_narrow: int = 0,
    **tensors: Tensor | None,
) -> Tensor:
    """See `reference.lowrank_linear`."""
    sizes = (n, rank, l_grid, r_grid, q_grid, q_narrow)
    plan = None
    if x.dtype is not torch.float64:
        plan = _plan(sizes, tuple(tensors.get(name) for name in _TENSORS), x.shape[-1])
    y = None if plan is None else _forward(plan, x)
    if y is None:
        given: dict[str, Any] = {"n": n, "rank": rank, "l_grid": l_grid, "r_grid": r_grid, "q_grid": q_grid, **tensors}
        return reference.lowrank_linear(x, q_narrow=q_narrow, **given)
    return y


def prepared(
    d: int,
    *,
    n: int,
    rank: int,
    l_grid: tuple[str, float],
    r_grid: tuple[str, float],
    q_grid: tuple[str, float],
    q_narrow: int,
    **tensors: Tensor | None,
) -> Callable[[Tensor], Tensor | None] | None:
    """The function x (..., d) -> y of these arguments as long as none of the tensors changes; it returns None, or there is none,
    where the reference has to answer.  It must not be given float64."""
    plan = _plan((n, rank, l_grid, r_grid, q_grid, q_narrow), tuple(tensors.get(name) for name in _TENSORS), d)
    return None if plan is None else partial(_forward, plan)


def _plan(sizes: tuple[Any, ...], tensors: tuple[Tensor | None, ...], d: int) -> Plan | None:
    """The plan of these tensors, made where it is missing or older than they are; None where the reference has to judge."""
    at = 0 if tensors[0] is not None else 2
    owner = tensors[at]
    if owner is None:
        return None
    key, versions, others = (*sizes, d), state(tensors), tensors[:at] + tensors[at + 1 :]
    kept = _PLANS.get(id(owner))
    if kept is not None and kept[0]() is owner:
        plan = kept[1]
        if plan.versions == versions and plan.key == key and all(map(is_, plan.others, others)):
            return plan
    made = _made(sizes, tensors, d)
    if made is None:
        return None
    plan = Plan(key, others, versions, sizes[0], *made)
    place = id(owner)
    _PLANS[place] = (weakref.ref(owner, lambda gone: _forget(place, gone)), plan)
    return plan


def _forget(place: int, gone: weakref.ref[Tensor]) -> None:
    """Drop the plan of a tensor that is gone, unless another has taken its place."""
    if place in _PLANS and _PLANS[place][0] is gone:
        del _PLANS[place]


def _made(sizes: tuple[Any, ...], tensors: tuple[Tensor | None, ...], d: int) -> tuple[Any, ...] | None:
    """The fields of a plan from `signs` on; None for tensors that do not fit one another."""
    n, rank, l_grid, r_grid, q_grid, narrow = sizes
    l, r, q, q_narrow = (None if t is None else t.detach().contiguous().numpy() for t in tensors[:4])
    row, inner, col, q_row, q_col = (_ONE if t is None else t.detach().float().contiguous().numpy() for t in tensors[4:9])
    signs, out_signs = (_NO_SIGNS if t is None else t.detach().float().contiguous().numpy() for t in tensors[9:])
    found: list[tuple[np.ndarray, tuple[int, int], tuple[str, float], np.ndarray, np.ndarray, int] | None] = [None] * 4
    if l is not None and r is not None:
        found[:2] = (r, (rank, d), r_grid, inner, col, 0), (l, (n, rank), l_grid, row, _ONE, 0)
    if q is not None:
        wide_col, narrow_col = (q_col[narrow:], q_col[:narrow]) if len(q_col) > 1 else (q_col, q_col)
        found[2] = (q, (n, d - narrow), q_grid, q_row, wide_col, narrow)
        if q_narrow is not None:
            lower, ratio = narrower(*q_grid)
            found[3] = (q_narrow, (n, narrow), (q_grid[0], lower), q_row * np.float32(ratio), narrow_col, 0)
    for codes, shape, grid, row, col, _ in filter(None, found):
        fits = codes.shape == packed_shape(shape, *grid) and len(row) in (1, shape[0]) and len(col) in (1, shape[1])
        if not fits or 0 in shape:
            return None
    if not any(found) or signs.shape[1] not in (0, d) or out_signs.shape[1] not in (0, n):
        return None
    parts = [None if f is None else Part(matrix(f[0], f[1], *f[2], *f[3:]), f[0], *f[2]) for f in found]
    known = [part for part in parts if part is not None]
    few = FEW_BY_COLUMN if any(part.grid in BY_COLUMN for part in known) else FEW
    numbers = record(d, n, signs, out_signs, [None if part is None else part.matrix for part in parts])
    halves, cost = min(few, *(part.few for part in known)), sum(part.cost for part in known)
    return signs, out_signs, tuple(parts), numbers, numbers.ctypes.data, few, halves, cost


def _forward(plan: Plan, x: Tensor) -> Tensor | None:
    """y (..., n) in x's dtype; None where the tables have no number for an activation."""
    d = plan.key[-1]
    shape = x.shape
    if shape[-1] != d:
        return None
    y = torch.empty((*shape[:-1], plan.n), dtype=x.dtype, device="cpu")  # x.new_empty takes twice as long
    tokens = x.numel() // d
    if tokens == 0:
        return y
    half = x.dtype is torch.bfloat16
    few = plan.few_halves if half else plan.few
    if not worth_threads(plan.cost * tokens) and tokens <= few and (half or x.dtype is torch.float32) and x.is_contiguous():
        return y if layer(x.data_ptr(), y.data_ptr(), tokens, half, plan.record_at) else None
    inner, out = _turned(plan, x.detach().reshape(-1, d)), y.view(-1, plan.n)
    found = out if x.dtype is torch.float32 else torch.empty(tokens, plan.n, device="cpu")
    if not _into(plan, inner, found, 1 if half else 2):
        return None
    _turned_back(plan, found, out)
    return y


def _turned(plan: Plan, x: Tensor) -> Tensor:
    """x (t, d) in float32, rotated where the layer is; it may be x itself."""
    t, d = x.shape
    signs = plan.signs
    if x.dtype is torch.bfloat16:
        given, inner = _bits(x.contiguous()), np.empty((t, d), np.float32)
        if signs.shape[1]:
            shared(t, lambda a, b: rotate_halves(given[a:b], signs, inner[a:b]), ROTATION * t * d)
        else:
            shared(t, lambda a, b: widened(given[a:b], inner[a:b]), PASS * t * d)
    elif signs.shape[1]:
        inner = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format).numpy()
        shared(t, lambda a, b: rotate(inner[a:b], signs, False), ROTATION * t * d)
    else:
        return x.to(torch.float32, memory_format=torch.contiguous_format)
    return torch.from_numpy(inner)


def _turned_back(plan: Plan, y: Tensor, out: Tensor) -> None:
    """out (t, n) in its dtype, of y, float32, which may be out itself and is overwritten."""
    v, signs, size = y.numpy(), plan.out_signs, y.numel()
    if out.dtype is torch.bfloat16:
        to = _bits(out)
        if signs.shape[1]:
            shared(len(v), lambda a, b: rotate_back(v[a:b], signs, to[a:b]), ROTATION * size)
        else:
            shared(len(v), lambda a, b: rounded(v[a:b], to[a:b]), PASS * size)
        return
    if signs.shape[1]:
        shared(len(v), lambda a, b: rotate(v[a:b], signs, True), ROTATION * size)
    if out is not y:
        out.copy_(y)


def _bits(x: Tensor) -> np.ndarray:
    """A tensor of bfloat16 as numpy takes it, uint16."""
    return x.view(torch.int16).numpy().view(np.uint16)


def _into(plan: Plan, inner: Tensor, y: Tensor, passes: int) -> bool:
    """y (t, n) of inner (t, d), float32: the products one by one, in threads."""
    (r, l, q, narrow), add = plan.parts, False
    if r is not None and l is not None:
        z = torch.empty(len(inner), int(r.matrix[0][1]), device="cpu")
        if not (_times(r, inner, z, False, passes) and _times(l, z, y, False, passes)):
            return False
        add = True
    for part in (q, narrow):
        if part is not None:
            if not _times(part, inner, y, add, passes):
                return False
            add = True
    return True


def _times(part: Part, x: Tensor, y: Tensor, add: bool, passes: int) -> bool:
    """y (t, n), set or added to: a product of any number of tokens."""
    by_amx = gemm.AMX and passes == 1 and len(x) >= MANY_AMX and part.by_halves and gemm.in_torch()
    if passes == 1 and len(x) > part.few and not by_amx:
        for a, b in zip(x.split(TOKENS), y.split(TOKENS), strict=True):
            _by_panels(part, a, b, add)
        return True
    few = FEW_BY_COLUMN if part.grid in BY_COLUMN else FEW
    if by_amx or (part.terms * passes > CHEAP_TERMS and len(x) > few):
        halves = passes == 1 and part.by_halves and gemm.in_torch()
        (_by_half_tiles if halves else _by_tiles)(part, x, y, add)
        return True
    fields, codes, words, row, col = part.matrix
    at_once = max(FEW, AT_ONCE // max(1, 16 * int(fields[2])))
    for a, b in zip(x.split(at_once), y.split(at_once), strict=True):
        fit, tables, numbers = feed(a.numpy(), fields, col, passes)
        if not fit:
            return False
        out = b.numpy()

        def work(first: int, last: int, tables: Any = tables, numbers: Any = numbers, out: Any = out) -> None:
            product(tables, numbers, fields, codes, words, row, out, add, first, last)

        shared(units(part.matrix), work, part.cost * len(a))
    return True


def _by_panels(part: Part, x: Tensor, y: Tensor, add: bool) -> None:
    """The same of bfloat16, see `gemm`."""
    fields, codes, words, row, col = part.matrix
    if fields[0] == BY_ROW:
        words = gemm.table(int(part.bits))
    v, out, cost = x.numpy(), y.numpy(), x.shape[0] * int(fields[2])
    half = np.empty((len(x), gemm.width(int(fields[2]))), np.uint16)
    shared(len(x), lambda a, b: gemm.halves(v[a:b], col, fields[3], fields[2], half[a:b]), PASS * cost)

    def work(first: int, last: int) -> None:
        gemm.multiply(half, fields, codes, words, row, out, add, first, last)

    shared(gemm.tiles(int(fields[1])), work, cost * int(fields[1]))


def _by_tiles(part: Part, x: Tensor, y: Tensor, add: bool) -> None:
    """The same by dense products with tiles of points."""
    fields, _, words, row, col = part.matrix
    n, d, first = (int(f) for f in fields[1:4])
    x = x[:, first : first + d]
    if len(col) > 1 or col[0] != 1:
        x = x * torch.from_numpy(col)
    scale = torch.from_numpy(row)
    if fields[0] == BY_ROW:
        level, size = points(part.grid, part.bits), max(16, AT_ONCE // d)
        for a in range(0, n, size):
            tile = torch.empty(min(size, n - a), d, device="cpu")
            out = tile.numpy()

            def work(i: int, j: int, a: int = a, out: Any = out) -> None:
                rows.unpack(part.codes, int(part.bits), level, out[i:j], a + i)

            shared(len(out), work, UNPACKED * tile.numel())
            found = (x @ tile.T) * (scale[a : a + size] if len(scale) > 1 else scale)
            y[:, a : a + size] = y[:, a : a + size] + found if add else found
        return
    total, size = torch.zeros(len(x), n, device="cpu"), max(16, AT_ONCE // n)
    for a in range(0, d, size):
        tile = torch.empty(min(size, d - a), n, device="cpu")
        out = tile.numpy()

        def decode(i: int, j: int, a: int = a, out: Any = out) -> None:
            columns.unpack(part.codes, fields[4:], words, out[i:j], a + i)

        shared(len(out), decode, DECODED * tile.numel())
        total.addmm_(x[:, a : a + size], tile)
    torch.mul(total, scale, out=total)
    y.copy_(y + total if add else total)


def _by_half_tiles(part: Part, x: Tensor, y: Tensor, add: bool) -> None:
    """The same in bfloat16, a tile being whole rows: a sum is rounded once."""
    _, _, _, row, col = part.matrix
    n, d, first = (int(f) for f in part.matrix[0][1:4])
    x = (x[:, first : first + d] * torch.from_numpy(col)).to(torch.bfloat16)
    scale, size = torch.from_numpy(row), max(1, AT_ONCE_HALVES // (d * columns.UNIT)) * columns.UNIT
    for a in range(0, n, size):
        found = (x @ _half_tile(part, a, min(size, n - a)).T).float()
        found *= scale[a : a + size] if len(scale) > 1 else scale
        y[:, a : a + size] = y[:, a : a + size] + found if add else found


def _half_tile(part: Part, a: int, m: int) -> Tensor:
    """Points (m, d), bfloat16, of the rows from a on, where a unit starts."""
    fields, codes, words, _, _ = part.matrix
    d, bits = int(fields[2]), int(part.bits)
    if fields[0] == BY_ROW:
        level, out = _bits(torch.from_numpy(points(part.grid, part.bits)).bfloat16()), np.empty((m, d), np.uint16)
        shared(m, lambda i, j: rows.unpack(part.codes, bits, level, out[i:j], a + i), UNPACKED * out.size)
        return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    out = np.empty((d, m), np.uint16)
    unit = a // columns.UNIT
    shared(d, lambda i, j: columns.unpack_halves(codes, fields[4:], words, out[i:j], i, unit), UNPACKED * out.size)
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).T
