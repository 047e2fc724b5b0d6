"""The Triton sketch has the same signs as the torch one."""

from __future__ import annotations

import pytest
import torch

from lplr.kernels.sketch import gpu, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, d, m", [(1, 1, 1), (70, 45, 33), (5, 130, 100), (0, 4, 3)])
def test_sign_sketch(n: int, d: int, m: int, dtype: torch.dtype, device: torch.device) -> None:
    A = torch.randn(n, d, generator=torch.Generator().manual_seed(d)).to(device, dtype)
    for seed in (0, 1, 7, (1 << 62) + 12345):
        y = gpu.sign_sketch(A, m, seed)
        want = reference.sign_sketch(A.cpu().double(), m, seed)
        assert y.dtype == dtype and y.shape == (n, m)
        # float32 sums of entries taken as bfloat16 numbers, 24 bits in all (16 of float16's 11), then one rounding to A's type,
        # which the interpreter makes by cutting off: a unit in the last place
        t = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        size = A.cpu().double().abs().sum(1, keepdim=True) * m**-0.5
        assert ((y.cpu().double() - want).abs() <= t * size).all()
