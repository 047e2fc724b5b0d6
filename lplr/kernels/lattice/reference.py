"""A shifted E8 lattice codebook for 8 entries of N(0, 1) at a time, in one stage of 2 bits an entry or two stages of 1 or 2.

A point of the 2-bit stage is a 16-bit word: a row t of a table of 256 absolute patterns, 7 signs and a shift,

    v = (s_1 t_1, .., s_8 t_8) +- c,      s_i = +-1,      prod s_i = (-1)^p,  p = parity of t: the eighth sign is implied.

With t a vector of half-integers, p its sum mod 2 and c = 1/4, the points v are 2^16 of the lattice E8 + 1/4, the "E8P" codebook.
The table has all 227 patterns of squared norm up to 10, and 29 of the 56 with five 3/2 and three 1/2 (norm 12): those whose
places of 1/2 have an even sum, and one more.  Here the entries of t are then moved to where the centroids of their cells are for
a normal source, one value for each kind of pattern and level (STAGES; Lloyd's iteration): an error of 0.0886 instead of 0.0915
of the plain lattice at its best scale.  All values are multiples of 1/64 below 4: exact in bfloat16, so no cast changes a weight.

The 1-bit stage has 256 vectors of E8 (its 240 roots, +-2 e_i), no signs, with a value for each of the three kinds.  4 bits are
two 2-bit stages, 3 bits a 2-bit and a 1-bit one; the second rounds what the first leaves, for the best point of either shift of
the first.

The nearest point of the 2-bit stage is exact: for y = x -+ c, ||y - s t||^2 = ||y||^2 + ||t||^2 - 2 <|y|, t> if s has the signs
of y, and if that breaks the parity, the cheapest repair is one flip, which costs 4 min_i |y_i| t_i.

Codes: each vector takes `bits` bytes, the word of the 2-bit stage (pattern + 256 * signs, low byte first; sign bit i: entry i is
negative; bit 15: the shift is -c), then the second stage's word or byte.
Sources: Tseng et al., "QuIP#", ICML 2024, section 4 (E8P, residual stages); Conway, Sloane, "Sphere packings", chapter 4 (E8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

WIDTHS = (2.0, 3.0, 4.0)
SIZE = 8  # entries of a vector
UNIT = 1 / 64
FAR = 1e18  # its square is within the range of float32
AT_ONCE = 2048  # vectors searched at once: what is compared stays in the cache

# one kind of pattern a row: how many entries are (1/2, 3/2, 5/2)
KINDS = ((8, 0, 0), (7, 1, 0), (7, 0, 1), (6, 2, 0), (6, 1, 1), (5, 3, 0), (4, 4, 0), (3, 5, 0))
# (shift, for each kind the values in place of 1/2, 3/2, 5/2) in units of 1/64: the first stage of each width, the second of 4
STAGES = {
    "2": (15, ((25, 0, 0), (26, 78, 0), (31, 0, 141), (27, 82, 0), (35, 103, 161), (27, 84, 0), (30, 96, 0), (34, 99, 0))),
    "3": (16, ((25, 0, 0), (26, 77, 0), (32, 0, 147), (28, 84, 0), (37, 109, 166), (28, 88, 0), (32, 101, 0), (36, 103, 0))),
    "4": (17, ((29, 0, 0), (30, 89, 0), (35, 0, 160), (31, 94, 0), (39, 114, 176), (31, 96, 0), (34, 107, 0), (38, 110, 0))),
    "4 second": (4, ((8, 0, 0), (9, 28, 0), (9, 0, 45), (8, 27, 0), (13, 39, 57), (9, 27, 0), (9, 27, 0), (11, 27, 0))),
}
# entries of the 1-bit stage, in the same units: roots (+-1, +-1, 0, ..), roots of halves, +-2 e_i
ROOT, HALF, AXIS = 31, 17, 73


@dataclass(frozen=True)
class Stage:
    """Absolute patterns (256, 8), those of even parity first; their halved squared norms; how many are even; the shift."""

    table: Tensor
    half_norm: Tensor
    even: int
    shift: float

    def to(self, like: Tensor) -> Stage:
        """The stage on the device and in the type of a tensor."""
        return Stage(self.table.to(like), self.half_norm.to(like), self.even, self.shift)


@lru_cache(maxsize=1)
def patterns() -> tuple[tuple[int, ...], ...]:
    """The 256 absolute patterns as levels 0, 1, 2 (for 1/2, 3/2, 5/2), those with an even sum of half-integers first."""
    found = []
    for counts in KINDS:
        kind = sorted(set(_arrangements(counts)))
        found += kind if counts[1] < 5 else sorted(kind, key=lambda p: (sum(i for i in range(SIZE) if p[i] == 0) % 2, p))[:29]
    return tuple(sorted(found, key=lambda p: sum(p) % 2))  # half-integers sum to 4 + the levels' sum; the sort is stable


def _arrangements(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ways to place counts[l] levels l on the 8 places."""
    out = []
    for high in combinations(range(SIZE), counts[1] + counts[2]):
        for fives in combinations(high, counts[2]):
            out.append(tuple(2 if i in fives else 1 if i in high else 0 for i in range(SIZE)))
    return out


@lru_cache(maxsize=4)
def stage(name: str) -> Stage:
    """A 2-bit stage of STAGES, in float64 on the CPU."""
    shift, values = STAGES[name]
    rows = [[values[KINDS.index((p.count(0), p.count(1), p.count(2)))][level] for level in p] for p in patterns()]
    table = torch.tensor(rows, dtype=torch.float64) * UNIT
    return Stage(table, table.square().sum(1) / 2, sum(sum(p) % 2 == 0 for p in patterns()), shift * UNIT)


@lru_cache(maxsize=1)
def one_bit() -> Tensor:
    """The 256 vectors (256, 8) of the 1-bit stage, in float64 on the CPU."""
    pairs = [(i, j, a, b) for i, j in combinations(range(SIZE), 2) for a, b in product((ROOT, -ROOT), repeat=2)]
    rows = [[a if k == i else b if k == j else 0 for k in range(SIZE)] for i, j, a, b in pairs]
    rows += [list(signs) for signs in product((HALF, -HALF), repeat=SIZE) if sum(s < 0 for s in signs) % 2 == 0]
    rows += [[a if k == i else 0 for k in range(SIZE)] for i in range(SIZE) for a in (AXIS, -AXIS)]
    return torch.tensor(rows, dtype=torch.float64) * UNIT


def packed_width(n: int, bits: float) -> int:
    """Bytes that a sequence of n entries takes; ValueError where there is no such width."""
    if bits not in WIDTHS:
        raise ValueError(f"the lattice has no grid of {bits} bits: choose one of {', '.join(f'{w:g}' for w in WIDTHS)}")
    return -(-n // SIZE) * int(bits)


def vectors(x: Tensor) -> Tensor:
    """x (m, n) padded with zeros to whole vectors (m * ceil(n / 8), 8); a NaN counts as zero, a size beyond FAR as FAR."""
    spare = -x.shape[1] % SIZE
    x = x.nan_to_num(0.0, FAR, -FAR).clamp_(-FAR, FAR)
    return (torch.nn.functional.pad(x, (0, spare)) if spare else x).reshape(-1, SIZE)


def encode(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Codes (m, packed_width(n, bits)), uint8, and values (m, n), in x's type, of the points near x (m, n), float32 or float64.

    At 2 bits the value is the nearest of the 2^16 points of each vector; at 3 and 4 the nearest of those whose first stage
    is the nearest of its shift.  Entries are taken as N(0, 1): the grid has no further scale.
    """
    width = packed_width(x.shape[1], bits)
    whole = vectors(x)
    parts = [_encode(part, bits) for part in whole.split(AT_ONCE)] if len(whole) else []
    codes = torch.cat([c for c, _ in parts]) if parts else torch.empty(0, dtype=torch.uint8, device=x.device)
    values = torch.cat([v for _, v in parts]) if parts else whole
    return codes.reshape(x.shape[0], width), values.reshape(x.shape[0], width // int(bits) * SIZE)[:, : x.shape[1]].contiguous()


def _encode(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Codes (v, bits) and values (v, 8) of vectors x (v, 8)."""
    first = stage(f"{bits:g}").to(x)
    found = []
    for negative in (False, True):
        word, value = _nearest(x, first, negative)
        code = [word & 255, word >> 8]
        if bits == 3:
            table = one_bit().to(x)
            index = torch.addmm(table.square().sum(1) / -2, x - value, table.T).argmax(1)
            code, value = [*code, index], value + table[index]
        elif bits == 4:
            word, rest = _nearest_of_both(x - value, stage("4 second").to(x))
            code, value = [*code, word & 255, word >> 8], value + rest
        found.append((torch.stack(code, 1).to(torch.uint8), value))
    (code, value), (other_code, other) = found
    better = _error(x, other) < _error(x, value)
    return torch.where(better, other_code, code), torch.where(better, other, value)


def _error(x: Tensor, value: Tensor) -> Tensor:
    return (x - value).square().sum(1, keepdim=True)


def _nearest_of_both(x: Tensor, grid: Stage) -> tuple[Tensor, Tensor]:
    """Words (v,) and values (v, 8) of the points of a 2-bit stage nearest to x (v, 8)."""
    (word, value), (other_word, other) = (_nearest(x, grid, negative) for negative in (False, True))
    better = _error(x, other) < _error(x, value)
    return torch.where(better[:, 0], other_word, word), torch.where(better, other, value)


def _nearest(x: Tensor, grid: Stage, negative: bool) -> tuple[Tensor, Tensor]:
    """The nearest points with one shift: words (v,), int64, and values (v, 8)."""
    shift = -grid.shift if negative else grid.shift
    y = x - shift
    size, minus = y.abs(), y < 0
    score = torch.addmm(-grid.half_norm, size, grid.table.T)  # (v, 256)
    flip = torch.full_like(score, torch.inf)
    for i in range(SIZE):
        torch.minimum(flip, size[:, i, None] * grid.table[:, i], out=flip)
    odd = torch.arange(len(grid.table), device=x.device) >= grid.even
    broken = (minus.sum(1, keepdim=True) % 2 == 1) != odd
    best = torch.where(broken, score - 2 * flip, score).argmax(1)
    row = grid.table[best]
    repair = (size * row).argmin(1, keepdim=True)
    minus = minus ^ (broken.gather(1, best[:, None]) & (repair == torch.arange(SIZE, device=x.device)))
    places = 1 << torch.arange(SIZE - 1, device=x.device)
    word = best + ((minus[:, :-1] * places).sum(1) << 8) + (int(negative) << 15)
    return word, torch.where(minus, -row, row) + shift


def decode(codes: Tensor, bits: float, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values (m, n) of `encode` from its codes (m, packed_width(n, bits)), exactly, in any float type."""
    m, width = codes.shape
    if codes.dtype != torch.uint8 or width != packed_width(n, bits):
        raise ValueError(
            f"lattice codes are {codes.dtype} with rows of {width} bytes: "
            f"uint8 rows of {packed_width(n, bits)} bytes hold {n} entries of {bits:g} bits"
        )
    words = codes.reshape(m, -(-n // SIZE), int(bits))
    like = torch.empty(0, dtype=dtype, device=codes.device)
    values = _points(words, stage(f"{bits:g}").to(like))
    if bits == 3:
        values += one_bit().to(like)[words[..., 2].long()]
    elif bits == 4:
        values += _points(words[..., 2:], stage("4 second").to(like))
    return values.reshape(m, -(-n // SIZE) * SIZE)[:, :n].contiguous()


def _points(words: Tensor, grid: Stage) -> Tensor:
    """Points (m, v, 8) of a 2-bit stage from the first two bytes of words (m, v, 2 or more)."""
    index, high = words[..., 0].long(), words[..., 1, None]
    places = torch.arange(SIZE - 1, dtype=torch.uint8, device=words.device)
    minus = high >> places & 1  # (m, v, 7)
    last = minus.sum(-1, keepdim=True) + (index >= grid.even)[..., None] & 1
    signs = 1 - 2 * torch.cat([minus, last], -1).to(grid.table.dtype)
    shift = grid.shift * (1 - 2 * (high >> 7).to(grid.table.dtype))
    return torch.addcmul(shift, grid.table[index], signs)
