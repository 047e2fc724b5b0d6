"""The packed value and its format: sums by hand, stored bits against bytes, damaged input."""

from __future__ import annotations

from dataclasses import replace

import pico
import pytest
import torch

from lplr.errors import CheckpointError
from lplr.factor import Factorization, Format, factorize
from lplr.kernels.hadamard import rotate, rotation_signs
from lplr.quant import QTensor, quantize
from lplr.recipe import WIDTHS, FactorSpec, QuantSpec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_spec(grid: str, bits: float) -> QuantSpec:
    return QuantSpec(grid=grid, bits=bits, ranges="tensor")  # type: ignore[arg-type]


def several() -> list[Factorization]:
    W = torch.randn(13, 10, generator=seeded(1))
    q = QuantSpec(bits=3, ranges="row")
    specs = [
        FactorSpec(method="lplr", rank=3),
        FactorSpec(method="lplr", rank=1, l=QuantSpec(bits=5, ranges="both"), r=QuantSpec(bits=1, ranges="both")),
        FactorSpec(method="lplr_svd", rank=10, l=QuantSpec(bits=8, ranges="tensor"), r=QuantSpec(bits=7, ranges="tensor")),
        FactorSpec(method="direct_svd", rank=4, l=QuantSpec(ranges="row"), r=QuantSpec(ranges="row")),
        FactorSpec(method="naive", q=q),
        FactorSpec(method="naive", q=QuantSpec(bits=2, ranges="tensor")),
        FactorSpec(method="ldlq", q=q, q_narrow=4),
        FactorSpec(method="ldlq", q=QuantSpec(bits=1, ranges="row"), q_narrow=3),
        FactorSpec(method="caldera", rank=2, q=q, rotation=9),
        *(FactorSpec(method="ldlq", q=grid_spec(g, b), q_narrow=4) for g, widths in WIDTHS.items() for b in widths),
        FactorSpec(method="caldera", rank=5, l=grid_spec("trellis", 1.5), r=grid_spec("lattice", 2), q=grid_spec("trellis", 1)),
        FactorSpec(method="lplr", rank=9, l=grid_spec("lattice", 3), r=grid_spec("trellis", 0.5), output_rotation=7),
        FactorSpec(method="double_binary", rank=3),
        FactorSpec(method="lplr_feedback", rank=3),
    ]
    return [factorize(W, spec, generator=seeded(2)) for spec in specs]


@pytest.mark.parametrize("f", several())
def test_stored_bits_are_the_bytes_of_the_tensors(f: Factorization) -> None:
    tensors = f.tensors()
    assert f.stored_bits() == 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    assert f.stored_bits() == sum(part.stored_bits() for part in (f.l, f.r, f.q) if part is not None)
    layout = f.format.layout()
    assert list(layout) == list(tensors)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout
    assert f.format.bits_per_weight == f.stored_bits() / 130


@pytest.mark.parametrize("f", several())
def test_round_trip_through_tensors_and_json(f: Factorization) -> None:
    fmt = Format.from_dict(f.format.to_dict())
    assert fmt == f.format
    again = Factorization.from_tensors(fmt, f.tensors())
    assert again.format == fmt and again.rank == f.rank and again.shape == (13, 10)
    assert torch.equal(again.dequantize(), f.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), f.tensors().values(), strict=True))


@pytest.mark.parametrize("f", several())
def test_damaged_tensors_are_refused(f: Factorization) -> None:
    tensors = f.tensors()
    for name, tensor in tensors.items():
        for damage in (None, tensor[:-1] if len(tensor) > 1 else torch.cat([tensor, tensor]), tensor.to(torch.float32)):
            broken = {k: v for k, v in tensors.items() if k != name} | ({} if damage is None else {name: damage})
            with pytest.raises(CheckpointError, match=f"{name} is .*compress the model again"):
                Factorization.from_tensors(f.format, broken)


def test_dequantize_by_hand() -> None:
    g = seeded(3)
    l, r, q = (quantize(torch.randn(*s, generator=g), 3, axis="row") for s in ((6, 2), (2, 5), (6, 5)))  # noqa: E741
    product = l.dequantize(torch.float64) @ r.dequantize(torch.float64)
    torch.testing.assert_close(Factorization(l, r).dequantize(torch.float64), product)
    both = product + q.dequantize(torch.float64)
    torch.testing.assert_close(Factorization(l, r, q).dequantize(torch.float64), both)
    O = rotate(torch.eye(5, dtype=torch.float64), rotation_signs(4, 5))  # noqa: E741
    turned = Factorization(l, r, q, 4)
    torch.testing.assert_close(turned.dequantize(torch.float64), both @ O.T)
    torch.testing.assert_close(turned.rotated(both @ O.T), both)
    P = rotate(torch.eye(6, dtype=torch.float64), rotation_signs(3, 6))
    turned = Factorization(l, r, q, 4, 3)
    torch.testing.assert_close(turned.dequantize(torch.float64), P @ both @ O.T)
    torch.testing.assert_close(turned.rotated(P @ both @ O.T), both)


def test_parts_that_do_not_fit_together() -> None:
    q = quantize(torch.ones(3, 3), 2)
    with pytest.raises(ValueError, match="L and R, or Q"):
        Factorization()
    with pytest.raises(ValueError, match="L and R, or Q"):
        Factorization(l=q)
    with pytest.raises(ValueError, match="column scale"):
        Factorization(replace(q, row_scale=None, col_scale=torch.ones(3, dtype=torch.bfloat16)), q)
    assert QTensor.from_codes(torch.zeros(3, 3, dtype=torch.uint8), 1).shape == (3, 3)


GOOD = several()[8].format.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [0, 3]},
        {"shape": [3]},
        {"shape": None},
        {"rank": -1},
        {"rank": 1 << 30},
        {"rank": "many"},
        {"l_bits": 9},
        {"l_bits": 0},
        {"q_bits": -1},
        {"q_narrow": 10},
        {"rotation": -1},
        {"q_bits": 1.5},
        {"q_bits": float("nan")},
        {"scales": {"row_scale": 4}},
        {"scales": {"invented": 13}},
        {"scales": [1]},
    ],
)
def test_damaged_formats_are_refused(change: dict[str, object]) -> None:
    assert Format.from_dict(GOOD)
    with pytest.raises(CheckpointError, match="compress the model again"):
        Format.from_dict({**GOOD, **change})
    with pytest.raises(CheckpointError, match="damaged"):
        Format.from_dict({k: v for k, v in GOOD.items() if k not in change})


NEW = {"q_grid": "hexagonal", "l_grid": None, "r_grid": 3, "output_rotation": -1}


@pytest.mark.parametrize("key", NEW)
def test_keys_that_older_folders_lack(key: str) -> None:
    with pytest.raises(CheckpointError, match="compress the model again"):
        Format.from_dict({**GOOD, key: NEW[key]})
    older = {k: v for k, v in GOOD.items() if k not in NEW}
    assert Format.from_dict(older) == replace(Format.from_dict(GOOD), output_rotation=0)


@pytest.mark.parametrize(
    "change",
    [{"q_grid": "lattice", "q_bits": 1}, {"q_grid": "trellis", "q_bits": 8}, {"l_grid": "normal_float", "l_bits": 1}],
)
def test_a_grid_without_the_width_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="out of range"):
        Format.from_dict({**GOOD, **change})


def test_width_of_the_backbone() -> None:
    assert Format((8, 10), q_bits=2.5, q_narrow=4, q_grid="trellis").backbone_width == pytest.approx(2.3)
    assert Format((8, 10), q_bits=2, q_narrow=5, q_grid="lattice").backbone_width == 1
    assert Format((8, 10), 3, 2, 2).backbone_width == 0
    assert Format((8, 10), 3, 2, 2, 1.5, q_grid="trellis").grids() == ("uniform", "trellis")


@pytest.mark.parametrize("rotations", [(0, 0), (3, 0), (0, 4), (3, 4)])
@pytest.mark.parametrize("rank, bits", [(5, (2, 3, 0)), (0, (0, 0, 3)), (3, (1, 4, 2))])
def test_plain_parts_add_up_without_rotations(rank: int, bits: tuple[int, int, int], rotations: tuple[int, int]):
    f = pico.random_factorization(12, 20, rank, torch.Generator().manual_seed(0), bits)
    f = replace(f, rotation=rotations[0], output_rotation=rotations[1])
    q, l, r = f.plain_parts(torch.float64)
    assert (q is None) == (bits[2] == 0) and (l is None) == (r is None) == (rank == 0)
    total = torch.zeros(12, 20, dtype=torch.float64) if q is None else q
    if l is not None and r is not None:
        assert l.shape == (12, rank) and r.shape == (rank, 20)
        total = total + l @ r
    # float64 sums in another order
    torch.testing.assert_close(total, f.dequantize(torch.float64), rtol=1e-12, atol=1e-12)
