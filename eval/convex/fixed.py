"""The six fixed gated programmes: lplr beside pyscnn's R-FISTA and cvxpy with Clarabel, in turns, on one thread.

    OMP_NUM_THREADS=1 python eval/convex/fixed.py --peer-python PYTHON [--only breast-100-0.01 ...] [--repeats 3]
        [--clarabel-limit 60] [--skip-clarabel]

PYTHON is an interpreter of an environment with pyscnn (pip install pyscnn==0.0.10) and torch.  Every programme is

    min_U 1/(2n) ||sum_i D_i X U_i - y||^2 + lam sum ||U_i||,   float64, no intercept,

breast: load_breast_cancer, columns standardised, a column of ones; y = 2 y - 1.  digits: load_digits / 16, a column of
ones; y = +1 for even digits, else -1.  Gates: numpy default_rng(0).standard_normal((d, P)), D = 1(X G > 0), duplicates
and empty ones removed.
Optima to compare with were found by pyscnn, FISTA, SSNAL and Clarabel before this library was written.

lplr      seconds of `solve(problem, Penalty(lam), tol=1e-6)` from the arrays to a certified relative duality gap, median of
          repeats; the first one runs before the peers, the others after them.  Its objective is checked before any time counts
pyscnn    the solver's own clock (which leaves out its set-up) at the first iteration whose logged objective is within 1e-6 of the
          optimum; RFISTA with its defaults but for the tolerance, which is small enough to get there, unitize_data=False
clarabel  the solver's own clock (which leaves out cvxpy's compilation) with its default tolerances, or the limit where it is hit
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TARGET = Path(__file__).parents[1] / "results" / "convex_fixed.json"
TOL = 1e-6

# data, gates asked for, lam -> optimum, iterations after which pyscnn is stopped (1.4 times what it took when written)
PROBLEMS: dict[str, tuple[str, int, float, float, int]] = {
    "breast-100-0.001": ("breast", 100, 1e-3, 0.0095409041745, 4400),
    "breast-100-0.01": ("breast", 100, 1e-2, 0.0530520475270, 1200),
    "breast-500-0.001": ("breast", 500, 1e-3, 0.00618149549, 9400),
    "breast-500-0.01": ("breast", 500, 1e-2, 0.0426370705751, 2100),
    "digits-100-0.001": ("digits", 100, 1e-3, 0.02423544803, 10_000),
    "digits-100-0.01": ("digits", 100, 1e-2, 0.0929084797884, 1300),
}


def data(name: str, P: int) -> dict[str, np.ndarray]:
    """X, y, the patterns D and the gates G that make them."""
    from sklearn.datasets import load_breast_cancer, load_digits

    X, y = (load_breast_cancer if name == "breast" else load_digits)(return_X_y=True)
    if name == "breast":
        X, y = (X - X.mean(0)) / X.std(0), 2.0 * y - 1
    else:
        X, y = X / 16, np.where(y % 2 == 0, 1.0, -1.0)
    X = np.hstack([X, np.ones((len(X), 1))])
    G = np.random.default_rng(0).standard_normal((X.shape[1], P))
    D, first = np.unique(X @ G > 0, axis=1, return_index=True)
    kept = D.any(0)
    return {"X": X, "y": y, "D": D[:, kept], "G": G[:, first[kept]]}


def ours(arrays: dict[str, np.ndarray], lam: float) -> dict[str, Any]:
    import torch

    from lplr.convex import Penalty, Problem, solve

    start = time.perf_counter()
    X, Y, D = torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"])[:, None], torch.from_numpy(arrays["D"])
    found = solve(Problem(X, Y, D), Penalty(lam), tol=TOL)
    seconds = time.perf_counter() - start
    active = int((found.U.norm(dim=1) > 0).sum())
    return {
        "seconds": seconds,
        "primal": found.primal,
        "relative_gap": found.relative_gap,
        "status": found.status,
        "newton_steps": found.iterations,
        "active": active,
    }


def pyscnn(path: str, lam: float, iterations: int) -> None:
    """In the peer's process: prints the objectives and times of every iteration."""
    from scnn.metrics import Metrics
    from scnn.models import ConvexGatedReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import RFISTA

    arrays = np.load(path)
    model = ConvexGatedReLU(arrays["G"])
    solver = RFISTA(model, max_iters=iterations, tol=1e-14)
    begin = time.perf_counter()
    _, metrics = optimize_model(
        model,
        solver,
        Metrics(metric_freq=1),
        arrays["X"],
        arrays["y"],
        regularizer=NeuronGL1(lam),
        return_convex=True,
        unitize_data=False,
        dtype="float64",
    )
    wall = time.perf_counter() - begin
    print(json.dumps({"objective": list(map(float, metrics.objective)), "time": list(map(float, metrics.time)), "wall": wall}))


def run_pyscnn(python: str, arrays: dict[str, np.ndarray], lam: float, iterations: int, optimum: float) -> dict[str, Any]:
    """Seconds to the optimum within TOL; "reached" is False where the iterations did not suffice, and seconds a lower bound."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, **arrays)
        command = [python, __file__, "--worker", str(path), str(lam), str(iterations)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    log = json.loads(ran.stdout.splitlines()[-1])
    objective, clock = np.array(log["objective"]), np.array(log["time"])
    below = np.flatnonzero(objective <= optimum * (1 + TOL))
    at = int(below[0]) if len(below) else len(objective) - 1
    relative = float(objective[at] / optimum - 1)
    return {"seconds": float(clock[at]), "iterations": at, "reached": bool(len(below)), "relative": relative, "wall": log["wall"]}


def clarabel(arrays: dict[str, np.ndarray], lam: float, limit: float, optimum: float) -> dict[str, Any]:
    import cvxpy as cp

    X, y, D = arrays["X"], arrays["y"], arrays["D"].astype(float)
    U = cp.Variable((X.shape[1], D.shape[1]))
    Z = cp.sum(cp.multiply(D, X @ U), axis=1)
    objective = cp.sum_squares(Z - y) / (2 * len(y)) + lam * cp.sum(cp.norm(U, 2, axis=0))
    programme = cp.Problem(cp.Minimize(objective))
    begin = time.perf_counter()
    try:
        programme.solve(solver=cp.CLARABEL, time_limit=limit, max_threads=1)
    except cp.SolverError as error:
        return {"seconds": limit, "finished": False, "status": str(error)[:80]}
    wall, finished = time.perf_counter() - begin, programme.status in ("optimal", "optimal_inaccurate")
    seconds = float(programme.solver_stats.solve_time or wall)
    value = {"relative": float(programme.value / optimum - 1)} if finished else {}
    return {"seconds": seconds, "wall": wall, "finished": finished, "status": programme.status, **value}


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One programme: the answer first, then all in turns."""
    dataset, P, lam, optimum, iterations = PROBLEMS[name]
    arrays = data(dataset, P)
    runs = [ours(arrays, lam)]
    wrong = abs(runs[0]["primal"] / optimum - 1)
    if wrong > 2 * TOL or runs[0]["status"] != "converged":
        raise SystemExit(f"{name}: objective {runs[0]['primal']} is {wrong:.1e} off {optimum}; no time is worth reporting")
    row: dict[str, Any] = {"gates": int(arrays["D"].shape[1]), "lam": lam, "optimum": optimum}
    peer = row["pyscnn"] = run_pyscnn(args.peer_python, arrays, lam, iterations, optimum)
    if not args.skip_clarabel:
        row["clarabel"] = clarabel(arrays, lam, args.clarabel_limit, optimum)
    runs += [ours(arrays, lam) for _ in range(args.repeats - 1)]
    seconds = statistics.median(r["seconds"] for r in runs)
    row["lplr"] = {**runs[0], "seconds": seconds, "runs": [round(r["seconds"], 4) for r in runs]}
    row["times_faster_than_pyscnn"] = peer["seconds"] / seconds
    if "clarabel" in row:
        row["times_faster_than_clarabel"] = row["clarabel"]["seconds"] / seconds
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--only", nargs="*", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clarabel-limit", type=float, default=60.0)
    parser.add_argument("--skip-clarabel", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("FILE", "LAM", "ITERATIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        pyscnn(args.worker[0], float(args.worker[1]), int(args.worker[2]))
        return
    if not args.peer_python:
        parser.error("--peer-python is needed: an interpreter with pyscnn")
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: all solvers run on one thread")
    ours({k: v[:50] for k, v in data("breast", 20).items() if k != "G"}, 1e-2)  # loads what the first call loads
    rows: dict[str, Any] = {}
    for name in args.only:
        rows[name] = row = compare(name, args)
        peer, other = row["pyscnn"], row.get("clarabel", {})
        print(
            f"{name:17} lplr {row['lplr']['seconds']:6.2f} s (gap {row['lplr']['relative_gap']:.0e})  "
            f"pyscnn {'' if peer['reached'] else '>'}{peer['seconds']:.2f} s, {row['times_faster_than_pyscnn']:.1f}x  "
            f"clarabel {'' if other.get('finished') else '>'}{other.get('seconds', math.nan):.1f} s",
            flush=True,
        )
    mean = math.exp(statistics.fmean(math.log(row["times_faster_than_pyscnn"]) for row in rows.values()))
    print(f"geometric mean {mean:.1f}x, least {min(row['times_faster_than_pyscnn'] for row in rows.values()):.1f}x")
    result = {"problems": rows, "geometric_mean": mean, "threads": 1, "tol": TOL, "machine": platform.machine()}
    if list(rows) == list(PROBLEMS):
        TARGET.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
