"""The Triton rounding has the same codes as the torch one, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lplr.kernels.round_pack import gpu, reference


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n, d", [(1, 1), (7, 150), (5, 515), (0, 3)])
def test_round_and_pack(n: int, d: int, bits: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(bits)
    X, row, col = (torch.randn(*shape, generator=generator) for shape in ((n, d), (n,), (d,)))
    row, col = row.abs() * (1 << bits), col.abs()
    for seed in (None, 0, 1, (1 << 40) + 3):
        codes = gpu.round_and_pack(X.to(device), bits, row.to(device), col.to(device), seed)
        assert torch.equal(codes.cpu(), reference.round_and_pack(X, bits, row, col, seed))
