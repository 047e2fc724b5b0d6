"""The trellis encoder and decoder of `reference`, compiled by numba: the same sums, the same ties, the same bits.

Between two steps the encoder keeps one cost for each rest r of the register, its content without the symbol to come:

    best'(r) = min over j < 2^k of  best(s >> k) + |x - c(s)|^2,    s = j 2^(STATE_BITS - k) + r,

j the symbol that the register drops.  Few ways a step: the loop that becomes vector instructions runs over the rests of one last
symbol, which a codebook sorted by last symbols makes contiguous, and the minimum over j stays in registers.  Many: it runs
over the last symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lplr.kernels.backend import jit
from lplr.kernels.trellis.reference import STATE_BITS, Feedback, code, codebook, packed_width, stretches

FEW = 4  # bits a step up to which the vector loop runs over rests: measured
ENCODED_AT_ONCE = 1 << 13  # entries below which threads cost more than they save
DECODED_AT_ONCE = 1 << 19
_NONE = np.zeros((1, 0), np.float32)


def encode(x: Tensor, bits: float, feedback: Feedback | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.encode`; rows are shared among torch.get_num_threads() threads."""
    start, book, by_symbol, run = _encoder(bits)
    m, n = x.shape
    codes = torch.zeros(m, packed_width(n, bits), dtype=torch.uint8)
    values = torch.empty(m, n, dtype=torch.float32)
    c = code(bits)
    steps = np.array(stretches(-(-n // c.entries), c, feedback), np.int64).reshape(-1, 3)
    U, weights = _NONE, _NONE[0]
    if feedback is not None:
        U, weights = feedback.U.contiguous().numpy(), feedback.weights.contiguous().numpy()
    fixed = (x.detach().float().contiguous().numpy(), U, weights, steps, book, by_symbol, start, codes.numpy(), values.numpy())
    _share(m, n, ENCODED_AT_ONCE, lambda first, last: run(*fixed, first, last))
    return codes, values.to(x.dtype)


def decode(codes: Tensor, bits: float, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `reference.decode`; contiguous, rows shared among torch.get_num_threads() threads."""
    m, width = codes.shape
    if codes.dtype != torch.uint8 or width != packed_width(n, bits):
        raise ValueError(
            f"trellis codes are {codes.dtype} with rows of {width} bytes: "
            f"uint8 rows of {packed_width(n, bits)} bytes hold {n} entries of {bits:g} bits"
        )
    c, (book, same_size) = code(bits), _words(bits, dtype)
    values = torch.empty(m, n, dtype=dtype)
    fixed = (codes.contiguous().numpy(), c.step_bits, c.start, book, values.view(same_size).numpy())
    _share(m, n, DECODED_AT_ONCE, lambda first, last: _read(*fixed, first, last))
    return values


def _share(m: int, n: int, at_once: int, work: Callable[[int, int], None]) -> None:
    """work(first, last) on all of m rows of n entries, in threads where there is enough of it."""
    threads = min(torch.get_num_threads(), m) if m * n >= at_once else 1
    if threads == 1:
        work(0, m)
        return
    step = -(-m // (4 * threads))  # four stretches a thread: a thread that is slowed down does fewer
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first: work(first, min(first + step, m)), range(0, m, step)))


@cache
def _encoder(bits: float) -> tuple[int, np.ndarray, np.ndarray, Callable[..., None]]:
    """(start, codebook, codebook by last symbols, run) of a width."""
    c = code(bits)
    book = codebook(bits).numpy()
    return c.start, book, by_last_symbol(book, c.step_bits), viterbi(c.step_bits, c.entries)


def by_last_symbol(book: np.ndarray, step_bits: int) -> np.ndarray:
    """The codebook (v, states) with its states sorted by their last symbols: state s = (r << k) + b goes to b 2^(12 - k) + r."""
    turned = book.reshape(len(book), -1, 1 << step_bits).transpose(0, 2, 1)
    return np.ascontiguousarray(turned).reshape(book.shape)


@cache
def _words(bits: float, dtype: torch.dtype) -> tuple[np.ndarray, torch.dtype]:
    """The codebook (states, v) in a type, as integers of the same size, and the type of those: numba has no bfloat16."""
    same_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return codebook(bits).T.contiguous().to(dtype).view(same_size).numpy(), same_size


@jit()
def _read(codes: Any, step_bits: int, start: int, book: Any, values: Any, first: int, last: int) -> None:
    """Rows first .. last - 1 of values (m, n) from codes (m, bytes)."""
    entries, n = book.shape[1], values.shape[1]
    symbol_mask, state_mask = np.uint32((1 << step_bits) - 1), np.uint32((1 << STATE_BITS) - 1)
    up = np.uint32(step_bits)
    for i in range(first, last):
        row, out = codes[i], values[i]
        state, bits, held, at = np.uint32(start), np.uint32(0), np.uint32(0), 0
        for t in range(-(-n // entries)):
            if held < up:
                bits |= np.uint32(row[at]) << held
                held += np.uint32(8)
                at += 1
            state = ((state << up) | (bits & symbol_mask)) & state_mask
            bits >>= up
            held -= up
            out[t * entries] = book[state, 0]
            if entries == 2 and 2 * t + 1 < n:
                out[2 * t + 1] = book[state, 1]


_inline = numba.njit(inline="always")  # so that the sizes that `viterbi` fixes are constants of the loops


@_inline
def _advance_few(best: Any, least: Any, oldest: Any, x: Any, y: Any, book: Any, ways: int, kept: int, paired: bool) -> None:
    """best -> best' and the dropped symbols, for entries x (and y) of a step; book by last symbols, `oldest` in its order."""
    rests = kept // ways  # that end in the same symbol
    for b in range(ways):
        for q in range(rests):
            at = b * kept + q
            gap = x - book[0, at]
            low, which = best[q] + gap * gap, np.int32(0)
            if paired:
                gap = y - book[1, at]
                low += gap * gap
            for j in range(1, ways):
                gap = x - book[0, at + j * rests]
                cost = best[q + j * rests] + gap * gap
                if paired:
                    gap = y - book[1, at + j * rests]
                    cost += gap * gap
                less = cost < low
                low = cost if less else low
                which = np.int32(j) if less else which
            least[b * rests + q] = low
            oldest[b * rests + q] = which
    for q in range(rests):
        for b in range(ways):
            best[q * ways + b] = least[b * rests + q]


@_inline
def _advance_many(
    best: Any, least: Any, which: Any, oldest: Any, x: Any, y: Any, book: Any, step_bits: int, kept: int, paired: bool
) -> None:
    """The same with the codebook as it is, and `oldest` by rests."""
    ways = 1 << step_bits
    width = min(ways, kept)
    for j in range(ways):
        for to in range(0, kept, width):
            base = best[(j * kept + to) >> step_bits]
            for r in range(to, to + width):
                gap = x - book[0, j * kept + r]
                cost = base + gap * gap
                if paired:
                    gap = y - book[1, j * kept + r]
                    cost += gap * gap
                less = j == 0 or cost < least[r]
                least[r] = cost if less else least[r]
                which[r] = np.int32(j) if less else which[r]
    for r in range(kept):
        best[r] = least[r]
        oldest[r] = which[r]


@_inline
def _last_state(best: Any, x: Any, y: Any, book: Any, step_bits: int, paired: bool) -> int:
    """The cheapest state after the last step; the first of them."""
    low, state = np.float32(np.inf), 0
    for s in range(1 << STATE_BITS):
        gap = x - book[0, s]
        cost = best[s >> step_bits] + gap * gap
        if paired:
            gap = y - book[1, s]
            cost += gap * gap
        if cost < low:
            low, state = cost, s
    return state


@_inline
def _trace_back(
    state: Any, first: int, stop: int, end: int, oldest: Any, step_bits: int, by_symbol: bool, book: Any, codes: Any, values: Any
) -> int:
    """Codes, packed, and values of steps first .. stop - 1 of the path that ends in a state after step end - 1; returns the
    state after step stop - 1."""
    ways, kept = 1 << step_bits, 1 << (STATE_BITS - step_bits)
    decided = state
    for t in range(end - 1, first - 1, -1):
        if t < stop:
            if t == stop - 1:
                decided = state
            byte, shift = (t * step_bits) >> 3, (t * step_bits) & 7
            symbol = (state & (ways - 1)) << shift
            codes[byte] |= symbol & 255
            if symbol > 255:
                codes[byte + 1] |= symbol >> 8
            for v in range(len(book)):
                if t * len(book) + v < len(values):
                    values[t * len(book) + v] = book[v, state]
        rest = state >> step_bits
        place = (rest & (ways - 1)) * (kept // ways) + (rest >> step_bits) if by_symbol else rest
        state = (np.int64(oldest[t, place]) << (STATE_BITS - step_bits)) | rest
    return decided


@_inline
def _feed_back(row: Any, values: Any, U: Any, first: int, stop: int, wanted: Any) -> None:
    """What entries first .. stop - 1 of a row lack, times U, added to what is wanted after them."""
    for r in range(first, stop, 4):  # of a block, a multiple of four long: what is wanted is read and written once for all
        a, b, c, d = row[r] - values[r], row[r + 1] - values[r + 1], row[r + 2] - values[r + 2], row[r + 3] - values[r + 3]
        for j in range(stop, len(row)):
            wanted[j] += a * U[r, j] + b * U[r + 1, j] + (c * U[r + 2, j] + d * U[r + 3, j])


@cache
def viterbi(step_bits: int, entries: int) -> Callable[..., None]:
    """run(x (m, n), U, weights, stretches, book, book by last symbols, start, codes, values, first, last): rows first ..
    last - 1, for these sizes; codes come in as zeros, no weights mean no feedback.

    The sizes are all that the function closes over, so that numba keeps the compiled code of each on disk.
    """
    ways, kept, few, paired = 1 << step_bits, 1 << (STATE_BITS - step_bits), step_bits <= FEW, entries == 2

    def run(
        x: Any, U: Any, weights: Any, stretches: Any, book: Any, by_symbol: Any, start: int, codes: Any, values: Any,
        first: int, last: int,
    ) -> None:  # fmt: skip
        n = x.shape[1]
        steps, turned = -(-n // entries), book.T
        best, least = np.empty(kept, np.float32), np.empty(kept, np.float32)
        which, oldest = np.empty(kept, np.int32), np.empty((steps, kept), np.uint8)  # row t leads to the state before step t
        wanted = np.empty(n, np.float32)
        for i in range(first, last if steps else first):
            wanted[:] = x[i]
            state = start
            for k in range(len(stretches)):
                begin, stop, end = stretches[k]
                best[:] = np.float32(np.inf)
                best[state & (kept - 1)] = np.float32(0)
                oldest[begin] = 0
                for t in range(begin, end):
                    if t > begin and len(weights):  # costs are in units of the weight of their step
                        best *= weights[entries * (t - 1)] / weights[entries * t]
                    u = wanted[entries * t]
                    v = wanted[entries * t + 1] if paired and entries * t + 1 < n else u
                    if t == end - 1:
                        state = _last_state(best, u, v, book, step_bits, paired and entries * t + 1 < n)
                    elif few:
                        _advance_few(best, least, oldest[t + 1], u, v, by_symbol, ways, kept, paired)
                    else:
                        _advance_many(best, least, which, oldest[t + 1], u, v, book, step_bits, kept, paired)
                state = _trace_back(state, begin, stop, end, oldest, step_bits, few, book, codes[i], values[i])
                if stop < steps:
                    _feed_back(x[i], values[i], U, entries * begin, entries * stop, wanted)
        # not what the trace met: where every cost is infinite it does not lead back to the start
        _read(codes, step_bits, start, turned, values, first, last)

    return jit()(run)
