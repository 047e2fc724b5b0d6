"""The lattice codebook against brute force over all of its points, in both forms of the encoder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr.kernels import lattice
from lplr.kernels.backend import compiled
from lplr.kernels.lattice import WIDTHS, decode, packed_width, reference
from lplr.kernels.lattice.reference import STAGES, one_bit, patterns

Encoder = Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
FORMS: dict[str, Encoder] = {"reference": reference.encode}
if importlib.util.find_spec("numba"):
    from lplr.kernels.lattice import cpu

    FORMS["cpu"] = cpu.encode
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}  # some 50 roundings of numbers of the size of |x|^2


@lru_cache(maxsize=8)
def all_points(name: str) -> torch.Tensor:
    """The 2^16 points (65536, 8) of a 2-bit stage by their words, written out from the definition with Python integers."""
    shift, values = STAGES[name]
    out = []
    for word in range(1 << 16):
        levels = patterns()[word & 255]
        row = [values[reference.KINDS.index((levels.count(0), levels.count(1), levels.count(2)))][level] for level in levels]
        negative = [word >> (8 + i) & 1 for i in range(7)]
        negative.append((sum(negative) + sum(2 * level + 1 for level in levels) // 2) % 2)
        out.append([(-v if s else v) + (-shift if word >> 15 else shift) for v, s in zip(row, negative, strict=True)])
    return torch.tensor(out, dtype=torch.float64) / 64


def hard(dtype: torch.dtype, count: int = 10) -> torch.Tensor:
    """Vectors (v, 8): normal ones of several sizes, on the axes, zero, on the border of two shifts, far away."""
    g = torch.Generator().manual_seed(3)
    normal = [torch.randn(count, 8, generator=g, dtype=torch.float64) * s for s in (0.05, 0.5, 1.0, 2.0, 10.0, 1e4)]
    corners = torch.stack([torch.zeros(8), torch.ones(8), -torch.ones(8), *(4 * torch.eye(8)), *(-2.5 * torch.eye(8))]).double()
    return torch.cat([*normal, corners, torch.randn(4, 8, generator=g, dtype=torch.float64).sign() / 4]).to(dtype)


def least(x: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared distance of the nearest point, and its index, in float64, by comparing all."""
    found = [(v.double() - points).square().sum(1).min(0) for v in x]
    return torch.stack([f.values for f in found]), torch.stack([f.indices for f in found])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_bits_are_the_nearest_of_all_points(form: str, dtype: torch.dtype) -> None:
    x = hard(dtype)
    codes, values = FORMS[form](x, 2.0)
    best, _ = least(x, all_points("2"))
    found = (x.double() - values.double()).square().sum(1)
    assert bool((found <= best + ROUNDING[dtype] * (1 + x.double().square().sum(1))).all())
    word = codes[:, 0].long() + 256 * codes[:, 1].long()
    assert torch.equal(all_points("2")[word], values.double())
    assert values.dtype == dtype and codes.dtype == torch.uint8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [3.0, 4.0])
def test_second_stage_is_the_best_for_either_shift_of_the_first(form: str, bits: float) -> None:
    x = hard(torch.float64, count=6)
    points = all_points(f"{bits:g}")
    candidates = []
    for half in points.split(1 << 15):
        rest = x - half[least(x, half)[1]]
        candidates.append(least(rest, one_bit() if bits == 3 else all_points("4 second"))[0])
    best = torch.minimum(*candidates)
    found = (x - FORMS[form](x, bits)[1]).square().sum(1)
    assert bool(((found - best).abs() <= 1e-13 * (1 + x.square().sum(1))).all())


def test_the_points_are_those_of_a_lattice() -> None:
    """With half-integers for the levels and 1/4 for the shift all 2^16 points differ and are in E8 + 1/4."""
    halves = torch.tensor(patterns()) + 0.5
    assert len(set(patterns())) == 256
    norms = halves.square().sum(1)
    assert int((norms <= 10).sum()) == 227 and int((norms == 12).sum()) == 29
    signs = 1 - 2 * (torch.arange(256)[:, None] >> torch.arange(8) & 1)
    signed = (halves[:, None] * signs)[(halves.sum(1) % 2)[:, None] == (signs < 0).sum(1) % 2]
    assert signed.shape == (1 << 15, 8) and not bool((signed.sum(1) % 2).any())  # D8 + 1/2
    # E8 + 1/4 holds v + 1/4 and v - 1/4 = (v - 1/2) + 1/4, v - 1/2 an integer vector: its sum is even, as 8 / 2 is
    assert not bool(((signed - 0.5).sum(1) % 2).any())
    for name in STAGES:
        assert len(torch.unique(all_points(name), dim=0)) == 1 << 16
    roots = one_bit()
    assert roots.shape == (256, 8) and len(torch.unique(roots, dim=0)) == 256


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_word_decodes_to_its_point(bits: float) -> None:
    g = torch.Generator().manual_seed(1)
    words = torch.arange(1 << 16)
    codes = torch.stack([words & 255, words >> 8], 1).to(torch.uint8)
    expected = all_points(f"{bits:g}")
    if bits > 2:
        more = torch.randint(0, 256, (1 << 16, int(bits) - 2), generator=g)
        second = one_bit()[more[:, 0]] if bits == 3 else all_points("4 second")[more[:, 0] + 256 * more[:, 1]]
        codes, expected = torch.cat([codes, more.to(torch.uint8)], 1), expected + second
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(decode(codes, bits, 8, dtype).double(), expected)  # exact in every float type
    # vectors stand one after another in a sequence, and a short last one is cut
    row = decode(codes[:6].reshape(2, -1), bits, 21)
    assert torch.equal(row.double(), expected[:6].reshape(2, 24)[:, :21])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 7), (2, 9), (5, 40), (1, 577), (0, 5), (3, 0)])
def test_values_are_what_codes_decode_to(form: str, bits: float, shape: tuple[int, int], generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(shape, generator=generator, dtype=dtype)
        before = x.clone()
        codes, values = FORMS[form](x, bits)
        assert codes.shape == (shape[0], packed_width(shape[1], bits)) and values.shape == shape and values.dtype == dtype
        assert torch.equal(decode(codes, bits, shape[1], dtype), values)
        assert torch.equal(x, before)
        strided_codes, strided = FORMS[form](x.T.contiguous().T, bits)
        assert torch.equal(strided, values) and torch.equal(strided_codes, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_padding_is_with_zeros(bits: float, generator: torch.Generator) -> None:
    x = torch.randn(4, 13, generator=generator)
    padded = torch.nn.functional.pad(x, (0, 3))
    codes, values = lattice.encode(x, bits)
    assert torch.equal(codes, lattice.encode(padded, bits)[0])
    assert torch.equal(values, lattice.encode(padded, bits)[1][:, :13])


@pytest.mark.skipif("cpu" not in FORMS, reason="needs numba")
@pytest.mark.parametrize("bits", WIDTHS)
def test_forms_agree(bits: float, generator: torch.Generator) -> None:
    """In float64: a tie within its rounding has no chance among 4,000 vectors."""
    x = torch.randn(50, 640, generator=generator, dtype=torch.float64)
    (codes, values), (other_codes, other) = FORMS["reference"](x, bits), FORMS["cpu"](x, bits)
    assert torch.equal(codes, other_codes) and torch.equal(values, other)


@pytest.mark.parametrize(("bits", "bound"), [(2.0, 0.0889), (3.0, 0.0273), (4.0, 0.00753)])
def test_error_of_a_normal_source(bits: float, bound: float) -> None:
    """2^20 samples in float32: the standard error of the mean is below 0.2 %; measured 0.0886, 0.0271 and 0.00747."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(7))

    def error(scale: float) -> float:
        return float((x - lattice.encode(x / scale, bits)[1] * scale).square().mean())

    x = x if "cpu" in FORMS else x[:256]
    assert error(1.0) <= bound  # the issue asks for 0.0895 at 2 bits
    x = x[:128]
    assert error(1.0) <= min(error(0.95), error(1.05))  # no further scale helps


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(FORMS)), st.sampled_from(WIDTHS), st.integers(1, 30), st.integers(0, 10**6), st.floats(-6, 6))
def test_symmetry_fixed_points_and_bound(form: str, bits: float, n: int, seed: int, decade: float) -> None:
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0**decade
    codes, values = FORMS[form](x, bits)
    assert torch.equal(FORMS[form](-x, bits)[1], -values)  # the grid is symmetric about zero
    assert float(values.abs().max()) <= 256 / 64
    if bits == 2:
        assert n % 8 or torch.equal(FORMS[form](values, bits)[0], codes)  # a point is its own nearest
        g = torch.Generator().manual_seed(seed + 1)
        other = decode(torch.randint(0, 256, codes.shape, generator=g).to(torch.uint8), 2, -(-n // 8) * 8, torch.float64)
        padded = torch.nn.functional.pad(x, (0, -n % 8))
        whole = decode(codes, 2, padded.shape[1], torch.float64)
        assert float((padded - whole).square().sum()) <= float((padded - other).square().sum()) * (1 + 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_a_number_gives_some_point(form: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45, 0.0, -0.0]])
    for bits in WIDTHS:
        codes, values = FORMS[form](x, bits)
        assert bool(torch.isfinite(values).all()) and torch.equal(decode(codes, bits, 8), values)


def test_wrong_arguments() -> None:
    assert [packed_width(n, b) for n, b in ((0, 2.0), (1, 2.0), (8, 3.0), (9, 4.0), (576, 2.0))] == [0, 2, 3, 8, 144]
    for bits in (1.0, 2.5, 5.0):
        with pytest.raises(ValueError, match="2, 3, 4"):
            lattice.encode(torch.zeros(1, 8), bits)
    with pytest.raises(ValueError, match="rows of 4 bytes"):
        decode(torch.zeros(1, 3, dtype=torch.uint8), 2.0, 9)
    with pytest.raises(ValueError, match="float32"):
        decode(torch.zeros(1, 2), 2.0, 8)


@pytest.mark.parametrize("why", ["asked for", "no numba"])
def test_the_reference_serves_without_numba(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "asked for":
        monkeypatch.setenv("LPLR_BACKEND", "reference")
    else:
        monkeypatch.setitem(sys.modules, "lplr.kernels.lattice.cpu", None)  # what an import of it raises is ImportError
        monkeypatch.delattr(lattice, "cpu", raising=False)
    compiled.cache_clear()
    try:
        x = torch.linspace(-2, 2, 24).reshape(2, 12)
        assert compiled("lattice") is None
        assert torch.equal(lattice.encode(x, 2.0)[1], reference.encode(x, 2.0)[1])
    finally:
        compiled.cache_clear()
