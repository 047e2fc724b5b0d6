"""The Triton Walsh-Hadamard transform against the torch one in float64."""

from __future__ import annotations

import pytest
import torch

from lplr.kernels.hadamard import gpu, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1, 2, 8, 64, 1024, 4096, 16384, 32768])
def test_hadamard(p: int, dtype: torch.dtype, device: torch.device) -> None:
    for lead in ((3,), (0,), (2, 1)):
        x = torch.randn(*lead, p, generator=torch.Generator().manual_seed(p)).to(device, dtype)
        y = gpu.hadamard(x)
        want = reference.hadamard(x.cpu().double())
        assert y.dtype == dtype and y.shape == x.shape
        # an entry is a sum of p entries, added in a tree of log2(p) roundings to float32, then one to x's type; the torch form,
        # which takes what is longer than a program holds, rounds to x's type twice
        t = {torch.float32: 2.0**-20, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[dtype]
        assert ((y.cpu().double() - want).abs() <= t * x.cpu().double().norm(dim=-1, keepdim=True).clamp(min=1)).all()
