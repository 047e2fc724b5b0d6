"""Decode and prefill of packed matrices on a GPU, against what its memory and cuBLAS do in the same run; the trellis encoder.

    make bench-gpu

Every answer is checked against the torch form before it is timed, by CUDA graphs over as many matrices as no cache holds.
Prints, for each shape and format: microseconds, the share of the copy bandwidth that reading the codes reaches (one token), and
the speed over a bfloat16 linear layer of cuBLAS; at one token also what a call from Python takes without a graph (`eager_us`).
For the encoder: weights a second, and that over the torch form on the same GPU.
`--formats` picks some.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

from lplr.kernels import trellis
from lplr.kernels.levels import packed_shape
from lplr.kernels.matmul import matmul, reference

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
FORMATS = (("uniform", 1.0), ("uniform", 2.0), ("uniform", 4.0), ("normal_float", 4.0))
FORMATS += (("lattice", 2.0), ("trellis", 1.0), ("trellis", 2.0))
TOKENS = (1, 4, 16, 64, 512)
COLD = 256 << 20  # bytes that no cache holds


def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source)) * 1e-3)


def copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    """As many of a tensor as the cache does not hold: layers of a model follow each other."""
    return [tensor.clone() for _ in range(min(128, -(-COLD // (tensor.numel() * tensor.element_size()))))]


def microseconds(product: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """The time of one of the products with all weights one after another, launched as a CUDA graph."""

    def all_of_them() -> None:
        for weight in weights:
            product(weight)

    return do_bench_cudagraph(all_of_them, rep=30, return_mode="median") / len(weights) * 1e3


def encoding(bits: float, generator: torch.Generator, m: int = 4096, n: int = 4096) -> dict[str, float]:
    """The trellis encoder on m sequences of n entries of N(0, 1); the torch form on as many as its memory is meant for."""
    x = torch.randn(m, n, device="cuda", generator=generator)
    few = x[:256, :512].contiguous()
    for found, of_cpu in zip(trellis.encode(few, bits), trellis.encode(few.cpu(), bits), strict=True):
        assert torch.equal(found.cpu(), of_cpu), f"the encoder of {bits} bits finds other codes than on the CPU"
    mine = m * n / do_bench(lambda: trellis.encode(x, bits), warmup=1, rep=400) * 1e3
    torch_form = few.numel() / do_bench(lambda: trellis.reference.encode(few, bits), warmup=1, rep=1) * 1e3
    alone = n / do_bench(lambda: trellis.encode(x[:1], bits), warmup=1, rep=100) * 1e3
    line = {"bits": bits, "sequences": m, "entries": n, "weights_per_second": mine, "over_torch": mine / torch_form}
    line |= {"one_sequence_weights_per_second": alone}
    print("encoder", *(f"{k}={v:.3g}" for k, v in line.items()), flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("eval/results/kernels_gpu.json"))
    parser.add_argument("--formats", nargs="+", default=[f"{grid}:{bits:g}" for grid, bits in FORMATS], metavar="GRID:BITS")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="of the first so many")
    args = parser.parse_args()
    formats = [(grid, float(bits)) for grid, bits in (text.split(":") for text in args.formats)]
    bandwidth, generator = copy_bandwidth(), torch.Generator("cuda").manual_seed(0)
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e9:.0f} GB/s")
    lines = []
    for n, d in SHAPES[: args.shapes]:
        W = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, generator=generator)
        row, col = (torch.rand(size, device="cuda", generator=generator).bfloat16() for size in (n, d))
        dense, weights = {}, copies(W)
        for tokens in TOKENS:
            x = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16, generator=generator)
            dense[tokens] = x, microseconds(lambda W, x=x: x @ W.T, weights)
        for grid, bits in formats:
            # every pattern of bits is a code, whatever the grid
            codes = torch.randint(0, 256, packed_shape((n, d), grid, bits), device="cuda", dtype=torch.uint8, generator=generator)
            packed = copies(codes)
            for tokens, (x, of_cublas) in dense.items():
                y = matmul(x, codes, n, (grid, bits), row, col)
                want = reference.matmul(x.double(), codes, n, (grid, bits), row, col, None, 0)
                error = float((y.double() - want).norm() / want.norm())
                assert error < 2.0**-7, f"{grid} {bits} {n}x{d} {tokens}: error {error}"  # x * col, the points and y in bfloat16
                mine = microseconds(lambda c, x=x, g=(grid, bits), n=n, r=row, k=col: matmul(x, c, n, g, r, k), packed)
                line = {"n": n, "d": d, "grid": grid, "bits": bits, "tokens": tokens, "us": mine}
                line |= {"cublas_us": of_cublas, "error": error}
                line |= {"over_cublas": of_cublas / mine, "of_bandwidth": codes.numel() / (mine * 1e-6) / bandwidth}
                if tokens == 1:
                    line["eager_us"] = do_bench(partial(matmul, x, codes, n, (grid, bits), row, col), rep=30) * 1e3
                lines.append(line)
                print(*(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()), flush=True)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    report |= {"copy_bytes_per_second": bandwidth, "lines": lines}
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report |= {"encoder": [encoding(bits, generator) for grid, bits in formats if grid == "trellis"]}
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
