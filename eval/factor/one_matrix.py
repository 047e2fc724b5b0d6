"""Calibrated compression of one matrix at a budget: its time beside that of its own matrix products, and what takes the rest.

    python eval/speed/one_matrix.py [--n 4096] [--bits 1] [--methods lplr lplr_feedback ldlq] [--repeat 2] [--output FILE]

The matrix has singular values i^(-1/2), the metric H that of 4 d tokens whose variances fall as i^(-1/2) in a random basis.
`share` is the time that the matrix products which torch counts in the call (products and solutions of triangular systems)
would take at the rate of a square product measured in the same run, over the time of the call; `parts` what a profile of a
further call says of its own time, largest first: products, factorizations of LAPACK, the compiled rounding, the rest by name.
The error in the metric has to lie between the rank optimum (0 for a backbone) and 1 before a time is printed.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import time
from pathlib import Path
from typing import Any

import torch
from published import matrix
from torch.utils.flop_counter import FlopCounterMode

from lplr import FactorSpec, factorize

SHOWN = 8


def metric(d: int, seed: int = 1) -> torch.Tensor:
    """E[x x^T] of 4 d tokens."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    X = torch.randn(4 * d, d, generator=generator) * torch.arange(1, d + 1).float().pow(-0.25) @ basis
    return X.T @ X / len(X)


def seconds(call: Any, repeat: int) -> float:
    """The least wall time of some calls."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def parts(call: Any) -> dict[str, float]:
    """Seconds of the functions with most time of their own."""
    profile = cProfile.Profile()
    profile.runcall(call)
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    own = {name if file == "~" else f"{Path(file).name}:{name}": row[2] for (file, _, name), row in found.items()}
    return dict(sorted(own.items(), key=lambda item: -item[1])[:SHOWN])


def measured(method: str, W: torch.Tensor, H: torch.Tensor, bits: float, repeat: int, rate: float) -> dict[str, Any]:
    """One method's line."""
    spec = FactorSpec(method=method, bits_per_weight=bits)

    def call() -> Any:
        return factorize(W, spec, H=H, generator=torch.Generator().manual_seed(0))

    with FlopCounterMode(display=False) as counter:
        f = call()
    E = W - f.dequantize()
    error = float((torch.linalg.vecdot(E @ H, E).sum() / torch.linalg.vecdot(W @ H, W).sum()).sqrt())
    if not 0 < error < 1:
        raise SystemExit(f"{method}: relative error {error} in the metric: no time is printed")
    taken, flops = seconds(call, repeat), counter.get_total_flops()
    line = {"method": method, "bits_per_weight": f.format.bits_per_weight, "relative_error": error, "seconds": taken}
    return line | {"gflop": flops / 1e9, "share": flops / rate / taken, "parts": parts(call)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--methods", nargs="+", default=["lplr", "lplr_feedback", "ldlq"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "one_matrix.json")
    args = parser.parse_args()
    W, H = matrix(args.n), metric(args.n)
    rate = 2 * args.n**3 / seconds(lambda: W @ H, 3)
    result: dict[str, Any] = {"n": args.n, "threads": torch.get_num_threads(), "gemm_gflops": rate / 1e9}
    result |= {"machine": f"{platform.machine()}, torch {torch.__version__}", "lines": []}
    print(f"a square product: {rate / 1e9:.0f} Gflop/s in {result['threads']} threads")
    for method in args.methods:
        line = measured(method, W, H, args.bits, args.repeat, rate)
        result["lines"].append(line)
        print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items() if k != "parts"), flush=True)
        for name, own in line["parts"].items():
            print(f"    {own:8.2f} s  {name}", flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
