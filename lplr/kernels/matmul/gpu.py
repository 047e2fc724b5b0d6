"""The product with a packed matrix by Triton: which kernel, its sizes, and the launches.

One token and the uniform grid is a matrix-vector product by `decode_uniform`.  More tokens go to the tensor cores a tile at a
time, `tile_*`, 16 or 32 at a time; so does one token of a grid whose points are looked up: matrix-vector products of such grids
took longer on an H100 than four tokens by tiles (4096 x 4096, us: trellis 102 and 24, NormalFloat 237 and 23, lattice 47 and 22;
but 58 and 74 for the lattice at 11008 x 4096; eval/kernels/gpu_bench.py).  Sizes are those with which nothing spills
on sm_80 and sm_90 (tests/kernels/test_ahead_of_time.py); the inputs are split over programs until there are PROGRAMS of them.

A prompt, from PROMPT tokens on, is multiplied by cuBLAS with the points of at most AT_ONCE entries of the matrix at a time, which
`points_*` write: a tile of tokens would unpack every code again, and the whole matrix is never there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, cast

import torch
import triton
from torch import Tensor

from lplr.kernels.lattice import reference as lattice
from lplr.kernels.levels import BY_COLUMN, narrower, packed_shape
from lplr.kernels.matmul import programs, reference
from lplr.kernels.normal_float import levels as normal_levels
from lplr.kernels.trellis import reference as trellis

PROGRAMS = 528  # four on each processor of an H100: measured
PROMPT = 64  # tokens from which on points are written and multiplied by cuBLAS
AT_ONCE = 1 << 24  # points that are written at once
UNIT_OF_ROWS = 128  # which every kernel's rows divide
PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 numbers that x * col is taken as a sum of


Part = tuple[int, int, Tensor, float, float]  # columns of one width: (inputs from, to, codes, bits, step)


@dataclass(frozen=True)
class Plan:
    """A kernel, its constants, and how a matrix is cut: `rows` outputs, `inputs` inputs and `tokens` tokens at a time."""

    kernel: Any
    constants: dict[str, Any]
    rows: int
    inputs: int
    tokens: int
    warps: int = 4
    stages: int = 2


def plan(n: int, d: int, grid: str, bits: float, tokens: int, dtype: torch.dtype) -> Plan:
    """The kernel for x (tokens, d) and a matrix (n, d) of a grid, all of one width."""
    block = 32 if tokens > 16 and dtype == torch.bfloat16 and grid in ("uniform", "trellis") else 16
    if grid == "uniform" and tokens == 1:
        groups = min(32, triton.next_power_of_2(triton.cdiv(d, 128)))
        rows = (256 if dtype == torch.float32 else 512) // groups  # two or four a thread: float32 x takes more registers
        constants = {"UNIT": unit(n, d, grid, bits), "BITS": int(bits), "ROWS": rows, "GROUPS": groups}
        return Plan(programs.decode_uniform, constants, rows, 128 * groups, 1)
    kernel = {"lattice": programs.tile_lattice, "trellis": programs.tile_trellis}.get(grid, programs.tile_rows)
    wide = 4 if grid == "uniform" or dtype == torch.bfloat16 else 2  # points of which two parts are held: half as many
    return _tiles(kernel, n, d, grid, bits, wide, block, {"TOKENS": block, "PIECES": PIECES[dtype]})


def points_plan(n: int, d: int, grid: str, bits: float) -> Plan:
    """The kernel that writes points of a matrix (n, d); `rows` of them and `inputs` a program."""
    kernel = {"lattice": programs.points_lattice, "trellis": programs.points_trellis}.get(grid, programs.points_rows)
    return _tiles(kernel, n, d, grid, bits, 4, 0, {})


def _tiles(kernel: Any, n: int, d: int, grid: str, bits: float, wide: int, block: int, constants: dict[str, Any]) -> Plan:
    """The plan of a kernel that unpacks a tile of points a program, 32 `wide` inputs where codes are stored by rows."""
    constants = {"UNIT": unit(n, d, grid, bits)} | constants
    if grid not in BY_COLUMN:  # a thread reads a row; a table that is looked up in is not to be staged in shared memory
        constants |= {"GRID": grid, "BITS": int(bits), "ROWS": 128, "WIDE": wide}
        return Plan(kernel, constants, 128, 32 * wide, block, stages=2 if grid == "uniform" else 1)
    if grid == "lattice":
        vectors = {2: 8, 3: 16, 4: 8}[int(bits)]  # whole loads of 16 bytes, few sums a thread
        constants |= {"BITS": int(bits), "VECTORS": vectors} | _lattice_constants(bits)
        rows, threads = 8 * vectors, 64 if bits == 3 else 128
    else:
        code = trellis.code(bits)
        constants |= {"STEP": code.step_bits, "ENTRIES": code.entries, "HISTORY": history(bits)}
        rows, threads = 128, 128
    # a thread reads a column; points of the lattice, a look-up each, are then spread over twice as many threads
    warps = threads // (16 if grid == "lattice" else 32)
    return Plan(kernel, constants | {"COLUMNS": threads}, rows, threads, block, warps, stages=1)


def unit(n: int, d: int, grid: str, bits: float) -> int:
    """Bytes that a load of codes can take and never cross the end of a row of them: 16, 4 or 1."""
    width = packed_shape((n, d), grid, bits)[1]
    return 16 if width % 16 == 0 else 4 if width % 4 == 0 else 1


def _lattice_constants(bits: float) -> dict[str, Any]:
    first = lattice.stage(f"{bits:g}")
    second = lattice.stage("4 second") if bits == 4 else first
    return {"EVEN": first.even, "SHIFT": first.shift, "EVEN_2": second.even, "SHIFT_2": second.shift}


def history(bits: float) -> int:
    """A word of the stream before the first step: the symbols that lead to the start of the code, the newest at the top."""
    code = trellis.code(bits)
    k, out = code.step_bits, 0
    for i in range(-(-trellis.STATE_BITS // k)):
        out |= ((code.start >> (k * i)) & ((1 << k) - 1)) << (32 - k * (i + 1))
    return out


@lru_cache(maxsize=64)
def table(grid: str, bits: float, device: torch.device) -> Tensor:
    """What the kernels of a grid look points up in; one entry of no meaning for the uniform grid.

    normal_float: the levels.  lattice: the patterns of the first stage, then the vectors of the second, bfloat16.  trellis:
    4096 words by the last symbols in the order of the stream, see `tiles.trellis_quarter`.
    """
    with torch.inference_mode(False):
        if grid == "normal_float":
            return normal_levels(bits).to(device)
        if grid == "lattice":
            second = {2: [], 3: [lattice.one_bit()], 4: [lattice.stage("4 second").table]}[int(bits)]
            return torch.cat([lattice.stage(f"{bits:g}").table, *second]).to(torch.bfloat16).to(device)
        if grid == "trellis":
            return trellis_table(bits).to(device)
        return torch.zeros(1, device=device)


def trellis_table(bits: float) -> Tensor:
    """The codebook by the last symbols as the stream has them, oldest lowest: 4096 words, int32."""
    code = trellis.code(bits)
    k, reach = code.step_bits, -(-trellis.STATE_BITS // code.step_bits)
    kept = trellis.STATE_BITS - k * (reach - 1)  # bits of the oldest symbol that count
    window = torch.arange(1 << trellis.STATE_BITS)
    state = (window & ((1 << kept) - 1)) << (k * (reach - 1))
    for i in range(reach - 1):
        state |= ((window >> (kept + k * i)) & ((1 << k) - 1)) << (k * (reach - 2 - i))
    values = trellis.codebook(bits)[:, state].contiguous().view(torch.int32)  # (entries, 4096); bfloat16 is the upper half
    return values[0] if code.entries == 1 else ((values[0] >> 16) & 0xFFFF) | values[1]


def matmul(
    x: Tensor,
    codes: Tensor,
    n: int,
    grid: tuple[str, float],
    row: Tensor | None,
    col: Tensor | None,
    narrow_codes: Tensor | None,
    narrow: int,
) -> Tensor:
    """See `lplr.kernels.matmul.matmul`."""
    if x.dtype not in PIECES:
        return reference.matmul(x, codes, n, grid, row, col, narrow_codes, narrow)
    d = x.shape[-1]
    flat = x.reshape(-1, d).contiguous()
    m = len(flat)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not m:
        return out.view(*x.shape[:-1], n)
    name, bits = grid
    parts: list[Part] = [(narrow, d, codes, bits, 1.0)]
    if narrow_codes is not None:
        lower, ratio = narrower(name, bits)
        parts.append((0, narrow, narrow_codes, lower, ratio))
    if m >= PROMPT:
        with torch.cuda.device_of(x):
            by_points(flat if col is None else flat * col, parts, name, row, out)  # float32, or bfloat16 rounded once
        return out.view(*x.shape[:-1], n)
    plans = [plan(n, last - first, name, width, m, x.dtype) for first, last, _, width, _ in parts]
    splits = [split(p, n, last - first, m) for p, (first, last, *_) in zip(plans, parts, strict=True)]
    total = sum(splits)
    sums = out if total == 1 else torch.empty(total, m, n, dtype=torch.float32, device=x.device)
    steps: dict[str, Any] = {"ROW": step(row), "PARTS": total}
    done = 0
    with torch.cuda.device_of(x):
        for p, count, (first, last, packed, width, ratio) in zip(plans, splits, parts, strict=True):
            scale = col[first:last] if col is not None and col.numel() > 1 else col
            launch(p, flat[:, first:last], scale, packed, table(name, width, x.device), row, sums, n, count, done, ratio, steps)
            done += count
        if total > 1:
            finish(sums, row, out, steps)
    return out.view(*x.shape[:-1], n)


def by_points(x: Tensor, parts: list[Part], grid: str, row: Tensor | None, out: Tensor) -> None:
    """out (m, n) = (x C^T) row for x (m, d), float32 or of out's type, the points of some rows of C (n, d) after another."""
    n, parts = out.shape[1], sorted(parts, key=lambda part: part[0])
    start = parts[0][0]  # before it all points are zero
    plain = grid == "normal_float" and out.dtype != torch.bfloat16  # its points are not exact in bfloat16: float32 products
    scaled = [x[:, first:last] if ratio == 1 else x[:, first:last].float() * ratio for first, last, _, _, ratio in parts]
    whole = torch.cat(scaled, 1) if len(scaled) > 1 else scaled[0]
    x, d = pieces_of(whole, 0 if plain else PIECES[out.dtype]), x.shape[1] - start
    some = max(UNIT_OF_ROWS, AT_ONCE // max(1, d) // UNIT_OF_ROWS * UNIT_OF_ROWS)
    for top in range(0, n, some):
        rows = slice(top, min(n, top + some))
        shape = (rows.stop - top, d)
        points = torch.empty(shape[::-1] if grid in BY_COLUMN else shape, dtype=x.dtype, device=x.device)
        for first, last, codes, bits, _ in parts:
            inputs = slice(first - start, last - start)
            part = points[inputs] if grid in BY_COLUMN else points[:, inputs]
            write_points(part, codes, n, last - first, grid, bits, rows)
        found = _product(x, points if grid in BY_COLUMN else points.T, out)
        torch.mul(found, 1 if row is None else row[rows] if row.numel() > 1 else row, out=out[:, rows])


def pieces_of(x: Tensor, count: int) -> Tensor:
    """x (m, d) as a sum of `count` bfloat16 tensors one below the other, (count m, d); x in float32 for none."""
    if count == 0:
        return x.float()
    pieces = [x.to(torch.bfloat16)]
    rest = x
    for _ in range(count - 1):
        rest = rest.float() - pieces[-1].float()
        pieces.append(rest.to(torch.bfloat16))
    return torch.cat(pieces) if count > 1 else pieces[0]


def _product(x: Tensor, points: Tensor, out: Tensor) -> Tensor:
    """pieces x points, summed over the pieces, (m, n); bfloat16 where out is, else float32."""
    if out.dtype == torch.bfloat16 or x.dtype == torch.float32:
        return x @ points
    found = torch.mm(x, points, out_dtype=torch.float32) if x.is_cuda else x.float() @ points.float()
    return found.view(-1, len(out), found.shape[1]).sum(0)


def write_points(out: Tensor, codes: Tensor, n: int, d: int, grid: str, bits: float, rows: slice) -> None:
    """The points of some rows of a matrix (n, d) of one width: (rows, d), or (d, rows) of a grid that is stored by columns."""
    p = points_plan(n, d, grid, bits)
    packed, units = words(codes, p)
    launched = (triton.cdiv(rows.stop - rows.start, p.rows), triton.cdiv(d, p.inputs))
    p.kernel[launched](
        packed, table(grid, bits, out.device), out, rows.start, rows.stop, d, out.stride(0), units,
        **p.constants, num_warps=p.warps, num_stages=p.stages,
    )  # fmt: skip


def words(codes: Tensor, p: Plan) -> tuple[Tensor, int]:
    """Codes as a plan's kernel reads them, bytes or 32-bit words, and the units of a row of them."""
    size = p.constants["UNIT"]
    packed = codes.contiguous()
    return packed if size == 1 else packed.view(torch.int32), codes.shape[1] // size


def step(scale: Tensor | None) -> int:
    """Entries between one scale and the next: 1, 0 where there is one for all, -1 where there is none."""
    return -1 if scale is None else int(scale.numel() > 1)


def split(p: Plan, n: int, d: int, m: int) -> int:
    """Into how many parts the inputs are split."""
    blocks, programs_there = triton.cdiv(d, p.inputs), triton.cdiv(n, p.rows) * triton.cdiv(m, p.tokens)
    return triton.cdiv(blocks, triton.cdiv(blocks, max(1, PROGRAMS // programs_there)))


def launch(
    p: Plan, x: Tensor, col: Tensor | None, codes: Tensor, lookup: Tensor, row: Tensor | None, out: Tensor, n: int,
    count: int, done: int, ratio: float, steps: dict[str, Any],
) -> None:  # fmt: skip
    """One kernel over `count` parts of the inputs, the first being part `done` of all."""
    m, d = x.shape
    blocks = triton.cdiv(triton.cdiv(d, p.inputs), count)
    packed, units = words(codes, p)
    rows = triton.cdiv(n, p.rows)
    grid = (rows, count) if p.tokens == 1 else (rows, triton.cdiv(m, p.tokens), count)
    sizes = (n, d) if p.tokens == 1 else (m, n, d, x.stride(0))
    p.kernel[grid](
        x, x if col is None else col, packed, lookup, x if row is None else row, out, *sizes, units, blocks,
        done, ratio, **p.constants, COL=step(col), **steps, num_warps=p.warps, num_stages=p.stages,
    )  # fmt: skip


def finish(sums: Tensor, row: Tensor | None, out: Tensor, steps: dict[str, Any]) -> None:
    """out = the sum of the parts times the row scale."""
    size, kernel = prod(out.shape), cast(Any, programs.finish)
    kernel[(triton.cdiv(size, 1024),)](sums, out if row is None else row, out, size, out.shape[1], **steps, BLOCK=1024)
