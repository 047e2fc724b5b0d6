"""Large gated programmes in memory: seconds and peak memory to a certified duality gap, beside the matrix products alone.

    python eval/convex/large.py [--cases softmax-50000x2048x10 ...] [--gates 32] [--ratio 0.1] [--tol 1e-4] [--threads 2]

A case is LOSS-SAMPLESxFEATURESxOUTPUTS.  X (float32, from a seed) holds a few common factors and noise; the classes are the areas
of the largest of C smooth nonlinear functions of the factors, so that gates have something to find.  lam = ratio * lambda_max,
intercept, norm "group".

Every case runs in a process of its own, so that its peak memory is its own.  Physical limit: one iteration of FISTA is two
products, X by (d, P C) and X^T by (n, P C); "iteration / products" is its time over that of these two products alone, measured in
the same process on the same threads.  The gap is measured in float64 whatever the type of X.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from scale import peak_resident

from lplr.convex import Penalty, Problem, gaussian, lambda_max, patterns, solve

TARGET = Path(__file__).parents[1] / "results" / "convex_large.json"
CASES = ("softmax-50000x2048x10", "logistic-50000x2048x1", "squared-50000x512x1")
FACTORS = 30


def programme(loss: str, n: int, d: int, C: int, P: int) -> Problem:
    draw = torch.Generator().manual_seed(0)
    factors = torch.randn(n, FACTORS, generator=draw)
    X = factors @ torch.randn(FACTORS, d, generator=draw) / FACTORS**0.5
    X += torch.randn(n, d, generator=draw)
    X = torch.cat([(X - X.mean(0)) / X.std(0), torch.ones(n, 1)], 1)
    bends = torch.relu(factors @ torch.randn(FACTORS, 4 * max(C, 2), generator=draw) + 0.5)
    scores = bends @ torch.randn(4 * max(C, 2), max(C, 2), generator=draw) + 2 * torch.randn(n, max(C, 2), generator=draw)
    label = scores.argmax(1)
    if loss == "softmax":
        Y = torch.nn.functional.one_hot(label, C).float()
    else:
        Y = 2.0 * (label[:, None] == 0) - 1 if loss == "logistic" else scores[:, :C] / scores.std()
    D = patterns(X, gaussian(d + 1, P, draw))
    D[:, 0] = True  # the linear block
    return Problem(X, Y.float(), D, loss, intercept=True)


def work(case: str, args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(args.threads)
    loss, sizes = case.split("-")
    n, d, C = map(int, sizes.split("x"))
    problem = programme(loss, n, d, C, args.gates)
    penalty = Penalty(args.ratio * lambda_max(problem, "group"))
    found = solve(problem, penalty, tol=args.tol)
    if not found.converged:
        raise SystemExit(f"{case}: {found.message}; no time is worth reporting")
    W, T = torch.randn(d + 1, args.gates * C), torch.randn(n, args.gates * C)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        problem.X @ W, problem.X.T @ T
        times.append(time.perf_counter() - start)
    products = statistics.median(times)
    return {
        "seconds": round(found.seconds, 1),
        "iterations": found.iterations,
        "iteration_over_products": round(found.seconds / max(found.iterations, 1) / products, 2),
        "relative_gap": found.relative_gap,
        "primal": found.primal,
        "active_gates": int((penalty.lengths(found.U).sum(-1) > 0).sum()),
        "peak_resident_gib": round(peak_resident() / 2**30, 2),
        "X_gib": round(problem.X.numel() * 4 / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="CASE")
    parser.add_argument("--gates", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, args)))
        return
    settings = {k: getattr(args, k) for k in ("gates", "ratio", "tol", "threads")}
    table = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    for case in args.cases:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", case]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        table[case] = {**json.loads(ran.stdout), **settings, "torch": torch.__version__, "machine": platform.machine()}
        print(case, json.dumps(table[case]), flush=True)
        TARGET.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
