"""LPLR of a 4096 x 4096 matrix with spectrum i^(-1/2), rank 1024, 2 bits each: time, error, share of the matrix-product rate.

    python eval/factor/published.py [--n 4096] [--rank 1024] [--bits 2] [--repeat 5]

The yardstick is the authors' published implementation (quantizer with one range for the whole matrix, explicit
pseudo-inverse): run it on the same matrix in the same process and compare; on two quiet cores it took 1.75 s with a relative
Frobenius error of 0.99.  The answer is checked against float64 before any time is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lplr import FactorSpec, QuantSpec, factorize


def matrix(n: int, seed: int = 0) -> torch.Tensor:
    """U diag(i^(-1/2)) V^T with random orthogonal U, V."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    return (U * torch.arange(1, n + 1).float().rsqrt()) @ V.T


def seconds(call: Callable[[], object], repeat: int) -> list[float]:
    """Wall times of `repeat` calls after one to warm up."""
    call()
    out = []
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        out.append(time.perf_counter() - started)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    A = matrix(args.n)
    spec = FactorSpec(method="lplr", rank=args.rank, l=QuantSpec(bits=args.bits), r=QuantSpec(bits=args.bits))
    f = factorize(A, spec, generator=torch.Generator().manual_seed(1))
    dense = f.l.dequantize(torch.float64) @ f.r.dequantize(torch.float64)
    error = float((A.double() - dense).norm() / A.double().norm())
    squares = 1 / torch.arange(1, args.n + 1).double()
    optimum = float((squares[args.rank :].sum() / squares.sum()).sqrt())
    if not optimum <= error < 1:
        raise SystemExit(f"relative error {error} is not between the optimum {optimum} and 1: no time is printed")
    S = torch.randn(args.n, args.rank)
    ours = seconds(lambda: factorize(A, spec, generator=torch.Generator().manual_seed(1)), args.repeat)
    products = seconds(lambda: (A @ S).T @ A, args.repeat)
    square = seconds(lambda: A @ A, max(2, args.repeat // 2))
    rate = 2 * args.n**3 / min(square)
    work = 2 * 2 * args.n**2 * args.rank + 2 * args.n * args.rank**2 + args.rank**3 / 3 + 2 * args.rank**2 * args.n
    result = {
        "n": args.n,
        "rank": args.rank,
        "bits": args.bits,
        "relative_error": error,
        "optimum": optimum,
        "bits_per_weight": f.format.bits_per_weight,
        "seconds": min(ours),
        "seconds_median": statistics.median(ours),
        "two_products_seconds": min(products),
        "ratio_to_two_products": min(ours) / min(products),
        "gemm_gflops": rate / 1e9,
        "fraction_of_gemm_rate": work / min(ours) / rate,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}, torch {torch.__version__}",
    }
    for key, value in result.items():
        print(f"{key:24} {value:.4g}" if isinstance(value, float) else f"{key:24} {value}")
    target = Path(__file__).parents[1] / "results" / "published.json"
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
