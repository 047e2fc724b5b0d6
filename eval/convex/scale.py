"""The scale CRONOS is known for: two classes of n images with far more pixels than samples, X larger than what may be resident.

    python eval/convex/scale.py --folder TMP [--samples 2000] [--features 786432] [--gates 100] [--loss logistic] [--ratio 0.1]
        [--tol 1e-4] [--threads 2]

Writes X (float32, samples x features: smooth class patterns, brightness and noise, from a seed) into a file of the folder, which
at full size takes 6.3 GB, then in a fresh process, so that its peak memory is its own:

    one pass over X          K = X X^T in float64 and the patterns of Gaussian gates drawn block by block  (lplr.convex.reduce)
    factor, solve            the same programme on the n x r factor, lam = ratio * lambda_max, to the relative duality gap tol
    another pass             the certificate of the weights of the pixels themselves, from the data

Seconds of every step and the peak of resident memory go to eval/results/convex_scale.json; the file is removed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from lplr.convex import Penalty, Problem, lambda_max, reduce, solve

TARGET = Path(__file__).parents[1] / "results" / "convex_scale.json"
SEED, FACTORS = 0, 40


def write(path: Path, n: int, d: int) -> None:
    """X = brightness + loadings of smooth patterns, a part of which depends on the class, + noise; standardised roughly."""
    rng = np.random.default_rng(SEED)
    labels = rng.permutation(np.arange(n) % 2) * 2 - 1
    loadings = rng.standard_normal((n, FACTORS)).astype(np.float32)
    loadings[:, 0] += 0.7 * labels
    loadings[:, 1] *= 1 + 0.5 * labels  # a class that only a nonlinear model sees
    X = np.lib.format.open_memmap(path / "X.npy", mode="w+", dtype=np.float32, shape=(n, d))
    width = 1 << 14
    for first in range(0, d, width):
        size = min(width, d - first)
        waves = np.cos(np.arange(first, first + size) * rng.uniform(1e-5, 1e-1, (FACTORS, 1)) + rng.uniform(0, 6, (FACTORS, 1)))
        X[:, first : first + size] = loadings @ waves.astype(np.float32) + rng.standard_normal((n, size), dtype=np.float32)
    X.flush()
    np.save(path / "y.npy", labels.astype(np.float64))


def peak_resident() -> int:
    """Bytes, of this process since its start (getrusage's figure counts the parent's as well)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def work(args: argparse.Namespace) -> dict[str, object]:
    """One pass, factor, solve, one pass."""
    torch.set_num_threads(args.threads)
    clock = {"start": time.perf_counter()}

    def lap(name: str) -> None:
        clock[name] = time.perf_counter() - sum(clock.values())

    X = np.load(args.folder / "X.npy", mmap_mode="r")
    y = torch.from_numpy(np.load(args.folder / "y.npy"))[:, None]
    passed = reduce.stream(X, args.gates, SEED)
    lap("first pass")
    found = reduce.factor(passed.K)
    lap("factor")
    D = passed.patterns()
    Y = y if args.loss != "softmax" else torch.cat([y > 0, y < 0], 1).double()
    problem = Problem(found.L, Y, D[:, D.any(0)], loss=args.loss, intercept=True)
    penalty = Penalty(args.ratio * lambda_max(problem, "group"))
    solution = solve(problem, penalty, tol=args.tol)
    lap("solve")
    proof = reduce.certify_stream(X, problem, penalty, found, solution)
    lap("second pass")
    clock.pop("start")
    return {
        "seconds": {**{k: round(v, 2) for k, v in clock.items()}, "all": round(sum(clock.values()), 2)},
        "peak_resident_gib": round(peak_resident() / 2**30, 2),
        "rank": found.rank,
        "dropped": found.dropped,
        "lam": penalty.lam,
        "active_gates": int((penalty.lengths(solution.U) > 0).sum()),
        "primal": proof.primal,
        "dual": proof.dual,
        "relative_gap": proof.gap / abs(proof.primal),
        "reduced_relative_gap": solution.relative_gap,
        "status": solution.status,
        "newton_steps": solution.iterations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--features", type=int, default=786_432)
    parser.add_argument("--gates", type=int, default=100)
    parser.add_argument("--loss", choices=("squared", "logistic", "softmax"), default="logistic")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=TARGET)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        write(args.folder, args.samples, args.features)
        ran = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker"], stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for name in ("X.npy", "y.npy"):
            (args.folder / name).unlink(missing_ok=True)
    settings = {k: getattr(args, k) for k in ("samples", "features", "gates", "loss", "ratio", "tol", "threads")}
    result = {**settings, **json.loads(ran.stdout), "torch": torch.__version__, "machine": platform.machine()}
    table = json.loads(args.output.read_text()) if args.output.exists() else {}
    table[f"{args.loss}-{args.samples}x{args.features}"] = result
    args.output.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
