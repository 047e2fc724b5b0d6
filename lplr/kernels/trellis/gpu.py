# a compile-time constant is an int where it is passed and a `constexpr` where it is used:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""The trellis encoder by Triton: a sequence in one program, the costs of all states in its registers.

Between two steps one cost stands for each rest of the register, its content without the symbol to come, as in `cpu`.  What led to
each rest, a byte, goes to memory; a second kernel follows the cheapest path back, a sequence a thread.  Sums are those of the
reference in its order, so that codes are the same, byte by byte.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from lplr.kernels.trellis import reference
from lplr.kernels.trellis.reference import STATE_BITS, Feedback, code, codebook, decode

__all__ = ["decode", "encode"]

WARPS = 8
TRACED = 32  # sequences that a program follows back
SCRATCH = 1 << 31  # bytes of what led to each rest: more sequences are encoded in turns


@triton.jit
def search_rows(
    X, weights, start, book, back, last, steps,
    WAYS: tl.constexpr, KEPT: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The cheapest paths of sequence program_id(0): back (m, steps, KEPT), row t what step t - 1 dropped; the last state."""
    i = tl.program_id(0)
    rest = tl.arange(0, KEPT)
    state = tl.arange(0, WAYS)[:, None] * KEPT + rest[None, :]
    first = tl.load(book + state)
    second = tl.load(book + WAYS * KEPT + state) if ENTRIES == 2 else first
    begun = tl.load(start + i).to(tl.int32)
    best = tl.where(rest == begun % KEPT, 0.0, float("inf"))
    oldest = tl.zeros([KEPT], tl.int32) + begun // KEPT
    x = X + i.to(tl.int64) * steps * ENTRIES
    out = back + i.to(tl.int64) * steps * KEPT + rest
    for t in range(steps):
        tl.store(out + t * KEPT, oldest.to(tl.uint8))
        cost = tl.reshape(tl.broadcast_to(best[:, None], [KEPT, WAYS]), [WAYS, KEPT])
        gap = tl.load(x + t * ENTRIES) - first
        cost += gap * gap * tl.load(weights + t * ENTRIES)
        if ENTRIES == 2:
            gap = tl.load(x + t * 2 + 1) - second
            cost += gap * gap * tl.load(weights + t * 2 + 1)
        best, oldest = tl.min(cost, 0, return_indices=True)
    # a form with an argmin of all costs here and a step as a function of its own chose other codes on an H100 (triton 3.6)
    tl.store(last + i, tl.min(tl.where(best == tl.min(best, 0), oldest * KEPT + rest, WAYS * KEPT), 0))


@triton.jit
def trace_rows(back, last, states, m, steps, BITS: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr):
    """ROWS paths, from their last states to their first."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = row < m
    state = tl.load(last + row, mask=seen, other=0)
    place = row.to(tl.int64) * steps
    for step in range(steps):
        t = steps - 1 - step
        tl.store(states + place + t, state.to(tl.int64), mask=seen)
        rest = state >> BITS
        oldest = tl.load(back + (place + t) * KEPT + rest, mask=seen, other=0).to(tl.int32)
        state = oldest * KEPT + rest


def encode(x: Tensor, bits: float, feedback: Feedback | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.encode`."""
    return reference.encode(x, bits, feedback, search=cheapest)


def cheapest(x: Tensor, weights: Tensor, state: Tensor, bits: float) -> Tensor:
    """See `reference.cheapest`."""
    c = code(bits)
    m, steps, sizes = len(x), x.shape[1] // c.entries, constants(bits)
    states = torch.empty(m, steps, dtype=torch.int64, device=x.device)
    if not states.numel():
        return states
    at_once = max(1, min(m, SCRATCH // (steps * sizes["KEPT"])))
    back = torch.empty(at_once, steps, sizes["KEPT"], dtype=torch.uint8, device=x.device)
    last = torch.empty(at_once, dtype=torch.int32, device=x.device)
    weights = weights.contiguous()
    search, trace = cast(Any, search_rows), cast(Any, trace_rows)
    with torch.cuda.device_of(x):
        for i in range(0, m, at_once):
            rows = x[i : i + at_once]
            rows, out = torch.where(rows.isnan(), 0, rows).contiguous(), states[i : i + at_once]  # any path does for them
            given = (rows, weights, state[i : i + at_once].contiguous(), _book(bits, x.device), back, last, steps)
            # a fused multiplication and addition would round once where the reference rounds twice
            search[(len(rows),)](*given, **sizes, num_warps=WARPS, enable_fp_fusion=False)
            traced = {"BITS": c.step_bits, "KEPT": sizes["KEPT"], "ROWS": TRACED}
            trace[(triton.cdiv(len(rows), TRACED),)](back, last, out, len(rows), steps, **traced, num_warps=1)
    return states


def constants(bits: float) -> dict[str, Any]:
    """The constants of the search for a width."""
    c = code(bits)
    return {"WAYS": 1 << c.step_bits, "KEPT": 1 << (STATE_BITS - c.step_bits), "ENTRIES": c.entries}


@cache
def _book(bits: float, device: torch.device) -> Tensor:
    return codebook(bits).to(device).contiguous()
