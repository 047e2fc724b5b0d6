"""The points of packed codes: blocks of columns decoded apart are those decoded at once, exact in bfloat16."""

from __future__ import annotations

import pytest
import torch

from lplr.kernels.levels import BY_COLUMN, WIDTHS, levels, narrower, nearest, packed_shape, reference


@pytest.mark.parametrize("grid", BY_COLUMN)
def test_decoded_in_blocks(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(23, 37, generator=torch.Generator().manual_seed(0))  # 23 columns of 37 entries
    for bits in WIDTHS[grid]:
        codes, points = nearest(x, grid, bits)
        assert codes.shape == packed_shape((37, 23), grid, bits)
        whole = levels(codes, (37, 23), grid, bits)
        assert torch.equal(whole, points.T) and torch.equal(levels(codes, (37, 23), grid, bits, torch.bfloat16).float(), whole)
        for at_once in (1, 100, 37 * 22):
            monkeypatch.setattr(reference, "AT_ONCE", at_once)
            assert torch.equal(levels(codes, (37, 23), grid, bits), whole)
        monkeypatch.undo()


def test_narrower() -> None:
    for grid, widths in WIDTHS.items():
        assert narrower(grid, widths[0]) == (0.0, 0.0)
        for lower, width in zip(widths, widths[1:], strict=False):
            found, ratio = narrower(grid, width)
            assert found == lower and 0.5 < ratio < 2
