"""The compiled form of a compressed layer, and the op around it, against the reference in float64."""

from __future__ import annotations

import copy
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lplr.kernels import lowrank
from lplr.kernels.backend import compiled
from lplr.kernels.hadamard import rotation_signs
from lplr.kernels.levels import WIDTHS, narrower, packed_shape
from lplr.kernels.lowrank import op, reference
from lplr.kernels.pack import pack

pytest.importorskip("numba")
from lplr.kernels.lowrank import cpu, rows, sharing, vectors  # noqa: E402

GRIDS = [(grid, bits) for grid, widths in WIDTHS.items() for bits in widths]
SCALES = ("row_scale", "rank_scale", "col_scale", "q_row_scale", "q_col_scale")
# Of the norm.  By tables an activation is within 1/2046 of the largest of its 32, and a level's error adds to others' as often
# as not: some 1e-3 for one pass, that / 1023 and float32 roundings of sums for two.  bfloat16 rounds the result itself by 2^-9.
BOUND = {torch.float32: 4e-6, torch.float16: 2.0**-11 + 4e-6, torch.bfloat16: 2.0**-9 + 2e-3}


def packed(shape: tuple[int, int], grid: tuple[str, float], g: torch.Generator) -> torch.Tensor:
    if grid[0] in ("lattice", "trellis"):
        return torch.randint(0, 256, packed_shape(shape, *grid), dtype=torch.uint8, generator=g)
    return pack(torch.randint(0, 1 << int(grid[1]), shape, dtype=torch.uint8, generator=g), int(grid[1]))


def layer(
    n: int, d: int, grid: tuple[str, float], *, rank: int = 0, backbone: bool = True, narrow: int = 0, rotated: bool = False,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of a layer with random codes and scales."""
    g = torch.Generator().manual_seed(seed)
    out: dict[str, Any] = {"n": n}
    if rank:
        out |= {"rank": rank, "l_grid": grid, "r_grid": grid, "l_codes": packed((n, rank), grid, g)}
        out |= {"r_codes": packed((rank, d), grid, g), "row_scale": torch.rand(n, generator=g)}
        out |= {"rank_scale": torch.rand(rank, generator=g), "col_scale": torch.rand(d, generator=g)}
    if backbone:
        out |= {"q_grid": grid, "q_narrow": narrow, "q_codes": packed((n, d - narrow), grid, g)}
        out |= {"q_row_scale": torch.rand(n, generator=g), "q_col_scale": torch.rand(d, generator=g)}
        lower = narrower(*grid)[0]
        if narrow and lower:
            out["q_narrow_codes"] = packed((n, narrow), (grid[0], lower), g)
    if rotated:
        out |= {"signs": rotation_signs(1, d), "out_signs": rotation_signs(2, n)}
    return out


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Threads, and two of them for any amount of work."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(sharing, "WORTH", 1)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 33), (37, 5), (133, 97)])
def test_every_grid_on_odd_shapes(grid: tuple[str, float], n: int, d: int) -> None:
    for arguments in (
        layer(n, d, grid),
        layer(n, d, grid, rank=7, backbone=False, rotated=True),
        layer(n, d, grid, rank=3, narrow=d // 3, rotated=True),
    ):
        for tokens in (1, 3, 21):
            x = inputs(tokens, d) * (1e-3 if grid[1] > 6 else 1)  # wide levels twice would pass the largest float16
            for dtype, bound in BOUND.items():
                y = cpu.lowrank_linear(x.to(dtype), **arguments)
                want = reference.lowrank_linear(x.to(dtype).double(), **arguments)
                assert y.dtype == dtype and y.shape == (tokens, n)
                # two products, and sums that cancel: single numbers may be further off than the norm of many
                assert distance(y, want) <= (2 if n * tokens > 30 else 20) * bound


SOME = [("uniform", 1.0), ("uniform", 3.0), ("normal_float", 3.0), ("trellis", 2.0), ("lattice", 3.0)]


@pytest.mark.parametrize("grid", SOME, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_threads_change_nothing(grid: tuple[str, float], tokens: int, threads: int) -> None:
    arguments = layer(300, 130, grid, rank=70, rotated=True)
    x = inputs(tokens, 130)
    want = reference.lowrank_linear(x.double(), **arguments)
    assert distance(cpu.lowrank_linear(x, **arguments), want) <= 2 * BOUND[torch.float32]
    torch.set_num_threads(1)
    alone = cpu.lowrank_linear(x, **arguments)
    torch.set_num_threads(threads)
    # by tiles the dense product is torch's, which may share a sum between threads
    torch.testing.assert_close(cpu.lowrank_linear(x, **arguments), alone, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("tokens", [1, 8, cpu.FEW, cpu.FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_prompt_is_one_call(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, x = layer(140, 97, ("uniform", 1.0), rank=70, rotated=True), inputs(tokens, 97).to(dtype)
    calls: list[int] = []
    monkeypatch.setattr(cpu, "layer", lambda *given, one=cpu.layer: calls.append(given[2]) or one(*given))
    y = cpu.lowrank_linear(x, **arguments)
    assert distance(y, reference.lowrank_linear(x.double(), **arguments)) <= 2 * BOUND[dtype]
    assert calls == ([tokens] if tokens <= cpu.FEW else [])
    x[tokens - 1, 3] = float("inf")
    assert torch.equal(cpu.lowrank_linear(x, **arguments).isnan(), reference.lowrank_linear(x, **arguments).isnan())


@pytest.mark.parametrize("narrow", [0, 11])
def test_a_record_points_at_what_its_plan_keeps(narrow: int) -> None:
    arguments = layer(40, 50, ("uniform", 2.0), narrow=narrow, rotated=True)
    cpu.lowrank_linear(inputs(1, 50), **arguments)
    plan = cpu._PLANS[id(arguments["q_codes"])][1]
    d, n, signs, out_signs = plan.record[:4].tolist()
    assert (d, n, signs, out_signs) == (50, 40, plan.signs.ctypes.data, plan.out_signs.ctypes.data)
    for place, part in zip(plan.record[4:].reshape(4, -1), plan.parts, strict=True):
        if part is None:
            assert not place.any()
        else:
            fields, codes, words, row, col = part.matrix
            assert place[:8].tolist() == fields.tolist()
            assert place[[8, 11, 13, 15]].tolist() == [a.ctypes.data for a in (codes, words, row, col)]
            assert place[[9, 10, 12, 14, 16]].tolist() == [*codes.shape, len(words), len(row), len(col)]


@pytest.mark.parametrize("shape", [(97,), (0, 97), (2, 0, 97), (2, 3, 97)])
@pytest.mark.parametrize("dtype", BOUND)
def test_leading_sizes_and_strides(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = layer(37, 97, ("uniform", 2.0))
    x = inputs(*shape).to(dtype)
    y = cpu.lowrank_linear(x, **arguments)
    assert y.shape == (*shape[:-1], 37) and y.dtype == dtype
    strided = x.new_zeros(*shape[:-1], 194)[..., ::2].copy_(x)
    assert torch.equal(cpu.lowrank_linear(strided, **arguments), y)


@pytest.mark.parametrize("grid", [("uniform", 1.0), ("uniform", 2.0), ("trellis", 1.0), ("lattice", 2.0)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(grid: tuple[str, float], bad: float) -> None:
    arguments = layer(40, 50, grid)
    x = inputs(3, 50)
    x[1, 7] = bad
    y, want = cpu.lowrank_linear(x, **arguments), reference.lowrank_linear(x, **arguments)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    torch.testing.assert_close(y[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_huge_and_tiny(size: float) -> None:
    for grid in (("uniform", 2.0), ("trellis", 2.0)):
        arguments = layer(40, 50, grid, rotated=True)
        x = inputs(3, 50) * size
        x[0, 0] *= 1e3  # an outlier spoils only its own 32
        assert distance(cpu.lowrank_linear(x, **arguments), reference.lowrank_linear(x.double(), **arguments)) < 1e-5


def test_zero_gives_zero() -> None:
    assert not cpu.lowrank_linear(torch.zeros(2, 50), **layer(40, 50, ("uniform", 2.0))).any()


def test_a_written_tensor_is_noticed() -> None:
    arguments = layer(40, 50, ("uniform", 1.0))
    sizes = {"n": 40, "rank": 0, "l_grid": ("uniform", 0), "r_grid": ("uniform", 0), "q_grid": ("uniform", 1.0), "q_narrow": 0}
    made = lowrank.Layer(sizes, {name: v for name, v in arguments.items() if isinstance(v, torch.Tensor)})
    x = inputs(1, 50)
    with torch.no_grad():
        before = made(x)
        arguments["q_codes"].bitwise_not_()
        torch.testing.assert_close(made(x), -before, rtol=1e-5, atol=1e-4)
        arguments["q_row_scale"].mul_(2)
        torch.testing.assert_close(made(x), -2 * before, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(cpu.lowrank_linear(x, **arguments), -2 * before, rtol=1e-5, atol=1e-4)


def test_fake_tensors_pass() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments, x = layer(40, 50, ("uniform", 1.0)), inputs(2, 3, 50)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = lowrank.lowrank_linear(mode.from_tensor(x), **arguments)
    assert y.shape == (2, 3, 40)


def test_what_is_made_of_a_tensor_goes_with_it() -> None:
    arguments = layer(40, 50, ("uniform", 1.0))
    cpu.lowrank_linear(inputs(1, 50), **arguments)
    held = len(cpu._PLANS)
    del arguments
    gc.collect()
    assert len(cpu._PLANS) < held


def test_stored_tensors_are_not_touched() -> None:
    arguments = layer(40, 50, ("uniform", 3.0), rank=9, narrow=11)
    before = copy.deepcopy(arguments)
    cpu.lowrank_linear(inputs(4, 50), **arguments)
    assert all(torch.equal(v, before[k]) for k, v in arguments.items() if isinstance(v, torch.Tensor))


def test_misfits_are_refused() -> None:
    arguments = layer(40, 50, ("uniform", 1.0))
    with pytest.raises((ValueError, RuntimeError)):
        cpu.lowrank_linear(inputs(1, 99), **arguments)
    with pytest.raises((ValueError, RuntimeError)):
        cpu.lowrank_linear(inputs(1, 51), **layer(40, 50, ("trellis", 1.0)))


def test_terms_are_the_levels() -> None:
    levels = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    masks, a = rows.terms(levels)
    for code in range(16):
        signs = [1 if not m else 2 * (bin(int(m) & code).count("1") % 2) - 1 for m in masks]
        total = sum(float(c) * s for c, s in zip(a, signs, strict=True))
        assert abs(total - levels[code]) < 1e-5  # sixteen float32
    uniform = rows.terms(torch.arange(-7.0, 8, 2, dtype=torch.float64).numpy())
    assert uniform.tolist() == [[0, 1, 2, 4], [0, 1, 2, 4]]


def test_the_widest_shuffle_is_taken() -> None:
    assert vectors.shuffle_of({"avx2": True, "ssse3": True}) == ("llvm.x86.avx2.pshuf.b", 32)
    assert vectors.shuffle_of({"avx512bw": True, "avx2": True})[1] == 64
    assert vectors.shuffle_of({"neon": True}) == ("llvm.aarch64.neon.tbl1.v16i8", 16)
    assert vectors.shuffle_of({}) == ("", 16)


ELSEWHERE = """
import torch
from kernels.test_lowrank_cpu import BOUND, SOME, cpu, distance, inputs, layer, reference, vectors
assert vectors.SHUFFLE == SHUFFLE and vectors.LANES == 16
for grid in SOME:
    arguments, x = layer(75, 70, grid, rank=9, rotated=True), inputs(1, 70)
    assert distance(cpu.lowrank_linear(x, **arguments), reference.lowrank_linear(x.double(), **arguments)) <= 2 * BOUND[x.dtype]
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="asks for processors of one kind")
@pytest.mark.parametrize(
    ("setting", "shuffle"),
    [({"NUMBA_ENABLE_AVX": "0"}, "llvm.x86.ssse3.pshuf.b.128"), ({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, "")],
)
def test_narrower_processors(setting: dict[str, str], shuffle: str, tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **setting, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", f"SHUFFLE = {shuffle!r}\n{ELSEWHERE}"], env=environment, check=True, cwd=tests)


def flat(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the op after x."""
    whole: dict[str, Any] = {"rank": 0, "q_narrow": 0, **arguments}
    for grid in ("l_grid", "r_grid", "q_grid"):
        whole[grid], whole[grid.replace("grid", "bits")] = whole.get(grid, ("uniform", 0.0))
    return tuple(whole.get(name) for name in op._NAMES)


@pytest.mark.parametrize("grid", [("uniform", 2.0), ("trellis", 1.5)], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(grid: tuple[str, float]) -> None:
    arguments = layer(20, 24, grid, rank=5, narrow=7, rotated=True)
    for name in SCALES:
        arguments[name].requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(3, 24).to(dtype).requires_grad_()
        torch.library.opcheck(op._op, (x, *flat(arguments)))


@pytest.mark.parametrize("length", ["full", "one"])
@pytest.mark.parametrize("narrow", [0, 7])
def test_gradients(length: str, narrow: int) -> None:
    """Of the reference by differences in float64; ours by the reference's in float64."""
    arguments = layer(20, 24, ("uniform", 2.0), rank=5, narrow=narrow, rotated=True)
    names = [name for name in SCALES if name in arguments]
    scales = [(arguments[n] if length == "full" else arguments[n][:1]).double().requires_grad_() for n in names]
    x = inputs(3, 24).double().requires_grad_()

    def run(x: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        return lowrank.lowrank_linear(x, **arguments | dict(zip(names, scales, strict=True)))

    assert torch.autograd.gradcheck(run, (x, *scales))
    weight = inputs(3, 20, seed=5)
    want = torch.autograd.grad((run(x, *scales) * weight).sum(), [x, *scales])
    single = [t.detach().float().requires_grad_() for t in (x, *scales)]
    found = torch.autograd.grad((run(*single) * weight).sum(), single)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))  # some hundred float32 roundings


def test_compiled_with_gradients() -> None:
    arguments = layer(20, 24, ("uniform", 2.0), rank=5, rotated=True)

    def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return lowrank.lowrank_linear(torch.relu(x), **arguments | {"row_scale": scale}) * 2

    pair = [(inputs(3, 24).requires_grad_(), arguments["row_scale"].clone().requires_grad_()) for _ in range(2)]
    run(*pair[0]).sum().backward()
    torch.compile(run, backend="aot_eager", fullgraph=True)(*pair[1]).sum().backward()
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("why", ["asked for", "no numba"])
def test_the_reference_serves_without_numba(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "asked for":
        monkeypatch.setenv("LPLR_BACKEND", "reference")
    else:
        monkeypatch.setitem(sys.modules, "lplr.kernels.lowrank.cpu", None)
    compiled.cache_clear()
    try:
        arguments, x = layer(20, 24, ("uniform", 2.0)), inputs(3, 24)
        if why == "no numba":
            with pytest.warns(RuntimeWarning, match="numba"):
                assert compiled("lowrank") is None
        y = lowrank.lowrank_linear(x, **arguments)  # and says nothing again
        assert torch.equal(y, reference.lowrank_linear(x, **arguments))
    finally:
        compiled.cache_clear()


def held(arguments: dict[str, Any]) -> lowrank.Layer:
    """The layer of these arguments."""
    none = ("uniform", 0.0)
    sizes: dict[str, Any] = {"rank": 0, "l_grid": none, "r_grid": none, "q_grid": none, "q_narrow": 0}
    sizes |= {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)}
    return lowrank.Layer(sizes, {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)})


def test_memory_that_moves_is_noticed() -> None:
    """Shared memory has another address and the same version."""
    for grid in (("trellis", 2.0), ("uniform", 2.0)):
        arguments, x = layer(64, 96, grid), inputs(3, 96)
        once = held(arguments)
        with torch.no_grad():
            before = once(x)
            for t in once.stored:
                if t is not None:
                    t.share_memory_()
            junk = [torch.full((size,), 3e38) for size in (64, 96, 1024, 4096) for _ in range(40)]
            assert torch.equal(once(x), before), len(junk)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("grid", [("trellis", 2.0), ("uniform", 2.0), ("normal_float", 4.0)])
def test_the_default_device_is_not_where_results_lie(grid: tuple[str, float], tokens: int) -> None:
    arguments, x = layer(70, 96, grid, rotated=True), inputs(tokens, 96)
    for dtype in (torch.float32, torch.bfloat16):
        want = cpu.lowrank_linear(x.to(dtype), **arguments)
        with torch.no_grad(), torch.device("meta"):
            assert torch.equal(cpu.lowrank_linear(x.to(dtype), **arguments), want)


def test_transforms_of_torch_see_the_op() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    arguments, x = layer(40, 30, ("uniform", 2.0)), inputs(3, 30)
    once = held(arguments)
    want = reference.lowrank_linear(x.double(), **arguments)
    with torch.no_grad():
        for y in (
            torch.func.functionalize(once)(x),
            make_fx(once)(x)(x),
            make_fx(once)(torch.zeros_like(x))(x),
            once(torch._neg_view(-x)),
            lowrank.lowrank_linear(torch._neg_view(-x), **arguments),
        ):
            assert distance(y, want) <= BOUND[torch.float32]
