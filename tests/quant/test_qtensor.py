"""A packed matrix against one multiplied out by hand."""

from __future__ import annotations

import pytest
import torch

from lplr.quant import QTensor


def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2], [3, 3, 0]], dtype=torch.uint8)
    row = torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    col = torch.tensor([1.0, 0.25, 4.0], dtype=torch.bfloat16)
    levels = [[-3, -1, 1], [3, 3, -3]]
    q = QTensor.from_codes(codes, 2, row, col)
    assert q.levels().tolist() == levels
    assert q.dequantize().tolist() == [[-1.5, -0.125, 2.0], [6.0, 1.5, -24.0]]
    assert QTensor.from_codes(codes, 2).dequantize().tolist() == levels
    assert QTensor.from_codes(codes, 2, row).dequantize().tolist() == [[-1.5, -0.5, 0.5], [6.0, 6.0, -6.0]]
    assert QTensor.from_codes(codes, 2, row[:1], col[:1]).dequantize().tolist() == [[-1.5, -0.5, 0.5], [1.5, 1.5, -1.5]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_levels_are_exact_in_every_type(dtype: torch.dtype) -> None:
    q = QTensor.from_codes(torch.arange(256, dtype=torch.uint8)[None], 8)
    assert q.levels(dtype).double().tolist() == [[2 * c - 255 for c in range(256)]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 17)])
def test_stored_bits_are_the_bytes(bits: int, shape: tuple[int, int], generator: torch.Generator) -> None:
    codes = torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)
    row, col = torch.ones(shape[0], dtype=torch.bfloat16), torch.ones(shape[1], dtype=torch.bfloat16)
    for r, c in ((None, None), (row, None), (None, col), (row, col), (row[:1], None)):
        q = QTensor.from_codes(codes, bits, r, c)
        held = sum(t.numel() * t.element_size() for t in (q.codes, r, c) if t is not None)
        assert q.stored_bits() == 8 * held and q.shape == shape


def test_float32_product_is_exact() -> None:
    """255 times two scales of 8 significant bits has 24: no rounding in float32."""
    scale = torch.tensor([1 + 127 / 128], dtype=torch.bfloat16)
    q = QTensor.from_codes(torch.full((1, 1), 255, dtype=torch.uint8), 8, scale, scale)
    assert float(q.dequantize()) == float(q.dequantize(torch.float64)) == 255 * (1 + 127 / 128) ** 2
