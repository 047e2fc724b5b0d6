"""Vector instructions for compiled loops: the look-up of 16 sums by byte shuffles, as LLVM instructions that numba inlines.

A group is four activations q_0 .. q_3, whole numbers of at most LARGEST, and its table the 16 signed sums

    t(b) = sum_k (2 bit_k(b) - 1) q_k,      b = 0 .. 15,

kept as 16 low bytes and then 16 high bytes.  One byte shuffle looks up a byte of `LANES` sums at once, and eight groups (a
block, GROUPS) fit 16 bits: 8 * 4 * 1023 < 2^15.  Source: Wei et al., "T-MAC", EuroSys 2025 (tables for bits of weights).

What stands here is generic LLVM but for the shuffle, for which there are AVX-512, AVX2, SSSE3 and NEON; anything else takes
the bytes one at a time.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import config

from lplr.kernels.lowrank.emit import F32, I8, I16, I32, I64, call, instruction, load, places, store, vector

LARGEST = 1023
GROUPS = 8  # groups a block
BLOCK = 4 * GROUPS  # activations a block
TABLE = 32  # bytes a table

_config: Any = config
_SHUFFLES = {  # feature of the processor -> (LLVM's name of a byte shuffle, bytes)
    "avx512bw": ("llvm.x86.avx512.pshuf.b.512", 64),
    "avx2": ("llvm.x86.avx2.pshuf.b", 32),
    "ssse3": ("llvm.x86.ssse3.pshuf.b.128", 16),
    "neon": ("llvm.aarch64.neon.tbl1.v16i8", 16),
}


def shuffle_of(features: dict[str, bool]) -> tuple[str, int]:
    """(LLVM's name, bytes) of the widest byte shuffle among the features of a processor; no name where there is none."""
    return next((found for feature, found in _SHUFFLES.items() if features.get(feature)), ("", 16))


def _host() -> dict[str, bool]:
    """The features of the processor that numba compiles for."""
    features = dict(llvm.get_host_cpu_features())
    if _config.CPU_FEATURES is not None:  # numba was told to compile for another processor
        features = {name[1:]: name[0] == "+" for name in _config.CPU_FEATURES.split(",") if name}
    elif _config.CPU_NAME == "generic":
        features = {}
    if not _config.ENABLE_AVX:
        features = {name: on and not name.startswith("avx") for name, on in features.items()}
    return features


FEATURES = _host()
SHUFFLE, LANES = shuffle_of(FEATURES)
TILE = 2 * LANES  # rows that one vector of codes stands for: the low four bits of its bytes, then the high ones


def _look_up(b: Any, table: Any, index: Any) -> Any:
    """table[index] for bytes index < 16; the table of 16 bytes is repeated to the length of a vector."""
    kind = table.type
    if SHUFFLE:
        return call(b, SHUFFLE, kind, [table, index])
    out = ir.Constant(kind, ir.Undefined)
    for lane in range(kind.count):
        place = ir.Constant(I32, lane)
        out = b.insert_element(out, b.extract_element(table, b.extract_element(index, place)), place)
    return out


@instruction
def add_block(context: Any, codes: Any, tables: Any, scale: Any, sums: Any) -> Any:
    """sums[i] += scale * sum over the block's groups g of table_g[code_g of row i], for the TILE rows i of a tile.

    Addresses: codes of GROUPS vectors, GROUPS tables, TILE float32 sums.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        codes, tables, scale, sums = args
        byte, half, wide = ir.VectorType(I8, LANES), ir.VectorType(I16, LANES // 2), ir.VectorType(F32, 8)
        chunks = range(LANES // 16)  # a vector instruction joins bytes within 16 of them
        joined = [[x for c in chunks for i in range(8 * h, 8 * h + 8) for x in (16 * c + i, LANES + 16 * c + i)] for h in (0, 1)]
        total = [ir.Constant(half, [0] * half.count)] * 4
        for g in range(GROUPS):
            code = load(b, codes, LANES * g, byte)
            low, high = (
                places(b, load(b, tables, TABLE * g + 16 * k, ir.VectorType(I8, 16)), [i % 16 for i in range(LANES)])
                for k in (0, 1)
            )
            for k, index in enumerate((b.and_(code, vector(I8, [15] * LANES)), b.lshr(code, vector(I8, [4] * LANES)))):
                lows, highs = _look_up(b, low, index), _look_up(b, high, index)
                for h in (0, 1):
                    found = b.bitcast(b.shuffle_vector(lows, highs, vector(I32, joined[h])), half)
                    total[2 * k + h] = b.add(total[2 * k + h], found)
        scales = places(b, b.insert_element(ir.Constant(wide, ir.Undefined), scale, ir.Constant(I32, 0)), [0] * 8)
        for k in (0, 1):
            for h in (0, 1):
                for c in chunks:
                    part = places(b, total[2 * k + h], range(8 * c, 8 * c + 8))
                    value = b.sitofp(b.sext(part, ir.VectorType(I32, 8)), wide)
                    at = 4 * (LANES * k + 16 * c + 8 * h)
                    value = b.fmul(value, scales, flags=("contract",))
                    store(b, b.fadd(load(b, sums, at, wide), value, flags=("contract",)), sums, at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), generate


@instruction
def write_tables(context: Any, numbers: Any, tables: Any) -> Any:
    """The GROUPS tables of a block from its BLOCK whole numbers, int16; both addresses."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        numbers, tables = args
        for g in range(GROUPS):
            four = load(b, numbers, 8 * g, ir.VectorType(I16, 4))
            table = vector(I16, [0] * 16)
            for k in range(4):
                signs = vector(I16, [1 if entry >> k & 1 else -1 for entry in range(16)])
                table = b.add(table, b.mul(places(b, four, [k] * 16), signs))
            byte = ir.VectorType(I8, 16)
            store(b, b.trunc(table, byte), tables, TABLE * g)
            store(b, b.trunc(b.lshr(table, vector(I16, [8] * 16)), byte), tables, TABLE * g + 16)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@instruction
def load64(context: Any, address: Any) -> Any:
    """The eight bytes at an address, little-endian."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return load(b, args[0], 0, I64)

    return types.uint64(types.int64), generate


@instruction
def prefetch(context: Any, address: Any) -> Any:
    """Have the bytes at an address, which need not be there, brought near."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        at = b.inttoptr(args[0], I8.as_pointer())
        call(b, "llvm.prefetch.p0", ir.VoidType(), [at, *(ir.Constant(I32, k) for k in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@instruction
def as_float(context: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], F32)

    return types.float32(types.uint32), generate


@instruction
def pointer(context: Any, address: Any) -> Any:
    """An address as a pointer, for `numba.carray`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], I8.as_pointer())

    return types.voidptr(types.int64), generate


@instruction
def half_at(context: Any, address: Any) -> Any:
    """The float32 that the two bytes at an address stand for as bfloat16."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(b.shl(b.zext(load(b, args[0], 0, I16), I32), ir.Constant(I32, 16)), F32)

    return types.float32(types.int64), generate


def _half(b: Any, value: Any) -> Any:
    """The 16 bits of a float32 as bfloat16, rounded to nearest, ties to even."""
    bits = b.bitcast(value, I32)
    even = b.and_(b.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = b.lshr(b.add(b.add(bits, ir.Constant(I32, 0x7FFF)), even), ir.Constant(I32, 16))
    number = b.fcmp_ordered("ord", value, value)
    return b.trunc(b.select(number, rounded, ir.Constant(I32, 0x7FC0)), I16)


@instruction
def as_half(context: Any, value: Any) -> Any:
    """The bits of a float32 as bfloat16, rounded to nearest, ties to even."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _half(b, args[0])

    return types.uint16(types.float32), generate


@instruction
def put_half(context: Any, value: Any, address: Any) -> Any:
    """Write a float32 as bfloat16, see `as_half`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        value, address = args
        store(b, _half(b, value), address, 0)
        return context.get_dummy_value()

    return types.void(types.float32, types.int64), generate


@instruction
def float_at(context: Any, address: Any) -> Any:
    """The float32 at an address."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return load(b, args[0], 0, F32)

    return types.float32(types.int64), generate


@instruction
def put_float(context: Any, value: Any, address: Any) -> Any:
    """Write a float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        store(b, args[0], args[1], 0)
        return context.get_dummy_value()

    return types.void(types.float32, types.int64), generate


def _add_columns(b: Any, words: list[Any], x: Any, even: Any, odd: Any) -> None:
    """even[k] += x_q * low half of word k, odd[k] += x_q * high half, both as bfloat16, for the 8 words of each column q."""
    wide, whole = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
    low, high = load(b, even, 0, wide), load(b, odd, 0, wide)
    for q, word in enumerate(words):
        one = ir.Constant(wide, ir.Undefined)
        factor = places(b, b.insert_element(one, load(b, x, 4 * q, F32), ir.Constant(I32, 0)), [0] * 8)
        first = b.bitcast(b.shl(word, vector(I32, [16] * 8)), wide)
        second = b.bitcast(b.and_(word, ir.Constant(whole, [0xFFFF0000] * 8)), wide)
        low = b.fadd(low, b.fmul(factor, first, flags=("contract",)), flags=("contract",))
        high = b.fadd(high, b.fmul(factor, second, flags=("contract",)), flags=("contract",))
    store(b, low, even, 0)
    store(b, high, odd, 0)


def windows(b: Any, stream: Any, stride: Any, table: Any, advance: int, place: int, bits: int, pair: bool) -> list[Any]:
    """The 8 words, two rows each, of each of four columns that `add_windows` adds."""
    entry = I32 if pair else I16
    base = b.inttoptr(table, entry.as_pointer())
    words = []
    for _ in range(4):
        found = ir.Constant(ir.VectorType(entry, 8 if pair else 16), ir.Undefined)
        for half in range(1 if pair else 2):
            held = load(b, stream, half * advance, I64)
            for k in range(8):
                window = b.and_(b.lshr(held, ir.Constant(I64, place + advance * k)), ir.Constant(I64, (1 << bits) - 1))
                value = b.load(b.gep(base, [window]))
                found = b.insert_element(found, value, ir.Constant(I32, 8 * half + k))
        words.append(b.bitcast(found, ir.VectorType(I32, 8)))
        stream = b.add(stream, stride)
    return words


@instruction(prefer_literal=True)
def add_windows(
    context: Any, stream: Any, stride: Any, table: Any, x: Any, even: Any, odd: Any, up: Any, low: Any, width: Any, both: Any
) -> Any:
    """Sixteen rows of four columns of a trellis, added to even and odd rows' sums: see `columns.multiply`.

    Addresses: of the byte that holds the lowest bit of the first window of the first column, the others `stride` bytes on; of
    the table; of four activations; of 8 sums each.  Constants: bits a look-up, the window's place in its byte, its length,
    whether an entry holds two rows (32 bits) or one (16).
    """
    if not all(isinstance(t, types.Literal) for t in (up, low, width, both)):
        return None
    constants = tuple(t.literal_value for t in (up, low, width, both))
    signature = types.void(*[types.int64] * 6, up, low, width, both)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        stream, stride, table, x, even, odd = args[:6]
        _add_columns(b, windows(b, stream, stride, table, *constants), x, even, odd)
        return context.get_dummy_value()

    return signature, generate


def lattice_points(b: Any, codes: Any, stride: Any, words: Any, width: int, later: bool) -> list[Any]:
    """The 8 words, two rows each, of each of four columns that `add_points` adds."""
    four = ir.VectorType(I32, 4)

    def byte(offset: int) -> Any:
        return b.zext(load(b, codes, offset, I8), I64)

    def four_words(index: Any, first: int) -> Any:
        """Words first + 4 index .. + 3 of the book."""
        return load(b, b.add(words, b.shl(index, ir.Constant(I64, 4))), 4 * first, four)

    base = 4352 if later else 0  # columns.STAGE
    columns = []
    for _ in range(4):
        halves = []
        for stage in (0, 1):
            at = stage * width + (2 if later else 0)
            index = byte(at)
            if later and width == 3:
                halves.append(four_words(index, base))
                continue
            high = byte(at + 1)
            odd_pattern = b.zext(load(b, b.add(words, b.shl(index, ir.Constant(I64, 2))), 4 * (base + 4096), I32), I64)
            row = b.or_(high, b.shl(odd_pattern, ir.Constant(I64, 8)))
            chosen = b.and_(four_words(index, base + 1024), four_words(row, base + 2048))
            minus = b.trunc(b.lshr(high, ir.Constant(I64, 7)), I32)
            flip = b.mul(minus, ir.Constant(I32, 0x80008000))
            flips = places(b, b.insert_element(ir.Constant(four, ir.Undefined), flip, ir.Constant(I32, 0)), [0] * 4)
            halves.append(b.xor(b.xor(four_words(index, base), chosen), flips))
        columns.append(b.shuffle_vector(halves[0], halves[1], vector(I32, range(8))))
        codes = b.add(codes, stride)
    return columns


@instruction(prefer_literal=True)
def add_points(context: Any, codes: Any, stride: Any, words: Any, x: Any, even: Any, odd: Any, size: Any, second: Any) -> Any:
    """The same for a lattice of `size` bytes a vector, with the addresses of the first column's codes and of `lattice_book`.

    `second`: its second stage.
    """
    if not all(isinstance(t, types.Literal) for t in (size, second)):
        return None
    width, later = size.literal_value, second.literal_value
    signature = types.void(*[types.int64] * 6, size, second)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        codes, stride, words, x, even, odd = args[:6]
        _add_columns(b, lattice_points(b, codes, stride, words, width, later), x, even, odd)
        return context.get_dummy_value()

    return signature, generate
