"""The operator lplr::matmul: registration, derivatives, the shapes it keeps, and which form serves which device."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lplr.errors import BackendError
from lplr.kernels import backend
from lplr.kernels.levels import BY_COLUMN, WIDTHS, narrower, nearest
from lplr.kernels.matmul import matmul, reference
from lplr.kernels.pack import pack

N, D, NARROW = 11, 29, 5


def operands(grid: str, bits: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, tuple, Tensor, Tensor]:
    """x (3, D), what tells the matrix, and its row and column scales."""
    generator = torch.Generator().manual_seed(0)

    def packed(d: int, width: float) -> Tensor:
        if grid in BY_COLUMN:
            return nearest(torch.randn(d, N, generator=generator), grid, width)[0]
        return pack(torch.randint(0, 1 << int(width), (N, d), generator=generator, dtype=torch.uint8), int(width))

    lower, _ = narrower(grid, bits)
    matrix = (packed(D - NARROW, bits), packed(NARROW, lower) if lower else None)
    x, row, col = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, D), (N,), (D,)))
    return x, matrix, row, col


@pytest.mark.parametrize("grid", list(WIDTHS))
def test_is_the_product_with_the_points(grid: str) -> None:
    for bits in WIDTHS[grid]:
        x, (codes, fewer), row, col = operands(grid, bits)
        C = reference.points(codes, (N, D), (grid, bits), fewer, NARROW, x.dtype)
        y = matmul(x, codes, N, (grid, bits), row, col, fewer, NARROW)
        # float64 sums of 29 terms in another order
        torch.testing.assert_close(y, ((x * col) @ C.T) * row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid, bits", [("uniform", 3.0), ("normal_float", 4.0), ("lattice", 2.0), ("trellis", 1.5)])
def test_derivatives(grid: str, bits: float) -> None:
    x, (codes, fewer), row, col = operands(grid, bits)
    for scales in ((row, col), (row[:1], col[:1]), (None, None)):
        leaves = [t.clone().requires_grad_() if t is not None else None for t in (x, *scales)]
        assert torch.autograd.gradcheck(lambda *t: matmul(t[0], codes, N, (grid, bits), t[1], t[2], fewer, NARROW), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_the_check_of_operators(dtype: torch.dtype) -> None:
    x, (codes, fewer), row, col = operands("uniform", 2.0, dtype)
    for lead in (x, x[0], x[:0]):
        args = (lead.clone().requires_grad_(), codes, N, "uniform", 2.0, row, col, fewer, NARROW)
        torch.library.opcheck(torch.ops.lplr.matmul.default, args)


def test_a_tensor_on_a_gpu_gets_the_gpu_form_or_an_error_that_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.delenv("LPLR_BACKEND", raising=False)
    for op, is_there in (("matmul", True), ("pack", False)):
        backend.on_gpu.cache_clear()
        if not is_there or importlib.util.find_spec("triton"):
            name = f"lplr.kernels.{op}.gpu" if is_there else reference.__name__
            assert backend.form(op, reference, on_a_gpu).__name__ == name  # type: ignore[arg-type]
    backend.on_gpu.cache_clear()
    monkeypatch.delitem(sys.modules, "lplr.kernels.matmul.gpu", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match=r"lplr\[gpu\]"):
        backend.form("matmul", reference, on_a_gpu)  # type: ignore[arg-type]
    monkeypatch.setenv("LPLR_BACKEND", "reference")
    backend.on_gpu.cache_clear()
    assert backend.form("matmul", reference, on_a_gpu) is reference  # type: ignore[arg-type]
    backend.on_gpu.cache_clear()
