"""The ReLU programme with cones: lplr beside pyscnn's augmented Lagrangian, and CRONOS as published beside its repair.

    OMP_NUM_THREADS=1 python eval/convex/relu.py --peer-python PYTHON [--iterations 14324] [--repeats 3] [--skip-table]

PYTHON is an interpreter of an environment with pyscnn (pip install pyscnn==0.0.10) and torch.  The programme, `fixed.data`'s
breast with 20 gates,

    min 1/(2n) ||sum_i D_i X (v_i - w_i) - y||^2 + lam sum (||v_i|| + ||w_i||),  v_i, w_i in K_i,  lam = 1e-3,  float64,

has the optimum 0.0610761254 (Clarabel).  All runs are on one thread, in the same minutes.

lplr      seconds of `solve` from the arrays to a certified relative duality gap of 5e-5, median of repeats, the first before the
          peer, the others after it; its objective is checked against the optimum before any time counts, and V lies in the cones
pyscnn    AL with tol 1e-8, the solver's own clock at the first logged iteration from which the objective stays within 5e-5 of the
          optimum (its iterates may leave the cones, so values below the optimum count as reached only where they are that
          close); a lower bound where it never is
cronos    objective of v over the optimum, in percent, at iterations 10, 50, 200, 1000 with exact u-steps and rho 0.1, 1, 10
          (negative: v outside the cones), and with 25 conjugate-gradient steps, plain and with the published preconditioner;
          "feasible" is the excess of v projected onto the cones at the end; seconds of the run.  The repair: `method="admm"`
steps     of conjugate gradients to a relative residual of 1e-6, random right side: no preconditioner, Nystroem of rank 10 and
          200, block-Jacobi I + X^T X
"""

from __future__ import annotations

import argparse
import json
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
from fixed import data

TARGET = Path(__file__).parents[1] / "results" / "convex_relu.json"
LAM, OPTIMUM, TOL = 1e-3, 0.0610761254, 5e-5
AT = (10, 50, 200, 1000)


def programme():
    import torch

    from lplr.convex import Problem

    arrays = data("breast", 20)
    X, Y, D = torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"])[:, None], torch.from_numpy(arrays["D"])
    return Problem(X, Y, D, activation="relu")


def ours(tol: float) -> dict[str, Any]:
    from lplr.convex import Penalty, cones, solve

    start = time.perf_counter()
    problem = programme()
    found = solve(problem, Penalty(LAM, "columns"), tol=tol)
    return {
        "seconds": time.perf_counter() - start,
        "primal": found.primal,
        "relative_gap": found.relative_gap,
        "status": found.status,
        "steps": found.iterations,
        "violation": cones.violation(found.U, problem.X, problem.D).item(),
    }


def pyscnn(path: str, iterations: int) -> None:
    """In the peer's process: prints the objectives, constraint gaps and times of its log."""
    from scnn.metrics import Metrics
    from scnn.models import ConvexReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import AL

    arrays = np.load(path)
    model = ConvexReLU(arrays["G"])
    solver = AL(model, max_primal_iters=iterations, tol=1e-8)
    begin = time.perf_counter()
    _, metrics = optimize_model(
        model,
        solver,
        Metrics(metric_freq=25, constraint_gaps=True),
        arrays["X"],
        arrays["y"],
        regularizer=NeuronGL1(LAM),
        return_convex=True,
        unitize_data=False,
        dtype="float64",
    )
    wall = time.perf_counter() - begin
    log = {name: list(map(float, getattr(metrics, name))) for name in ("objective", "time", "constraint_gaps")}
    print(json.dumps({**log, "wall": wall}))


def run_pyscnn(python: str, iterations: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, **data("breast", 20))
        command = [python, __file__, "--worker", str(path), str(iterations)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    log = json.loads(ran.stdout.splitlines()[-1])
    relative, clock = np.array(log["objective"]) / OPTIMUM - 1, np.array(log["time"])
    far = np.flatnonzero(np.abs(relative) > TOL)
    at = int(far[-1]) + 1 if len(far) else 0
    reached = at < len(relative)
    at = min(at, len(relative) - 1)
    result = {"seconds": float(clock[at]), "reached": reached, "relative": float(relative[at]), "wall": log["wall"]}
    return {**result, "constraint_gap": log["constraint_gaps"][at] if log["constraint_gaps"] else None}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    ours(1e-1)  # loads what the first call loads
    runs = [ours(TOL)]
    wrong = abs(runs[0]["primal"] / OPTIMUM - 1)
    if wrong > TOL or runs[0]["status"] != "converged" or runs[0]["violation"] > 1e-8:
        raise SystemExit(f"objective {runs[0]['primal']} is {wrong:.1e} off {OPTIMUM}: {runs[0]}; no time is worth reporting")
    peer = run_pyscnn(args.peer_python, args.iterations)
    runs += [ours(TOL) for _ in range(args.repeats - 1)]
    seconds = statistics.median(run["seconds"] for run in runs)
    row = {**runs[0], "seconds": seconds, "runs": [round(run["seconds"], 3) for run in runs]}
    return {"lplr": row, "lplr_gap_1e-8": ours(1e-8), "pyscnn": peer, "times_faster_than_pyscnn": peer["seconds"] / seconds}


def table() -> dict[str, Any]:
    """CRONOS as published, and where its repair is by the same time."""
    import torch

    from lplr.convex import Penalty
    from lplr.convex.cronos import cronos

    problem, penalty, rows = programme(), Penalty(LAM, "columns"), {}
    exact = [(rho, "exact", 1000) for rho in (0.1, 1.0, 10.0)]
    for rho, inner, iterations in (*exact, (1.0, "none", 200), (1.0, "nystroem", 200)):
        draw = torch.Generator().manual_seed(0)
        found = cronos(problem, penalty, rho=rho, inner=inner, max_iter=iterations, generator=draw)
        excess = {k: round(100 * (found.history[k - 1]["objective"] / OPTIMUM - 1), 2) for k in AT if k <= iterations}
        row = {"excess_percent": excess, "feasible_percent": round(100 * (found.primal / OPTIMUM - 1), 2)}
        row |= {"infeasibility": found.history[-1]["infeasibility"], "seconds": round(found.seconds, 2)}
        rows[f"rho {rho}, {inner}"] = row
        print(f"cronos rho {rho:4} {inner:9} {excess} feasible {row['feasible_percent']:+.1f} % {row['seconds']} s", flush=True)
    return rows


def steps() -> dict[str, Any]:
    import torch

    from lplr.convex.cronos import conjugate_gradients, operators, preconditioner

    problem, rows = programme(), {}
    F, Ft, G, Gt = operators(problem)
    P, d = problem.D.shape[1], problem.X.shape[1]
    M = torch.linalg.cholesky(torch.eye(d, dtype=torch.float64) + problem.X.T @ problem.X)
    for rho in (0.1, 1.0):
        draw = torch.Generator().manual_seed(1)
        right = torch.randn(2, P, d, 1, generator=draw, dtype=torch.float64)

        def apply(x: torch.Tensor, rho: float = rho) -> torch.Tensor:
            return x + Ft(F(x)) / rho + Gt(G(x))

        ways = {"none": lambda g: g, "block": lambda g: torch.cholesky_solve(g, M)}
        ways |= {f"nystroem {rank}": preconditioner(apply, right, rho, rank, draw) for rank in (10, 200)}
        tol = 1e-6 * right.norm().item()
        rows[f"rho {rho}"] = {name: conjugate_gradients(apply, right, way, tol, 5000)[1] for name, way in ways.items()}
        print(f"steps  rho {rho:4} {rows[f'rho {rho}']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--iterations", type=int, default=14_324, help="of the peer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-table", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("FILE", "ITERATIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        pyscnn(args.worker[0], int(args.worker[1]))
        return
    if not args.peer_python:
        parser.error("--peer-python is needed: an interpreter with pyscnn")
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: all solvers run on one thread")
    result = compare(args)
    peer = result["pyscnn"]
    print(
        f"breast-20-relu lplr {result['lplr']['seconds']:.2f} s (gap {result['lplr']['relative_gap']:.0e})  "
        f"pyscnn {'' if peer['reached'] else '>'}{peer['seconds']:.1f} s ({peer['relative']:+.1e}), "
        f"{'' if peer['reached'] else 'more than '}{result['times_faster_than_pyscnn']:.1f}x",
        flush=True,
    )
    if not args.skip_table:
        result |= {"cronos": table(), "conjugate_gradient_steps": steps()}
        TARGET.write_text(
            json.dumps({**result, "optimum": OPTIMUM, "tol": TOL, "threads": 1, "machine": platform.machine()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
