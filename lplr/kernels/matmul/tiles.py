"""Triton functions that turn packed codes into tiles of points, in registers.

A group is LOADS loads of WIDE 32-bit words that one thread makes (16 bytes each where WIDE is 4): 32 WIDE codes of LOADS bits.
A group is held as a tuple of words, one tensor (rows, groups) each, so that which word a code begins in, and where, is known
when the program is compiled whatever the width; `together` lines the codes up as the last axis, still in the thread that
read them.  Nothing here passes through shared memory but the look-up of `trellis_points`.
"""

# a compile-time constant is an int where it is passed and a `constexpr` where it is used:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(ptr, row, inside, slot, lane, units, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """The words slot * WIDE + lane (k,) of rows `row` (r,): (r, k); zero outside of a row of `units` units of UNIT bytes."""
    start = row.to(tl.int64)[:, None] * units
    if UNIT == 16:
        seen = inside[:, None] & (slot < units * (4 // WIDE))[None, :]
        word = tl.load(ptr + start * 4 + (slot * WIDE + lane)[None, :], mask=seen, other=0)
    elif UNIT == 4:
        index = slot * WIDE + lane
        seen = inside[:, None] & (index < units)[None, :]
        word = tl.load(ptr + start + index[None, :], mask=seen, other=0)
    else:
        word = tl.zeros([row.shape[0], slot.shape[0]], tl.int32)
        for i in tl.static_range(4):
            byte = (slot * WIDE + lane) * 4 + i
            seen = inside[:, None] & (byte < units)[None, :]
            word |= tl.load(ptr + start + byte[None, :], mask=seen, other=0).to(tl.int32) << (8 * i)
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def load_groups(
    ptr, row, inside, first, units, UNIT: tl.constexpr, LOADS: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr
):
    """Groups first .. first + GROUPS - 1 of some rows: the LOADS * WIDE words of each, in order, (r, GROUPS) each."""
    lane = tl.arange(0, WIDE * GROUPS)
    words = ()
    for i in tl.static_range(LOADS):
        slot = (first + lane // WIDE) * LOADS + i
        loaded = load_words(ptr, row, inside, slot, lane % WIDE, units, UNIT, WIDE)
        if WIDE == 4:
            even, odd = tl.split(tl.reshape(loaded, [row.shape[0], GROUPS, 2, 2]))
            first_word, third = tl.split(even)
            second, fourth = tl.split(odd)
            words = words + (first_word, second, third, fourth)
        else:
            first_word, second = tl.split(tl.reshape(loaded, [row.shape[0], GROUPS, 2]))
            words = words + (first_word, second)
    return words


@triton.jit
def field(words, bit: tl.constexpr, width: tl.constexpr):
    """The `width` bits from `bit` on of a group."""
    at: tl.constexpr = bit // 32
    shift: tl.constexpr = bit % 32
    out = words[at] >> shift
    if shift + width > 32:
        out |= words[at + 1] << (32 - shift)
    if width < 32:
        out &= (1 << width) - 1
    return out


@triton.jit
def fields(words, start: tl.constexpr, stride: tl.constexpr, width: tl.constexpr, COUNT: tl.constexpr):
    """COUNT fields of `width` bits, `stride` bits apart, the first from bit `start` on."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (field(words, start + i * stride, width),)
    return out


@triton.jit
def together(parts, COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """COUNT tensors (r, g), COUNT a power of two -> (r, g, COUNT) in another shape of as many entries."""
    for level in tl.static_range(8):  # the first joins are of the highest bit of the place, so that no axis is moved
        if (COUNT >> (level + 1)) > 0:
            joined = ()
            for i in tl.static_range(COUNT >> (level + 1)):
                joined = joined + (tl.join(parts[i], parts[i + (COUNT >> (level + 1))]),)
            parts = joined
    return tl.reshape(parts[0], SHAPE)


@triton.jit
def apart(t, GROUPS: tl.constexpr):
    """(GROUPS * 128,) -> 128 tensors (1, GROUPS): the inverse of `together`."""
    parts = (tl.reshape(t, [1, GROUPS, 2, 2, 2, 2, 2, 2, 2]),)
    for level in tl.static_range(7):
        low = ()
        high = ()
        for i in tl.static_range(1 << level):
            even, odd = tl.split(parts[i])
            low = low + (even,)
            high = high + (odd,)
        parts = low + high
    return parts


@triton.jit
def between_one_and_two(code, BITS: tl.constexpr):
    """1 + code / 2^BITS in float32: the code as the mantissa, which costs a shift and an OR instead of a conversion."""
    return ((code << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def row_points(words, table, GRID: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr):
    """The points (r, g * 32 WIDE) of groups of codes that are stored by rows, float32."""
    shape: tl.constexpr = [words[0].shape[0], words[0].shape[1] * 32 * WIDE]
    code = together(fields(words, 0, BITS, BITS, 32 * WIDE), 32 * WIDE, shape)
    if GRID == "uniform":
        # exact: all are integers below 2^10
        return between_one_and_two(code, BITS) * (2 << BITS) - ((2 << BITS) + (1 << BITS) - 1)
    return tl.load(table + code)


@triton.jit
def lattice_stage(index, high, table, offset: tl.constexpr, EVEN: tl.constexpr, SHIFT: tl.constexpr):
    """Points (.., 8) of a 2-bit stage from the low and the high byte of its words, (.., 1) each."""
    place = tl.arange(0, 8)[None, None, None, :]
    value = tl.load(table + (offset + index * 8 + place)).to(tl.float32)
    seven = high & 127
    odd = seven ^ (seven >> 4)  # the parity of the signs, folded into one bit
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1) ^ (index >= EVEN).to(tl.uint32)) & 1
    minus = ((seven | (odd << 7)) >> place) & 1
    value = (value.to(tl.uint32, bitcast=True) ^ (minus << 31)).to(tl.float32, bitcast=True)
    return value + (1.0 - 2.0 * (high >> 7).to(tl.float32)) * SHIFT


@triton.jit
def lattice_points(
    ptr, column, inside, first, units, table, UNIT: tl.constexpr, BITS: tl.constexpr, VECTORS: tl.constexpr,
    GROUPS: tl.constexpr, EVEN: tl.constexpr, SHIFT: tl.constexpr, EVEN_2: tl.constexpr, SHIFT_2: tl.constexpr,
):  # fmt: skip
    """The points (r, GROUPS * VECTORS * 8) of groups of VECTORS vectors; the table is of the first stage, then of the second."""
    words = load_groups(ptr, column, inside, first, units, UNIT, VECTORS * BITS // 16, 4, GROUPS)
    shape: tl.constexpr = [column.shape[0], GROUPS, VECTORS, 1]
    code = together(fields(words, 0, 8 * BITS, 8 * BITS, VECTORS), VECTORS, shape)
    points = lattice_stage(code & 255, (code >> 8) & 255, table, 0, EVEN, SHIFT)
    if BITS == 3:
        points += tl.load(table + (2048 + (code >> 16) * 8 + tl.arange(0, 8)[None, None, None, :])).to(tl.float32)
    elif BITS == 4:
        points += lattice_stage((code >> 16) & 255, code >> 24, table, 2048, EVEN_2, SHIFT_2)
    return tl.reshape(points, [column.shape[0], GROUPS * VECTORS * 8])


@triton.jit
def trellis_words(
    ptr, column, inside, first, units, UNIT: tl.constexpr, STEP: tl.constexpr, ENTRIES: tl.constexpr, GROUPS: tl.constexpr,
    HISTORY: tl.constexpr,
):  # fmt: skip
    """Groups of 128 / ENTRIES steps of STEP bits, and in front the word before, which for the first group is HISTORY."""
    words = load_groups(ptr, column, inside, first, units, UNIT, STEP, 4 // ENTRIES, GROUPS)
    group = first + tl.arange(0, GROUPS)
    # the first group has none before it: its own first word is read in place of it, and not used
    slot = group * STEP
    lane = tl.where(group == 0, 0, -1)
    before = load_words(ptr, column, inside, slot, lane, units, UNIT, 4 // ENTRIES)
    return (tl.where((group == 0)[None, :], tl.full([1, 1], HISTORY, tl.uint32), before),) + words


@triton.jit
def trellis_quarter(words, states, q: tl.constexpr, STEP: tl.constexpr, ENTRIES: tl.constexpr):
    """The points (r, g, 32) of the q-th quarter of groups of words; a quarter at a time, so that few registers hold indices.

    A state is the last symbols in the order of the stream, not of the register, which is what `states`, 4096 words, is sorted
    by: a float32 value each, or two in bfloat16, the first one low.
    """
    rows: tl.constexpr = words[0].shape[0]
    groups: tl.constexpr = words[0].shape[1]
    steps: tl.constexpr = 32 // ENTRIES
    reach: tl.constexpr = (11 + STEP) // STEP  # symbols that a state of 12 bits still knows
    kept: tl.constexpr = 12 - STEP * (reach - 1)  # bits of the oldest of them that it knows
    windows = fields(words, 32 + (q * steps + 1 - reach) * STEP, STEP, reach * STEP, steps)
    window = together(windows, steps, [rows * groups * steps])
    if kept < STEP:
        window = (window & ((1 << kept) - 1)) | ((window >> STEP) << kept)
    found = tl.gather(states, window.to(tl.int32), 0)
    found = tl.reshape(found, [rows, groups, steps])
    if ENTRIES == 2:
        found = tl.reshape(tl.join(found << 16, found & -65536), [rows, groups, 32])
    return found.to(tl.float32, bitcast=True)


@triton.jit
def trellis_points(words, states, STEP: tl.constexpr, ENTRIES: tl.constexpr):
    """The points (r, g * 128) of groups of words."""
    rows: tl.constexpr = words[0].shape[0]
    groups: tl.constexpr = words[0].shape[1]
    low = tl.join(trellis_quarter(words, states, 0, STEP, ENTRIES), trellis_quarter(words, states, 1, STEP, ENTRIES))
    high = tl.join(trellis_quarter(words, states, 2, STEP, ENTRIES), trellis_quarter(words, states, 3, STEP, ENTRIES))
    quarters = tl.permute(tl.join(low, high), [0, 1, 4, 3, 2])  # (r, g, high, low, 32)
    return tl.reshape(quarters, [rows, groups * 128])
