"""Decode, small batches and prefill of compressed layers on the CPU, beside dense and other packed products, in one run.

    python eval/kernels/cpu.py [--threads 2] [--seconds 0.3] [--rounds 3] [--shapes NAME ..] [--tokens 1 16 512] [--ggml FOLDER]
        [--output eval/results/kernels_cpu.json]

Every answer of ours is checked against the float64 reference before it is timed.  Times are the least of many: what the code
takes when nothing else runs.  For each: milliseconds, the ratio to torch's bfloat16 linear of the same run, and the bytes of
codes read a second over the reading bandwidth that a sum over 256 MiB reaches in this run (above 1: codes came from the cache).

--ggml: a folder with libggml-base and libggml-cpu, built from the source package of llama-cpp-python (vendor/llama.cpp/ggml), or
`xllamacpp`, the library in that wheel, which was compiled for many processors and may be slower than one built here;
the products run as graphs of its public interface.  Ternary formats of ggml (TQ1_0, TQ2_0) have no sign-only counterpart.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lplr.kernels.hadamard import rotation_signs
from lplr.kernels.levels import packed_shape
from lplr.kernels.lowrank import Layer, reference

SHAPES = {
    "SmolLM2-135M up": (1536, 576),
    "SmolLM2-135M down": (576, 1536),
    "Llama-2-7B attention": (4096, 4096),
    "Llama-2-7B up": (11008, 4096),
    "Llama-3-8B key": (1024, 4096),
    "Llama-3-8B up": (14336, 4096),
}
TOKENS = (1, 16, 512)
# name -> (grid, bits, whether as factors L R of one bit a weight in all)
OURS = {
    "double binary 1 bit (L, R signs)": ("uniform", 1.0, True),
    "double binary 1 bit, rotated": ("uniform", 1.0, True),
    "uniform 1 bit": ("uniform", 1.0, False),
    "uniform 2 bit": ("uniform", 2.0, False),
    "uniform 3 bit": ("uniform", 3.0, False),
    "uniform 4 bit": ("uniform", 4.0, False),
    "uniform 8 bit": ("uniform", 8.0, False),
    "trellis 1 bit (default)": ("trellis", 1.0, False),
    "trellis 2 bit (default)": ("trellis", 2.0, False),
    "trellis 4 bit": ("trellis", 4.0, False),
    "lattice 2 bit": ("lattice", 2.0, False),
    "normal_float 4 bit": ("normal_float", 4.0, False),
}
BOUND = 2.0**-9 + 3e-3  # the result is bfloat16; activations are rounded about as finely, twice for two factors
GGML = {"Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "TQ1_0": 34, "TQ2_0": 35, "IQ1_S": 19, "IQ2_XXS": 16}  # enum ggml_type


Case = tuple[str, int, Callable[[], Any], int]  # name, bytes of weights, a call, how many products it makes


def least(run: Callable[[], Any], seconds: float) -> float:
    """The least time of a call, in milliseconds, over `seconds`, three at least."""
    run()
    best, until, count = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < until or count < 3:
        start = time.perf_counter()
        run()
        best, count = min(best, time.perf_counter() - start), count + 1
    return 1e3 * best


def bandwidth(seconds: float) -> float:
    """Bytes a second of reading 256 MiB."""
    block = torch.ones(1 << 25, dtype=torch.int64)
    return block.numel() * 8 / least(block.sum, seconds) * 1e3


def codes(shape: tuple[int, int], grid: str, bits: float, g: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, packed_shape(shape, grid, bits), dtype=torch.uint8, generator=g)


def layer(n: int, d: int, name: str, g: torch.Generator) -> tuple[dict[str, Any], dict[str, torch.Tensor | None]]:
    """(sizes, tensors) of a layer with random codes."""
    grid, bits, factors = OURS[name]
    sizes = {"n": n, "rank": 0, "l_grid": (grid, bits), "r_grid": (grid, bits), "q_grid": (grid, bits), "q_narrow": 0}
    tensors: dict[str, torch.Tensor | None] = {}
    if factors:
        rank = sizes["rank"] = n * d // (n + d) // 8 * 8
        tensors |= {"l_codes": codes((n, rank), grid, bits, g), "r_codes": codes((rank, d), grid, bits, g)}
        tensors |= {"row_scale": torch.rand(n, generator=g), "rank_scale": torch.rand(rank, generator=g)}
        tensors |= {"col_scale": torch.rand(d, generator=g)}
    else:
        tensors |= {"q_codes": codes((n, d), grid, bits, g), "q_row_scale": torch.rand(n, generator=g)}
    if grid in ("trellis", "lattice") or "rotated" in name:
        tensors |= {"signs": rotation_signs(1, d), "out_signs": rotation_signs(2, n)}
    return sizes, tensors


def ours(n: int, d: int, tokens: int) -> Iterator[Case]:
    """The case of each of our formats, checked first."""
    g = torch.Generator().manual_seed(n + d)
    x = torch.randn(tokens, d, generator=g).bfloat16()
    for name in OURS:
        sizes, tensors = layer(n, d, name, g)
        product = Layer(sizes, tensors)
        few = x[:2]
        want = reference.lowrank_linear(few.double(), **sizes, **tensors)
        error = float((product(few).double() - want).norm() / want.norm())
        whole = product(x)[:2].double()
        error = max(error, float((whole - want).norm() / want.norm()))
        if not error <= BOUND:
            raise SystemExit(f"{name} is wrong by {error:.2e} at {n} x {d}: no speed of a wrong answer")
        size = sum(t.numel() for k, t in tensors.items() if t is not None and k.endswith("codes"))
        yield name, size, partial(product, x), 1


@contextlib.contextmanager
def absent(peer: str) -> Iterator[None]:
    """Say why a peer is left out where this machine does not have it."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"{peer} is left out: {str(error).splitlines()[0]}")


def dense(n: int, d: int, tokens: int) -> Iterator[Case]:
    """The same of torch's products, and bitsandbytes'."""
    g = torch.Generator().manual_seed(n)
    x, W = torch.randn(tokens, d, generator=g), torch.randn(n, d, generator=g)
    half, W_half = x.bfloat16(), W.bfloat16()
    linear = torch.nn.functional.linear
    yield "torch bfloat16", 2 * n * d, lambda: linear(half, W_half), 1
    yield "torch float32", 4 * n * d, lambda: linear(x, W), 1
    scale = (W.abs().amax(1) / 127).bfloat16()
    W8 = (W / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
    with absent("torch int8"):
        int8 = partial(torch.ops.aten._weight_int8pack_mm, half, W8, scale)
        int8()
        yield "torch int8", n * d, int8, 1
    with absent("torch int4"):
        nibbles = torch.randint(0, 16, (n, d), dtype=torch.int32, generator=g)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        groups = torch.rand(d // 64, n, 2, generator=g).bfloat16()
        int4 = partial(torch.ops.aten._weight_int4pack_mm_for_cpu, half, packed, 64, groups)
        int4()
        yield "torch int4", n * d // 2, int4, 1
    with absent("bitsandbytes NF4"):
        import bitsandbytes.functional as bnb
        from bitsandbytes import matmul_4bit

        quantized, state = bnb.quantize_4bit(W_half, quant_type="nf4")
        nf4 = partial(matmul_4bit, half, quantized.t(), quant_state=state)
        nf4()
        yield "bitsandbytes NF4", n * d // 2, nf4, 1


class _Parameters(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def libraries(folder: Path) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """ggml's tensors and its products: two libraries of a folder, or one in the wheel xllamacpp."""
    if folder == Path("xllamacpp"):
        from xllamacpp import xllamacpp

        whole = ctypes.CDLL(xllamacpp.__file__)
        return whole, whole
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    return base, ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)


def ggml(folder: Path, n: int, d: int, tokens: int, threads: int, open_ones: contextlib.ExitStack) -> Iterator[Case]:
    """The same of ggml's products: a graph of several, so that starting its threads is paid once for all."""
    base, cpu = libraries(folder)
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    for library, name, result, arguments in (
        (base, "ggml_init", pointer, [_Parameters]),
        (base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, whole, whole]),
        (base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        (base, "ggml_new_graph", pointer, [pointer]),
        (base, "ggml_build_forward_expand", None, [pointer, pointer]),
        (base, "ggml_get_data", pointer, [pointer]),
        (base, "ggml_nbytes", ctypes.c_size_t, [pointer]),
        (base, "ggml_free", None, [pointer]),
        (base, "ggml_quantize_chunk", ctypes.c_size_t, [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]),
        (cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_cpu_init()
    W, x = torch.randn(n, d), torch.randn(tokens, d)
    importance = torch.ones(d)
    many = 10 if tokens == 1 else 1
    for name, kind in GGML.items():
        if (d % 256 and name not in ("Q4_0", "Q8_0")) or (name == "IQ1_S" and tokens > 1):  # the latter takes seconds
            continue
        context = base.ggml_init(_Parameters(n * d * 5 // 4 + 64 * tokens * (n + d) + (256 << 20), None, False))
        open_ones.callback(base.ggml_free, context)
        weight = base.ggml_new_tensor_2d(context, kind, d, n)
        given = base.ggml_new_tensor_2d(context, 0, d, tokens)
        ctypes.memmove(base.ggml_get_data(given), x.data_ptr(), 4 * x.numel())
        at = base.ggml_get_data(weight)
        rows = base.ggml_quantize_chunk(kind, W.data_ptr(), at, 0, min(n, 256), d, importance.data_ptr())
        for i in range(256, n, 256):  # the same 256 rows again: to quantize them all takes minutes
            ctypes.memmove(at + rows // 256 * i, at, rows // 256 * min(256, n - i))
        graph = base.ggml_new_graph(context)
        outs = [base.ggml_mul_mat(context, weight, given) for _ in range(many)]
        for out in outs:
            base.ggml_build_forward_expand(graph, out)
        assert cpu.ggml_graph_compute_with_ctx(context, graph, threads) == 0
        found = torch.empty(tokens, n)
        ctypes.memmove(found.data_ptr(), base.ggml_get_data(outs[0]), 4 * found.numel())
        want = x @ W[: min(n, 256)].T
        error = float((found[:, : want.shape[1]] - want).norm() / want.norm())
        assert error < 1.0, f"ggml {name} is wrong by {error}"  # low widths of random weights are off by half
        compute = partial(cpu.ggml_graph_compute_with_ctx, context, graph, threads)
        yield f"ggml {name}", base.ggml_nbytes(weight), compute, many


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--ggml", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    reading = bandwidth(args.seconds)
    print(f"reading {reading / 1e9:.1f} GB/s with {args.threads} threads, torch {torch.__version__}")
    table = []
    for shape in args.shapes:
        n, d = SHAPES[shape]
        for tokens in args.tokens:
            with contextlib.ExitStack() as open_ones:
                cases = [*dense(n, d, tokens), *ours(n, d, tokens)]
                if args.ggml:
                    cases += ggml(args.ggml, n, d, tokens, args.threads, open_ones)
                # in rounds, so that a change of the machine's load meets all of them
                times = [[least(run, args.seconds) / many for _, _, run, many in cases] for _ in range(args.rounds)]
            found = [
                (name, size, min(all_times))
                for (name, size, _, _), all_times in zip(cases, zip(*times, strict=True), strict=True)
            ]
            base = found[0][2]
            for name, size, ms in found:
                ratio, share = base / ms, size / ms * 1e3 / reading
                row = {"shape": shape, "n": n, "d": d, "tokens": tokens, "format": name, "ms": ms, "times_bfloat16": ratio}
                table.append(row | {"bits_per_weight": 8 * size / (n * d), "of_bandwidth": share, "load": os.getloadavg()[0]})
                print(f"{shape:22} {tokens:4} {name:34} {ms:9.3f} ms  {ratio:6.2f} x bf16  {share:5.2f} of bandwidth", flush=True)
            if args.output:
                about = {"bandwidth": reading, "threads": args.threads, "torch": torch.__version__, "cpu": platform.processor()}
                args.output.write_text(json.dumps({**about, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
