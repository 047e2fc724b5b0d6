"""LowRankLinear and the reference kernel against dense products in float64."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import random_factorization, random_qtensor

from lplr.errors import CheckpointError
from lplr.factor.factorization import Factorization, Format
from lplr.kernels.lowrank import lowrank_linear
from lplr.nn import LowRankLinear
from lplr.quant import quantize
from lplr.quant.ldlq import ldlq
from lplr.recipe import WIDTHS

KINDS = {"lr": (7, (2, 3, 0)), "lrq": (4, (1, 8, 5)), "q": (0, (0, 0, 3))}


def make(kind: str = "lr", n: int = 13, d: int = 29, seed: int = 0) -> Factorization:
    rank, bits = KINDS[kind]
    return random_factorization(n, d, rank, torch.Generator().manual_seed(seed), bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(29,), (1, 29), (2, 3, 29), (0, 29), (2, 0, 29), (2, 1, 3, 29)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_dense(kind: str, shape: tuple[int, ...], bias: bool, generator: torch.Generator) -> None:
    f = make(kind)
    b = torch.randn(13, generator=generator) if bias else None
    x = torch.randn(shape, generator=generator)
    y = LowRankLinear.from_factorization(f, b)(x)
    want = torch.nn.functional.linear(x.double(), f.dequantize(torch.float64), b.double() if b is not None else None)
    assert y.shape == (*shape[:-1], 13) and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)  # a few hundred float32 roundings


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 8), st.integers(1, 8), st.integers(0, 8)
)
def test_every_width_and_odd_shapes(n: int, d: int, rank: int, l_bits: int, r_bits: int, q_bits: int) -> None:
    generator = torch.Generator().manual_seed(n * 400 + d * 20 + rank)
    f = random_factorization(n, d, rank, generator, (l_bits, r_bits, q_bits))
    x = torch.randn(3, d, generator=generator, dtype=torch.float64)
    y = LowRankLinear.from_factorization(f)(x)
    torch.testing.assert_close(y, x @ f.dequantize(torch.float64).T, rtol=1e-12, atol=1e-12)


GRID_WIDTHS = [(grid, bits) for grid, widths in WIDTHS.items() for bits in widths]


@pytest.mark.parametrize(("grid", "bits"), GRID_WIDTHS)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 9), (9, 1), (13, 29), (33, 16)])
@pytest.mark.parametrize("rotations", [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_every_grid_in_every_basis(grid: str, bits: float, n: int, d: int, rotations: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(n * d)
    left, right, backbone = (torch.randn(*shape, generator=generator) for shape in ((n, 5), (5, d), (n, d)))
    narrow = d // 3
    l, r = quantize(left, bits, axis="row", grid=grid), quantize(right, bits, axis="both", grid=grid)
    q = ldlq(backbone, bits, torch.eye(d), grid=grid, axis="tensor", narrow=narrow)
    x = torch.randn(3, d, generator=generator, dtype=torch.float64)
    for parts in ((l, r, None), (l, r, q), (None, None, q)):
        f = Factorization(*parts, *rotations)
        module = LowRankLinear.from_factorization(f)
        torch.testing.assert_close(module(x), x @ f.dequantize(torch.float64).T, rtol=1e-12, atol=1e-12)
        again = LowRankLinear(Format.from_dict(f.format.to_dict()))
        again.load_state_dict(module.state_dict(), strict=True)
        assert torch.equal(again(x), module(x)) and repr(again) == repr(module)
        half = module(x.half())
        torch.testing.assert_close(half.double(), module(x), rtol=1e-2, atol=2e-2 * float(module(x).abs().max()) + 1e-3)


def test_scales_of_length_one_or_none(generator: torch.Generator) -> None:
    left = random_qtensor(6, 4, 2, generator, row=1, col=None)
    right = random_qtensor(4, 9, 2, generator, row=None, col=1)
    f = Factorization(left, right)
    x = torch.randn(5, 9, generator=generator)
    torch.testing.assert_close(LowRankLinear.from_factorization(f)(x), x @ f.dequantize().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    f = make("lrq", 33, 65)
    x = torch.randn(8, 65, generator=generator).to(dtype)
    y = LowRankLinear.from_factorization(f)(x)
    want = x.double() @ f.dequantize(torch.float64).T
    assert y.dtype == dtype
    bound = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-10}[dtype]  # a handful of roundings of 2^-9; one of 2^-11
    assert (y.double() - want).norm() <= bound * want.norm()


def test_float16_does_not_overflow_between_the_factors() -> None:
    levels = torch.full((4, 64), 255, dtype=torch.uint8)  # sums of 64 * 255 * 100 pass 65504
    small = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    f = Factorization(random_qtensor(3, 4, 1, torch.Generator().manual_seed(0), row=3, col=None), _with(levels, small))
    x = torch.full((1, 64), 100.0, dtype=torch.float16)
    assert LowRankLinear.from_factorization(f)(x).isfinite().all()


def _with(codes: torch.Tensor, scale: torch.Tensor):
    from lplr.quant.qtensor import QTensor

    return QTensor.from_codes(codes, 8, scale)


def test_strided_input(generator: torch.Generator) -> None:
    f = make()
    x = torch.randn(29, 3, 2, generator=generator).permute(2, 1, 0)
    torch.testing.assert_close(
        LowRankLinear.from_factorization(f)(x), LowRankLinear.from_factorization(f)(x.contiguous())
    )


def test_gradient_reaches_the_input(generator: torch.Generator) -> None:
    f = make("lrq")
    x = torch.randn(3, 29, generator=generator, dtype=torch.float64, requires_grad=True)
    module = LowRankLinear.from_factorization(f)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, f.dequantize(torch.float64).sum(0).expand(3, -1))


def test_nothing_to_multiply() -> None:
    with pytest.raises(ValueError, match="no codes"):
        lowrank_linear(torch.zeros(1, 3))
    with pytest.raises(CheckpointError, match="neither"):
        LowRankLinear(Format((3, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_the_layout(kind: str) -> None:
    f = make(kind)
    module = LowRankLinear.from_factorization(f, torch.ones(13))
    assert set(module.state_dict()) == {"bias", *f.format.layout()}
    assert "weight" not in module.state_dict()
    back = module.factorization
    assert back.format == f.format and all(
        torch.equal(a, b) for a, b in zip(back.tensors().values(), f.tensors().values(), strict=True)
    )
    other = LowRankLinear(f.format, bias=True)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other.weight, module.weight)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float16),
        lambda m: m.to(torch.float32),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: torch.nn.Sequential(m).to("cpu", torch.float16)[0],
    ],
)
def test_casts_change_no_stored_byte(cast) -> None:
    f = make("lrq")
    wide = f.tensors()["row_scale"].clone()
    wide[0] = 3e38  # float16 would make it infinite
    f.tensors()["row_scale"].copy_(wide)
    before = {k: v.clone() for k, v in f.tensors().items()}
    module = cast(LowRankLinear.from_factorization(f, torch.ones(13)))
    for name, tensor in module.stored().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert module.bias is not None and module.bias.dtype == module.dtype == module.weight.dtype
    assert not module.bias.requires_grad


def test_to_a_device_still_moves() -> None:
    module = LowRankLinear.from_factorization(make("lrq"), torch.ones(13)).to("meta", torch.float16)
    assert all(t.is_meta for t in (*module.stored().values(), module.weight))
    assert module.stored()["row_scale"].dtype == torch.bfloat16 and module.weight.shape == (13, 29)
    assert module(torch.empty(2, 29, device="meta")).shape == (2, 13)
    back = module.to_empty(device="cpu")
    assert not any(t.is_meta for t in back.stored().values())


def test_load_factorization_refuses_another_format() -> None:
    module = LowRankLinear(make().format, device="meta")
    with pytest.raises(CheckpointError, match="expected"):
        module.load_factorization(make("q"))


def test_pickle_and_repr() -> None:
    module = LowRankLinear.from_factorization(make("lrq"))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again.weight, module.weight)
    assert "rank=4" in repr(module) and "in_features=29" in repr(module)


def test_compiles_without_breaks(generator: torch.Generator) -> None:
    module = LowRankLinear.from_factorization(make("lrq"), torch.ones(13))
    x = torch.randn(4, 29, generator=generator)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
