"""A whole layer on the GPU: rotations, factors and backbone against its dense weight in float64; compiled; in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lplr.factor.factorization import Factorization
from lplr.kernels.levels import WIDTHS
from lplr.nn import LowRankLinear
from lplr.quant import quantize
from lplr.quant.ldlq import ldlq

N, D = 48, 72
SEEDS = {"rotation": 3, "output_rotation": 5}


def layer(kind: str) -> LowRankLinear:
    """Factors of one bit, or a backbone of a grid at its second width, in rotated bases."""
    g = torch.Generator().manual_seed(1)
    if kind == "factors":
        L, R = (quantize(torch.randn(*shape, generator=g), 1) for shape in ((N, 24), (24, D)))
        return LowRankLinear.from_factorization(Factorization(L, R, None, **SEEDS), torch.randn(N, generator=g))
    q = ldlq(torch.randn(N, D, generator=g), WIDTHS[kind][1], torch.eye(D), grid=kind, axis="tensor")
    return LowRankLinear.from_factorization(Factorization(q=q, **SEEDS), torch.randn(N, generator=g))


def expected(module: LowRankLinear, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.cpu().double(), module.factorization.dequantize(torch.float64), module.bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("kind", ["factors", *WIDTHS])
def test_is_the_dense_layer(kind: str, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    module = layer(kind)
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    want = expected(module, x)
    with torch.no_grad():
        y = module.to(device)(x)
    assert y.dtype == dtype and y.device == x.device
    # bfloat16: up to six roundings of 2^-9 on the way; float32: sums, and NormalFloat points as two bfloat16 numbers
    error = (y.cpu().double() - want).norm() / want.norm()
    assert error < (2.0**-6 if dtype == torch.bfloat16 else 2.0**-13 if kind == "normal_float" else 2.0**-17)


def test_the_signs_of_rotations_follow_the_codes(device: torch.device) -> None:
    module = layer("trellis").to(device)
    assert {t.device.type for t in module._rotations.values() if t is not None} == {device.type}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's compiler itself, when it is imported
@pytest.mark.parametrize("kind", ["factors", *WIDTHS])
def test_compiled_and_in_a_graph(kind: str) -> None:
    module = layer(kind).to("cuda", torch.bfloat16)
    with torch.no_grad():
        for tokens in (1, 64):
            x = torch.randn(tokens, D, device="cuda", dtype=torch.bfloat16)
            y = module(x)
            torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), y, rtol=2.0**-6, atol=2.0**-6)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = module(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(captured, module(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_are_those_of_the_cpu() -> None:
    module = layer("trellis")
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(7))
    there = x.cuda().requires_grad_()
    here = x.clone().requires_grad_()
    module(here).square().sum().backward()
    module.to("cuda")(there).square().sum().backward()
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-3, atol=1e-3)  # outputs of about ten, float32 sums
