"""The GPU kernels compiled for real targets: nothing spills, codes are read 16 bytes at a time, shared memory fits.

`eval/kernels/ahead_of_time.py` does the same for every configuration and writes it down; here every grid and width is compiled at
one token for both targets, and at many for the newer one; the script goes through all of them.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from eval.kernels.ahead_of_time import CARDS, GRIDS, compiled, encoder, load_bytes, matmul, points, row, transform
from lplr.kernels import trellis
from lplr.kernels.levels import WIDTHS
from lplr.kernels.round_pack import gpu as round_pack
from lplr.kernels.sketch import gpu as sketch

SHARED = 99 << 10  # bytes a block can have on an RTX 4090, the least of the cards
TARGETS = (80, 90)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grid, bits", GRIDS)
def test_one_token(grid: str, bits: float, target: int) -> None:
    plan, machine = matmul(grid, bits, 1, torch.bfloat16, target)
    assert machine.spills == machine.stack == 0 and machine.shared <= SHARED
    # a step of two entries: 64 steps are all that the registers hold sums of, 8 bytes a load
    assert load_bytes(plan, bits, machine) == (8 if grid == "trellis" and bits % 1 else 16)
    # loads of one word are those of x and its scales, of tables and of the word before a group; of the codes they would be four
    assert grid == "normal_float" or machine.loads.get("LDG.E", 0) < max(4, plan.rows * plan.inputs * bits / 32 / 128)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grid, bits", [(grid, bits) for grid, widths in WIDTHS.items() for bits in (widths[0], widths[-1])])
def test_many_tokens(grid: str, bits: float, dtype: torch.dtype) -> None:
    for tokens in (16, 512):
        _, machine = matmul(grid, bits, tokens, dtype, TARGETS[-1])
        assert machine.spills == machine.stack == 0 and machine.shared <= SHARED
        assert any("128" in name for name in machine.loads)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grid, bits", [(grid, bits) for grid, widths in WIDTHS.items() for bits in (widths[0], widths[-1])])
def test_points(grid: str, bits: float, target: int, dtype: torch.dtype) -> None:
    plan, machine = points(grid, bits, dtype, target)
    assert machine.spills == machine.stack == 0 and machine.shared <= SHARED
    assert load_bytes(plan, bits, machine) == (8 if grid == "trellis" and bits % 1 else 16)


@pytest.mark.parametrize("target", TARGETS)
def test_transform(target: int) -> None:
    for p in (2, 64, 1024, 16384):
        line = transform(p, target)
        assert line["spills"] == line["stack"] == 0 and line["shared"] <= SHARED


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_sketch_and_rounding(target: int) -> None:
    sizes = {"seed": "i64", "n": "i32", "d": "i32", "m": "i32", "scale": "fp32"}
    for name, pieces in (("bf16", 1), ("fp16", 2), ("fp32", 3)):
        types = sizes | {"A": f"*{name}", "out": f"*{name}"}
        machine = compiled(sketch.sketch_tile, types, sketch.CONSTANTS | {"PIECES": pieces}, {"A", "out", "d"}, target)
        assert machine.spills == machine.stack == 0 and machine.shared <= SHARED
    types = {"X": "*fp32", "row": "*fp32", "col": "*fp32", "out": "*u8", "seed": "i64", "n": "i32", "d": "i32", "width": "i32"}
    for bits in (1, 3, 8):
        for stochastic in (False, True):
            constants = round_pack.CONSTANTS | {"BITS": bits, "STOCHASTIC": stochastic}
            machine = compiled(round_pack.round_tile, types, constants, {"X", "row", "col", "out", "d"}, target)
            assert machine.spills == machine.stack == 0 and any("128" in name for name in machine.loads)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", trellis.WIDTHS)
def test_trellis_encoder(bits: float, target: int) -> None:
    """All costs of a sequence stay in registers, with room for two sequences a processor."""
    machine = encoder(bits, target)
    assert machine.spills == machine.stack == 0 and machine.shared <= SHARED and machine.registers <= 128


def test_what_a_line_of_the_report_says() -> None:
    line = row("uniform", 2.0, 1, torch.bfloat16, 90)
    assert line["load_bytes"] == 16 and 0 < line["occupancy"] <= 1 and line["instructions_per_weight"] < 6
    assert line["bound_by"] in ("bytes", "issue", "lookups") and 0 < line["share_of_bandwidth"] <= 1 and "H100" in CARDS
