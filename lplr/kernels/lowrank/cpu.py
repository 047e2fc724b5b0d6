"""`reference.lowrank_linear` on the CPU, compiled by numba, for float32, bfloat16 and float16; float64 is left to the reference.

Few tokens: matrices by rows as sums looked up in tables (`rows`), matrices by columns decoded a stretch at a time (`columns`), a
whole layer in one call (`layer`) or, where the work is worth it, one product at a time in torch.get_num_threads() threads.
Many tokens: the same tables for grids of one or two bits, which beat a dense product; else tiles of at most AT_ONCE points, never
the whole matrix, times x by torch.  Sums are float32; what tables make of float32 and float16 is rounded twice as finely as of
bfloat16, at twice the time.  Where an activation is not finite the reference answers.

What the products read is made of the stored tensors once and kept beside them as long as they live (`_PLANS`); the tensors
themselves stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lplr.kernels.levels import BY_COLUMN, narrower
from lplr.kernels.lowrank import columns, reference, rows
from lplr.kernels.lowrank.layer import ABSENT, BY_ROW, Matrix, feed, layer, matrix, points, product, rotate, units

FEW = 16  # tokens up to which a product is always made row by row, or column by column
FEW_BY_COLUMN = 4  # of the grids by columns
CHEAP_TERMS = 2  # terms of a level up to which tables of sums beat a dense product whatever the number of tokens: measured
AT_ONCE = 1 << 20  # points of a tile, and entries of x in tables
WORTH_THREADS = 1 << 20  # weights times tokens of a layer: a second thread costs some 20 microseconds
_NO_SIGNS = np.ones((2, 0), np.float32)


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


@dataclass(frozen=True)
class Plan:
    """What is made once of the tensors of a layer; valid as long as none of them changed."""

    key: tuple[Any, ...]
    tensors: tuple[Tensor | None, ...]  # but for the codes it is kept by
    versions: tuple[int, ...]
    n: int
    signs: np.ndarray
    out_signs: np.ndarray
    parts: tuple[Part | None, Part | None, Part | None, Part | None]  # R, L, Q, the narrow columns of Q
    arguments: tuple[np.ndarray, ...]
    weights: int


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
        fixed: dict[str, Any] = {"n": n, "rank": rank, "l_grid": l_grid, "r_grid": r_grid, "q_grid": q_grid}
        return reference.lowrank_linear(x, **fixed, q_narrow=q_narrow, **tensors)
    return y


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _plan(sizes: tuple[Any, ...], tensors: tuple[Tensor | None, ...], d: int) -> Plan | None:
    """The plan of these tensors, made where it is missing or older than they are; None where the reference has to judge."""
    owner = tensors[0] if tensors[0] is not None else tensors[2]
    if owner is None:
        return None
    key, versions = (*sizes, d), tuple(map(_version, tensors))
    kept = _PLANS.get(id(owner))
    if kept is not None and kept[0]() is owner:
        plan = kept[1]
        same = all(a is b or b is owner for a, b in zip(plan.tensors, tensors, strict=True))
        if same and plan.key == key and plan.versions == versions:
            return plan
    plan = _made(key, tensors, versions, owner)
    if plan is not None:
        at = id(owner)
        _PLANS[at] = (weakref.ref(owner, lambda _: _PLANS.pop(at, None)), plan)
    return plan


def _made(key: tuple[Any, ...], tensors: tuple[Tensor | None, ...], versions: tuple[int, ...], owner: Tensor) -> Plan | None:
    n, rank, l_grid, r_grid, q_grid, narrow, d = key
    l, r, q, q_narrow = (None if t is None else t.detach().contiguous().numpy() for t in tensors[:4])
    row, inner, col, q_row, q_col = (
        np.ones(1, np.float32) if t is None else t.detach().float().contiguous().numpy() for t in tensors[4:9]
    )
    signs, out_signs = (_NO_SIGNS if t is None else t.detach().float().contiguous().numpy() for t in tensors[9:])
    one = np.ones(1, np.float32)
    parts: list[Part | None] = [None, None, None, None]

    def part(codes: np.ndarray, shape: tuple[int, int], grid: tuple[str, float], *scales: np.ndarray, first: int = 0) -> Part:
        return Part(matrix(codes, shape, *grid, *scales, first), codes, *grid)

    if l is not None and r is not None:
        if r_grid[0] not in BY_COLUMN and r.shape[1] != (d * int(r_grid[1]) + 7) // 8:
            return None
        parts[0] = part(r, (rank, d), r_grid, inner, col)
        parts[1] = part(l, (n, rank), l_grid, row, one)
    if q is not None:
        if q_grid[0] not in BY_COLUMN and q.shape[1] != ((d - narrow) * int(q_grid[1]) + 7) // 8:
            return None
        wide_col, narrow_col = (q_col[narrow:], q_col[:narrow]) if len(q_col) > 1 else (q_col, q_col)
        parts[2] = part(q, (n, d - narrow), q_grid, q_row, wide_col, first=narrow)
        if q_narrow is not None:
            lower, ratio = narrower(*q_grid)
            parts[3] = part(q_narrow, (n, narrow), (q_grid[0], lower), q_row * np.float32(ratio), narrow_col)
    if not any(parts):
        return None
    arguments = tuple(array for p in parts for array in (ABSENT if p is None else p.matrix))
    weights = sum(int(p.matrix[0][1] * p.matrix[0][2]) for p in parts if p is not None)
    kept = tuple(None if t is owner else t for t in tensors)
    return Plan(key, kept, versions, n, signs, out_signs, (parts[0], parts[1], parts[2], parts[3]), arguments, weights)


def _forward(plan: Plan, x: Tensor) -> Tensor | None:
    """y (..., n) in x's dtype; None where the tables have no number for an activation."""
    d = x.shape[-1]
    inner = x.detach().reshape(-1, d).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    tokens = len(inner)
    y = torch.empty(tokens, plan.n)
    if tokens and not _into(plan, inner, y, 1 if x.dtype is torch.bfloat16 else 2):
        return None
    return y.to(x.dtype).view(*x.shape[:-1], plan.n)


def _into(plan: Plan, inner: Tensor, y: Tensor, passes: int) -> bool:
    tokens, threads = len(inner), torch.get_num_threads()
    if tokens <= FEW_BY_COLUMN and (threads == 1 or plan.weights * tokens < WORTH_THREADS):
        return layer(inner.numpy(), y.numpy(), passes, plan.signs, plan.out_signs, *plan.arguments)
    v = inner.numpy()
    if plan.signs.shape[1]:
        _shared(tokens, lambda a, b: rotate(v[a:b], plan.signs, False), tokens * v.shape[1])
    r, l, q, narrow = plan.parts
    add = False
    if r is not None and l is not None:
        z = torch.empty(tokens, int(r.matrix[0][1]))
        if not (_times(r, inner, z, False, passes) and _times(l, z, y, False, passes)):
            return False
        add = True
    for part in (q, narrow):
        if part is not None:
            if not _times(part, inner, y, add, passes):
                return False
            add = True
    if plan.out_signs.shape[1]:
        w = y.numpy()
        _shared(tokens, lambda a, b: rotate(w[a:b], plan.out_signs, True), tokens * w.shape[1])
    return True


def _times(part: Part, x: Tensor, y: Tensor, add: bool, passes: int) -> bool:
    """y (t, n), set or added to: a product of any number of tokens."""
    few = FEW_BY_COLUMN if part.grid in BY_COLUMN else FEW
    if part.terms * passes > CHEAP_TERMS and len(x) > few:
        _by_tiles(part, x, y, add)
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

        _shared(units(part.matrix), work, int(fields[1] * fields[2]) * len(a))
    return True


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
            tile = torch.empty(min(size, n - a), d)
            out = tile.numpy()

            def work(i: int, j: int, a: int = a, out: Any = out) -> None:
                rows.unpack(part.codes, int(part.bits), level, out[i:j], a + i)

            _shared(len(out), work, tile.numel())
            found = (x @ tile.T) * (scale[a : a + size] if len(scale) > 1 else scale)
            y[:, a : a + size] = y[:, a : a + size] + found if add else found
        return
    total, size = torch.zeros(len(x), n), max(16, AT_ONCE // n)
    for a in range(0, d, size):
        tile = torch.empty(min(size, d - a), n)
        out = tile.numpy()

        def decode(i: int, j: int, a: int = a, out: Any = out) -> None:
            columns.unpack(part.codes, fields[4:], words, out[i:j], a + i)

        _shared(len(out), decode, tile.numel())
        total.addmm_(x[:, a : a + size], tile)
    torch.mul(total, scale, out=total)
    y.copy_(y + total if add else total)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="lplr")


def _shared(pieces: int, work: Callable[[int, int], None], cost: int) -> None:
    """work(first, last) on all pieces, in torch.get_num_threads() threads where there is enough of it; this one is the first."""
    threads = min(torch.get_num_threads(), pieces) if cost >= WORTH_THREADS else 1
    edges = [pieces * i // threads for i in range(threads + 1)]
    waiting = [_pool().submit(work, *pair) for pair in zip(edges[1:-1], edges[2:], strict=True)]
    work(edges[0], edges[1])
    for other in waiting:
        other.result()
