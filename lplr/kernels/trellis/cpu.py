"""The trellis encoder of `reference.encode` for one core, compiled by numba: the same sums, the same ties.

A step is two passes over the states that the compiler turns into vector instructions: the minimum over the symbol that the
register drops, and the cost of the entries that it takes up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lplr.kernels.pack import pack
from lplr.kernels.trellis.reference import STATE_BITS, code, codebook


def encode(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """See `reference.encode`."""
    c, (m, n) = code(bits), x.shape
    steps = -(-n // c.entries)
    book = codebook(bits).numpy()
    padded = np.zeros((m, steps, c.entries), np.float32)
    padded.reshape(m, -1)[:, :n] = x.detach().float().numpy()
    spare = steps * c.entries - n
    run = viterbi(c.step_bits, c.entries)
    symbols = np.empty((m, steps), np.uint8)
    values = np.empty((m, steps, c.entries), np.float32)
    back = np.empty((steps, 1 << (STATE_BITS - c.step_bits)), np.uint8)
    for i in range(m):
        run(padded[i], book, c.start, spare, back, symbols[i], values[i])
    codes = pack(torch.from_numpy(symbols), c.step_bits)
    return codes, torch.from_numpy(values.reshape(m, -1)[:, :n]).to(x.dtype)


@cache
def viterbi(step_bits: int, entries: int) -> Callable[..., None]:
    """run(x (t, v), book (v, states), start, spare, back, symbols, values) with the sizes of a code compiled in."""
    ways, kept, states = 1 << step_bits, 1 << (STATE_BITS - step_bits), 1 << STATE_BITS
    wide, paired, top = ways > 8, entries == 2, STATE_BITS - step_bits
    infinity = np.float32(np.inf)

    def drop(cost: Any, best: Any, oldest: Any) -> None:
        for r in range(kept):
            least, which = cost[r], np.int32(0)
            for j in range(1, ways):
                candidate = cost[j * kept + r]
                less = candidate < least
                least = candidate if less else least
                which = np.int32(j) if less else which
            best[r] = least
            oldest[r] = which

    def drop_wide(cost: Any, best: Any, oldest: Any) -> None:
        for r in range(kept):
            best[r] = cost[r]
            oldest[r] = np.int32(0)
        for j in range(1, ways):
            for r in range(kept):
                candidate = cost[j * kept + r]
                less = candidate < best[r]
                best[r] = candidate if less else best[r]
                oldest[r] = np.int32(j) if less else oldest[r]

    def take_one(cost: Any, best: Any, entry: Any, points: Any) -> None:
        for r in range(kept):
            base = best[r]
            for b in range(ways):
                gap = entry - points[r * ways + b]
                cost[r * ways + b] = base + gap * gap

    def take_more(cost: Any, entry: Any, points: Any) -> None:
        for s in range(states):
            gap = entry - points[s]
            cost[s] += gap * gap

    compiled = numba.njit(nogil=True, inline="always")
    drop_oldest = compiled(drop_wide if wide else drop)
    take, more = compiled(take_one), compiled(take_more)

    def run(x: Any, book: Any, start: int, spare: int, back: Any, symbols: Any, values: Any) -> None:
        steps = x.shape[0]
        cost = np.full(states, infinity, np.float32)
        cost[start] = np.float32(0)
        best, oldest = np.empty(kept, np.float32), np.empty(kept, np.int32)
        for t in range(steps):
            drop_oldest(cost, best, oldest)
            for r in range(kept):
                back[t, r] = oldest[r]
            take(cost, best, x[t, 0], book[0])
            if paired and not (t == steps - 1 and spare):
                more(cost, x[t, 1], book[1])
        state = np.argmin(cost)
        for t in range(steps - 1, -1, -1):
            symbols[t] = state & (ways - 1)
            for v in range(entries):
                values[t, v] = book[v, state]
            rest = state >> step_bits
            state = (np.int64(back[t, rest]) << top) | rest

    return numba.njit(nogil=True)(run)
