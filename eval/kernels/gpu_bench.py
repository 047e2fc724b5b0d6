"""Decode and prefill of packed matrices on a GPU, against what its memory and cuBLAS do in the same run.

    make bench-gpu

Every answer is checked against the torch form in float64 before it is timed.  Prints, for each shape and format: microseconds,
the share of the copy bandwidth that reading the codes reaches (one token), and the speed over a bfloat16 linear layer of cuBLAS.
Not run yet: no GPU was at hand when it was written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from triton.testing import do_bench

from lplr.kernels.levels import packed_shape
from lplr.kernels.matmul import matmul, reference

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
FORMATS = (("uniform", 1.0), ("uniform", 2.0), ("uniform", 4.0), ("normal_float", 4.0))
FORMATS += (("lattice", 2.0), ("trellis", 1.0), ("trellis", 2.0))
TOKENS = (1, 4, 16, 512)


def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source)) * 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("eval/results/kernels_gpu.json"))
    args = parser.parse_args()
    bandwidth, generator = copy_bandwidth(), torch.Generator("cuda").manual_seed(0)
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e9:.0f} GB/s")
    lines = []
    for n, d in SHAPES:
        W = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, generator=generator)
        row, col = (torch.rand(size, device="cuda", generator=generator).bfloat16() for size in (n, d))
        dense = {}
        for tokens in TOKENS:
            x = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16, generator=generator)
            dense[tokens] = x, do_bench(lambda x=x, W=W: x @ W.T) * 1e3
        for grid, bits in FORMATS:
            # every pattern of bits is a code, whatever the grid
            codes = torch.randint(0, 256, packed_shape((n, d), grid, bits), device="cuda", dtype=torch.uint8, generator=generator)
            for tokens, (x, of_cublas) in dense.items():
                y = matmul(x, codes, n, (grid, bits), row, col)
                want = reference.matmul(x.double(), codes, n, (grid, bits), row, col, None, 0)
                error = float((y.double() - want).norm() / want.norm())
                assert error < 2.0**-7, f"{grid} {bits} {n}x{d} {tokens}: error {error}"  # x * col, the points and y in bfloat16
                mine = do_bench(lambda x=x, c=codes, g=(grid, bits), n=n, r=row, k=col: matmul(x, c, n, g, r, k)) * 1e3
                line = {"n": n, "d": d, "grid": grid, "bits": bits, "tokens": tokens, "us": mine}
                line |= {"cublas_us": of_cublas, "error": error}
                line |= {"over_cublas": of_cublas / mine, "of_bandwidth": codes.numel() / (mine * 1e-6) / bandwidth}
                lines.append(line)
                print(*(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()), flush=True)
    report = {"device": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth, "lines": lines}
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
