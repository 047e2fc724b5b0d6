"""Trellis-coded quantization of a sequence x_1, x_2, .. of N(0, 1) entries, k bits for each step of v entries.

A step appends a symbol b of k bits to a shift register of STATE_BITS bits, and the register names the entries that it stands for:

    s_t = (2^k s_{t-1} + b_t) mod 2^STATE_BITS,        xhat_t = c(s_t) in R^v,        s_0 a constant of the code

so a sequence of n entries is k ceil(n / v) bits, and every entry can be decoded alone from the STATE_BITS bits that end in its
symbol.  The codebook is computed, not stored: u = A s mod 2^STATE_BITS, u ^= u >> shift, u = B u mod 2^STATE_BITS (odd A and B: a
permutation of the states), then c = gain * Phi^-1((u + 1/2) / 2^STATE_BITS), the normal quantile, rounded to bfloat16 so that
no cast changes a weight.  A, B, shift, gain and s_0 of each width come from a random search (eval/quality/trellis_search.py).

The encoder is Viterbi's algorithm: for each state the cheapest sequence that ends in it, exact for the squared error.
Sources: Marcellin, Fischer, IEEE Trans. Commun. 1990 (trellis-coded quantization); Mao, Gray, IEEE Trans. Inf. Theory 2010 and
Tseng et al., "QTIP", NeurIPS 2024 (the bit-shift trellis with a random or computed code).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lplr.kernels.pack import pack, unpack
from lplr.kernels.pack import packed_width as _packed_width

STATE_BITS = 12
AHEAD = 5 * STATE_BITS  # bits of a path that are looked at behind a block where errors are fed back: more gains little (measured)


@dataclass(frozen=True)
class Code:
    """k bits a step of v entries; one (A, B, shift) for each entry of a step."""

    step_bits: int
    entries: int
    hashes: tuple[tuple[int, int, int], ...]
    gain: float
    start: int


CODES: dict[float, Code] = {
    0.5: Code(1, 2, ((2229, 2029, 8), (3787, 1183, 9)), 0.70711, 157),
    1.0: Code(1, 1, ((513, 2089, 8),), 0.89201, 1473),
    1.5: Code(3, 2, ((1067, 1, 12), (2527, 1, 12)), 0.97283, 396),
    2.0: Code(2, 1, ((3301, 27, 9),), 1.00698, 55),
    2.5: Code(5, 2, ((3717, 1, 12), (2301, 1, 12)), 1.06299, 11),
    3.0: Code(3, 1, ((2553, 1, 12),), 1.09137, 390),
    3.5: Code(7, 2, ((2771, 1, 12), (431, 1, 12)), 1.09569, 14),
    4.0: Code(4, 1, ((3613, 1, 12),), 1.09785, 39),
    5.0: Code(5, 1, ((3971, 1, 12),), 1.09946, 104),
    6.0: Code(6, 1, ((1081, 1, 12),), 1.09987, 10),
}
WIDTHS = tuple(CODES)


def code(bits: float) -> Code:
    """The code of a width; ValueError names the widths that there are."""
    if bits not in CODES:
        raise ValueError(f"the trellis has no code of {bits} bits: choose one of {', '.join(f'{w:g}' for w in WIDTHS)}")
    return CODES[bits]


def packed_width(n: int, bits: float) -> int:
    """Bytes that a sequence of n entries takes."""
    c = code(bits)
    return _packed_width(-(-n // c.entries), c.step_bits)


@cache
def codebook(bits: float) -> Tensor:
    """(entries, 2^STATE_BITS) float32: what each state stands for, of unit variance but for the gain."""
    return book_of(code(bits))


def book_of(c: Code) -> Tensor:
    """The codebook of a code."""
    mask = (1 << STATE_BITS) - 1
    with torch.inference_mode(False):  # it outlives the mode of its first caller
        states = torch.arange(1 << STATE_BITS, dtype=torch.int64, device="cpu")
        rows = []
        for first, second, shift in c.hashes:
            u = (states * first) & mask
            u = ((u ^ (u >> shift)) * second) & mask
            rows.append(torch.special.ndtri((u.double() + 0.5) / (mask + 1)) * c.gain)
        return torch.stack(rows).to(torch.bfloat16).float()


def symbols_to_states(symbols: Tensor, bits: float) -> Tensor:
    """Symbols (m, t) -> the state after each step, int64 (m, t)."""
    c, mask = code(bits), (1 << STATE_BITS) - 1
    m, t = symbols.shape
    reach = -(-STATE_BITS // c.step_bits)  # symbols that a state still knows, the newest included
    # the start is an earlier history: the symbols that would have led to it
    history = [(c.start >> (c.step_bits * i)) & ((1 << c.step_bits) - 1) for i in range(reach - 1)][::-1]
    early = torch.tensor(history, dtype=torch.int64, device=symbols.device).expand(m, reach - 1)
    known = torch.cat([early, symbols.long()], 1)
    states = torch.zeros(m, t, dtype=torch.int64, device=symbols.device)
    for i in range(reach):
        states |= known[:, reach - 1 - i : reach - 1 - i + t] << (c.step_bits * i)
    return states & mask


def decode(codes: Tensor, bits: float, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed codes (m, packed_width) -> the sequences (m, n)."""
    c = code(bits)
    states = symbols_to_states(unpack(codes, c.step_bits, -(-n // c.entries)), bits)
    values = codebook(bits).to(codes.device, dtype)[:, states]  # (v, m, t)
    return values.permute(1, 2, 0).reshape(len(codes), states.shape[1] * c.entries)[:, :n]


@dataclass(frozen=True)
class Feedback:
    """How errors of a sequence of n entries tell on the entries after them: sum_t weights_t rho_t^2 is the error that counts,

        rho = U^T (x - xhat),    U (n, n) unit upper triangular, its diagonal blocks of `block` entries identities

    float32 on the device of the sequences; weights (n,) positive; block even.  `quant.ldlq` makes it of a metric.
    """

    U: Tensor
    weights: Tensor
    block: int


def stretches(steps: int, c: Code, feedback: Feedback | None) -> list[tuple[int, int, int]]:
    """(first step, the step behind the last that is decided, the step behind the last that is looked at) one after another."""
    if feedback is None:
        return [(0, steps, steps)] if steps else []
    length, ahead = feedback.block // c.entries, -(-AHEAD // c.step_bits)
    return [(t, min(t + length, steps), min(t + length + ahead, steps)) for t in range(0, steps, length)]


def encode(
    x: Tensor, bits: float, feedback: Feedback | None = None, *, search: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The sequences of the trellis with the least ||x_i - xhat_i||^2, for x (m, n): (packed codes uint8 (m, packed_width),
    xhat (m, n)).

    With feedback, xhat of small sum_t weights_t rho_t^2: one block of entries at a time are decided, on the cheapest path that
    goes on AHEAD bits behind them, and then what they leave, times U, is added to all entries after them.  Costs are summed in
    float32.  Time m n (2^STATE_BITS + n); memory m 2^STATE_BITS floats and a byte for each step and path.  `search` is another
    form of `cheapest`.
    """
    c, search = code(bits), search or cheapest
    m, n = x.shape
    steps = -(-n // c.entries)
    wanted = torch.zeros(m, steps * c.entries, device=x.device)
    wanted[:, :n] = x.float()
    weights = torch.zeros(steps * c.entries, device=x.device)
    weights[:n] = 1.0  # what pads the last step costs nothing
    if feedback is not None:  # one weight a step
        weights *= feedback.weights[:: c.entries].repeat_interleave(c.entries)
    state = torch.full((m,), c.start, dtype=torch.int64, device=x.device)
    symbols = torch.empty(m, steps, dtype=torch.uint8, device=x.device)
    given = wanted.clone()
    for first, stop, end in stretches(steps, c, feedback):
        seen = slice(first * c.entries, end * c.entries)
        path = search(wanted[:, seen], weights[seen], state, bits)[:, : stop - first]
        symbols[:, first:stop] = (path & ((1 << c.step_bits) - 1)).to(torch.uint8)
        if feedback is None or stop == steps:
            break
        state = path[:, -1]
        decided = slice(first * c.entries, stop * c.entries)
        values = codebook(bits).to(x.device)[:, path].permute(1, 2, 0).reshape(m, -1)
        error = given[:, decided] - values
        wanted[:, decided.stop : n] += error @ feedback.U[decided, decided.stop :]
    codes = pack(symbols, c.step_bits)
    return codes, decode(codes, bits, n, x.dtype)


def cheapest(x: Tensor, weights: Tensor, state: Tensor, bits: float) -> Tensor:
    """The states (m, t), int64, after each step from a state (m,) on of least sum weights (x - xhat)^2, for x (m, t entries):
    Viterbi's algorithm."""
    c = code(bits)
    m, steps, ways, kept = len(x), x.shape[1] // c.entries, 1 << c.step_bits, 1 << (STATE_BITS - c.step_bits)
    book = codebook(bits).to(x.device)  # (v, 2^STATE_BITS)
    cost = torch.full((m, 1 << STATE_BITS), float("inf"), device=x.device)
    cost.scatter_(1, state[:, None], 0.0)
    back = torch.empty(steps, m, kept, dtype=torch.uint8, device=x.device)
    for t in range(steps):
        best, oldest = cost.view(m, ways, kept).min(1)  # the register drops its oldest symbol
        back[t] = oldest.to(torch.uint8)
        cost = best[:, :, None].expand(m, kept, ways).reshape(m, kept * ways)
        for v in range(c.entries):
            at = t * c.entries + v
            cost = cost + (x[:, at, None] - book[v]).square_().mul_(weights[at])
    last = cost.argmin(1)
    states = torch.empty(m, steps, dtype=torch.int64, device=x.device)
    for t in range(steps - 1, -1, -1):
        states[:, t] = last
        rest = last >> c.step_bits
        oldest = back[t].gather(1, rest[:, None])[:, 0].long()
        last = (oldest << (STATE_BITS - c.step_bits)) | rest
    return states
