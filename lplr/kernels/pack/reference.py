"""Codes of 1 to 8 bits, packed densely row by row.

Layout: the codes of one row form one little-endian bit stream (bit k of the stream is bit k % 8 of
byte k // 8; the lowest bit of a code comes first), padded with zero bits to a whole byte.  A row
therefore takes ceil(columns * bits / 8) bytes and can be read alone.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor


def packed_width(columns: int, bits: int) -> int:
    """Bytes that one packed row of `columns` codes takes."""
    return (columns * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}: codes have 1 to 8 bits")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (n, d), uint8 below 2**bits, into (n, ceil(d * bits / 8)) bytes.

    The stream is assembled in cycles of lcm(bits, 8) bits, so that every code of a cycle has a
    fixed place: at most 15 vectorised steps whatever the width.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}: a uint8 matrix is expected")
    n, d = codes.shape
    if bits == 8:
        return codes.contiguous()
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}: {bits}-bit codes are below {1 << bits}")
    per_cycle = 8 // gcd(bits, 8)  # codes a cycle
    cycle_bytes = bits // gcd(bits, 8)
    cycles = -(-d // per_cycle)
    padded = torch.zeros(n, cycles * per_cycle, dtype=torch.uint8, device=codes.device)
    padded[:, :d] = codes
    lanes = padded.view(n, cycles, per_cycle)
    out = torch.zeros(n, cycles, cycle_bytes, dtype=torch.uint8, device=codes.device)
    for k in range(per_cycle):
        byte, shift = divmod(k * bits, 8)
        out[:, :, byte] |= lanes[:, :, k] << shift
        if shift + bits > 8:
            out[:, :, byte + 1] |= lanes[:, :, k] >> (8 - shift)
    return out.view(n, cycles * cycle_bytes)[:, : packed_width(d, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`: the codes (n, columns), uint8."""
    _check_bits(bits)
    n, width = packed.shape
    if packed.dtype != torch.uint8 or width != packed_width(columns, bits):
        raise ValueError(
            f"packed codes are {packed.dtype} with rows of {width} bytes: "
            f"uint8 rows of {packed_width(columns, bits)} bytes hold {columns} codes of {bits} bits"
        )
    if bits == 8:
        return packed.clone()
    per_cycle = 8 // gcd(bits, 8)
    cycle_bytes = bits // gcd(bits, 8)
    cycles = -(-columns // per_cycle)
    if width != cycles * cycle_bytes:
        packed = torch.nn.functional.pad(packed, (0, cycles * cycle_bytes - width))
    stream = packed.view(n, cycles, cycle_bytes)
    out = torch.empty(n, cycles, per_cycle, dtype=torch.uint8, device=packed.device)
    for k in range(per_cycle):
        byte, shift = divmod(k * bits, 8)
        code = stream[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (stream[:, :, byte + 1] << (8 - shift))
        out[:, :, k] = code & ((1 << bits) - 1)
    return out.view(n, cycles * per_cycle)[:, :columns].contiguous()
