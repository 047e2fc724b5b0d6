"""Packing against bytes packed by hand and against Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.kernels.pack import pack, packed_width, unpack


def by_hand(rows: list[list[int]], bits: int) -> list[list[int]]:
    """Each row as one little-endian integer."""
    out = []
    for row in rows:
        value = sum(code << (bits * j) for j, code in enumerate(row))
        out.append(list(value.to_bytes((len(row) * bits + 7) // 8, "little")))
    return out


def test_bytes_written_out() -> None:
    assert pack(torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.uint8), 1).tolist() == [[0b00001101, 0b1]]
    assert pack(torch.tensor([[3, 0, 2, 1, 1]], dtype=torch.uint8), 2).tolist() == [[0b01100011, 0b01]]
    # 5, 3, 6 in three bits: 101 011 110, lowest bit first -> 10 011 101 | 1
    assert pack(torch.tensor([[5, 3, 6]], dtype=torch.uint8), 3).tolist() == [[0b10011101, 0b1]]
    assert pack(torch.tensor([[0xA, 0x5, 0xF]], dtype=torch.uint8), 4).tolist() == [[0x5A, 0x0F]]
    assert pack(torch.tensor([[200, 7]], dtype=torch.uint8), 8).tolist() == [[200, 7]]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(0, 4), st.integers(0, 37), st.integers(0, 2**32 - 1))
def test_round_trip(bits: int, n: int, d: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, d), generator=g).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (n, packed_width(d, bits)) and packed.is_contiguous()
    assert packed.tolist() == by_hand(codes.tolist(), bits)
    assert torch.equal(unpack(packed, bits, d), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_strided_input(bits: int) -> None:
    codes = (torch.arange(77) % (1 << bits)).to(torch.uint8).reshape(11, 7).T
    assert torch.equal(unpack(pack(codes, bits), bits, 11), codes)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits: int) -> None:
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(codes, bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(codes, bits, 3)


def test_wrong_codes() -> None:
    with pytest.raises(ValueError, match="below 4"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack(torch.zeros(2, 2), 2)
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack(torch.zeros(2, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="rows of 2 bytes"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 3, 7)
    with pytest.raises(ValueError, match="float32"):
        unpack(torch.zeros(1, 3), 3, 7)
