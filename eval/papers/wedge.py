"""Wedge features where their paper shows them: a spiral, texts by their embeddings, and a dictionary that is large.

    python eval/papers/wedge.py spiral [--seeds 3]
    python eval/papers/wedge.py text --data FOLDER --embedder FOLDER --sets imdb/minilm sst2/minilm [--train 500] [--cache FOLDER]
    OMP_NUM_THREADS=2 python eval/papers/wedge.py large --data FOLDER

Source: Pilanci, "From complexity to clarity", 2023 (2309.16512) and "Clifford's geometric algebra ... in large language models"
(2406.02806).  There, every method is stopped at the time of the fastest one and settings are chosen on the test set; here each
gets what it needs, settings are chosen on a fifth of the training samples, and the test samples are read once.

spiral  160 samples of two arms of 1.5 turns in the plane, noise 0.02; 2,000 to test.  200 neurons each, but for the full
        dictionary of 2 C(160, 2) wedge features.  AdamW "as published": 1,000 full-batch steps at
        0.01, no schedule; "tuned": 8 settings of lr and weight decay, 4,000 steps, cosine, chosen like everything else.
text    heads of eval/convex/baselines.py beside the same head with wedge gates, and the Lasso on sampled wedge features in 16
        principal directions.  IMDb, SST-2: mean-pooled states of a sentence encoder.
large   100,000 wedge features through neighbours over 5,000 samples (MNIST test digits, 10 principal components, even or odd):
        seconds (and those of the processor) and peak memory from the samples to a certified solution, on two threads.
seconds: all choosing included.  Results go to eval/results/wedge.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "convex"))
from baselines import Fitted, Sample, adamw_mlp, logistic, ours, softmax, standardised, tempered  # noqa: E402
from samples import draw, load_set, mnist  # noqa: E402

from lplr.convex import subsets, wedge  # noqa: E402
from lplr.convex.lasso import Lasso, lambda_max, solve_lasso  # noqa: E402
from lplr.convex.wedge import Wedges  # noqa: E402
from lplr.evaluate.classification import accuracy, nll  # noqa: E402

TARGET = Path(__file__).parents[1] / "results" / "wedge.json"
SHARES = [10 ** (-k / 2) for k in range(1, 8)]  # of lambda_max, down to 3e-4; FEW for texts, whose best are large
FEW = SHARES[:4]
TOL = 1e-4
ROUGH = 1e-3  # gap of the solutions that only compare penalties
NEURONS, STEPS = 200, 4000


def spiral(n: int, noise: float, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n points (n, 2) of two arms of 1.5 turns, and their arm."""
    arm = torch.arange(n) % 2
    t = 0.1 + 0.9 * torch.rand(n, generator=generator, dtype=torch.float64)
    angle = 3 * math.pi * t + math.pi * arm
    X = torch.stack([t * angle.cos(), t * angle.sin()], 1) + noise * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return X.numpy(), arm.numpy()


def wedge_lasso(sample: Sample, make: Callable[[Tensor], Wedges], shares: list[float] = SHARES) -> Fitted:
    """Squared loss on +-1 or one-hot targets; lambda by the fifth along a path, then all samples; every gap within TOL."""

    def targets(y: np.ndarray) -> Tensor:
        one_hot = torch.nn.functional.one_hot(torch.tensor(y), sample.classes).double()
        return one_hot if sample.classes > 2 else one_hot[:, 1:] * 2 - 1

    def scores_of(wedges: Wedges, found: Any, scale: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        net = wedge.network(wedges, found)

        def scores(Z: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                out = net(torch.tensor(scale(Z))).numpy()
            return out[:, 0] if sample.classes == 2 else out

        return scores

    def walk(X: np.ndarray, y: np.ndarray, shares: list[float], tol: float) -> list[tuple[float, Wedges, Any, Callable]]:
        scale = standardised(X)
        rows = torch.tensor(scale(X))
        wedges = make(rows)
        lasso = Lasso(wedges.columns(rows), len(wedges), targets(y), "squared", True)
        top, found, out = lambda_max(lasso), None, []
        for share in shares:
            found = solve_lasso(lasso, share * top, tol=tol, warm=found)
            assert found.converged, found.message
            out.append((share, wedges, found, scores_of(wedges, found, scale)))
        return out

    tried = [(*tempered(scores, sample.Xv, sample.yv), share) for share, _, _, scores in walk(sample.X, sample.y, shares, ROUGH)]
    _, t, best = min(tried)
    share, wedges, found, scores = walk(*sample.whole, [best], TOL)[-1]
    facts = {"share of lambda_max": share, "features": len(wedges), "neurons": int((found.U != 0).any(2).sum())}
    facts["relative_gap"] = found.relative_gap
    size = facts["neurons"] * (wedges.gates.vectors.shape[0] + 1 + found.U.shape[2])
    return Fitted(lambda Z: softmax(t * scores(Z)), size, facts)


def sampled(count: int, most: int, seed: int, labels: bool = False) -> Callable[[Tensor], Wedges]:
    """count directions through neighbours, in `most` principal directions at most."""

    def make(X: Tensor) -> Wedges:
        basis = wedge.principal(X, most) if X.shape[1] > most else None
        size = X.shape[1] if basis is None else basis.shape[1]
        return wedge.through(X, subsets.local(X, size, count, torch.Generator().manual_seed(seed)), basis=basis)

    return make


def adamw(sample: Sample, settings: list[tuple[float, float]], steps: int, cosine: bool) -> Fitted:
    """A ReLU network of NEURONS, full batches, cross entropy; the best of settings (lr, weight decay) by the fifth, then all."""

    def trained(X: np.ndarray, y: np.ndarray, lr: float, decay: float) -> Callable[[np.ndarray], np.ndarray]:
        rows, classes = torch.tensor(X).float(), torch.tensor(y)
        with torch.random.fork_rng():
            torch.manual_seed(sample.seed)
            net = torch.nn.Sequential(torch.nn.Linear(X.shape[1], NEURONS), torch.nn.ReLU(), torch.nn.Linear(NEURONS, 2))
        optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps) if cosine else None
        for _ in range(steps):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(rows), classes).backward()
            optimiser.step()
            if schedule is not None:
                schedule.step()

        def predict(Z: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return net(torch.tensor(Z).float()).double().softmax(1).numpy()

        return predict

    def loss(lr: float, decay: float) -> float:
        p = torch.tensor(trained(sample.X, sample.y, lr, decay)(sample.Xv))
        return nll(p, torch.tensor(sample.yv))

    best = min(settings, key=lambda s: loss(*s)) if len(settings) > 1 else settings[0]
    chosen = {"lr": best[0], "weight_decay": best[1]}
    return Fitted(trained(*sample.whole, *best), NEURONS * (sample.X.shape[1] + 3) + 2, chosen)


SPIRAL: dict[str, Callable[[Sample], Fitted]] = {
    "wedge Lasso, all features": lambda s: wedge_lasso(s, wedge.dictionary),
    "wedge Lasso, 200 sampled": lambda s: wedge_lasso(s, sampled(NEURONS // 2, 2, s.seed)),
    "gated, wedge gates": lambda s: ours(s, gates="wedge", n_gates=NEURONS),
    "gated, Gaussian gates": lambda s: ours(s, n_gates=NEURONS),
    "AdamW, as published": lambda s: adamw(s, [(0.01, 0.01)], 1000, False),
    "AdamW, tuned": lambda s: adamw(s, [(r, w) for r in (0.003, 0.01, 0.03, 0.1) for w in (1e-4, 1e-1)], STEPS, True),
}
TEXT: dict[str, Callable[[Sample], Fitted]] = {
    "logistic": logistic,
    "AdamW MLP": adamw_mlp,
    "gated, Gaussian gates": ours,
    "gated, wedge gates": lambda s: ours(s, gates="wedge"),
    "wedge Lasso, 500 sampled": lambda s: wedge_lasso(s, sampled(250, 16, s.seed), FEW),
    "wedge Lasso, 20,000 sampled": lambda s: wedge_lasso(s, sampled(10_000, 16, s.seed), FEW),
}


def measure(name: str, method: str, fit: Callable[[Sample], Fitted], sample: Sample, test: tuple[np.ndarray, np.ndarray]) -> dict:
    start = time.perf_counter()
    fitted = fit(sample)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start, "parameters": fitted.parameters, "chosen": fitted.chosen}
    for part, (X, y) in (("train", sample.whole), ("test", test)):
        p = torch.from_numpy(np.asarray(fitted.predict(X), float))
        row[f"{part}_accuracy"], row[f"{part}_nll"] = accuracy(p, torch.tensor(y)), nll(p, torch.tensor(y))
    print(f"{name:14} seed {sample.seed} {method:28} {json.dumps(row)}", flush=True)
    return row


def table(name: str, methods: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\n{name}\n{'':28} {'train acc.':>10} {'test acc.':>18} {'test NLL':>9} {'seconds':>8} {'parameters':>11}")
    for method, rows in methods.items():
        mean = {k: statistics.fmean(r[k] for r in rows) for k in rows[0] if k != "chosen"}
        spread = statistics.stdev(r["test_accuracy"] for r in rows) if len(rows) > 1 else 0.0
        print(
            f"{method:28} {mean['train_accuracy']:10.4f} {mean['test_accuracy']:9.4f} +-{spread:.4f} {mean['test_nll']:9.4f} "
            f"{mean['seconds']:8.2f} {mean['parameters']:11,.0f}"
        )


def save(found: dict[str, Any]) -> None:
    """Put parts into the file of results, in place of what it held of them."""
    held = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    TARGET.write_text(json.dumps(held | {name: part | facts for name, part in found.items()}, indent=1) + "\n")


def run_spiral(args: argparse.Namespace) -> None:
    methods: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        generator = torch.Generator().manual_seed(seed)
        X, y = spiral(160, 0.02, generator)
        Xt, yt = spiral(2000, 0.02, generator)
        sample = Sample(X[32:], y[32:], X[:32], y[:32], 2, seed)
        for method in args.only or SPIRAL:
            row = measure("spiral", method, SPIRAL[method], sample, (Xt, yt))
            methods.setdefault(method, []).append(row)
            save({"spiral": {"methods": methods}})
    table("spiral", methods)


def run_text(args: argparse.Namespace) -> None:
    for name in args.sets:
        X, y, Xt, yt = load_set(name, args)
        assert Xt is not None and yt is not None
        methods: dict[str, list[dict[str, Any]]] = {}
        for seed in range(args.seeds):
            fit, apart, _ = draw(X, y, args.train, seed)
            sample = Sample(X[fit].astype(float), y[fit], X[apart].astype(float), y[apart], len(set(y)), seed)
            for method in args.only or TEXT:
                row = measure(name, method, TEXT[method], sample, (Xt.astype(float), yt))
                methods.setdefault(method, []).append(row)
                save({name: {"train": args.train, "features": X.shape[1], "test": len(yt), "methods": methods}})
        table(f"{name}, {args.train} training texts, {len(yt)} to test", methods)


def run_large(args: argparse.Namespace) -> None:
    pixels, digits = mnist(args.data)
    X, y = torch.tensor(pixels), torch.where(torch.tensor(digits) % 2 == 0, 1.0, -1.0).double()[:, None]
    basis = wedge.principal(X[:5000], 10)
    X = X @ basis
    start, cpu = time.perf_counter(), time.process_time()
    wedges = wedge.through(X[:5000], subsets.local(X[:5000], 10, 50_000, torch.Generator().manual_seed(0)))
    lasso = Lasso(wedges.columns(X[:5000]), len(wedges), y[:5000], "squared", True)
    lam = 0.01 * lambda_max(lasso)
    built = time.perf_counter() - start
    found = solve_lasso(lasso, lam, tol=TOL)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    with torch.no_grad():
        right = ((wedge.network(wedges, found)(X[5000:]) > 0) == (y[5000:] > 0)).double().mean().item()
    row = {
        "features": len(wedges), "samples": 5000, "dimensions": 10,
        "share of lambda_max": 0.01, "relative_gap": found.relative_gap,
        "status": found.status, "primal": found.primal, "neurons": int((found.U != 0).sum()), "working_sets": found.iterations,
        "largest_working_set": max(line["columns"] for line in found.history), "seconds_built": built, "seconds": seconds,
        "processor_seconds": cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "test_accuracy": right,
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    save({"large": row})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("spiral", "text", "large"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--embedder")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--sets", nargs="+", default=["imdb/minilm", "sst2/minilm"])
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--pool", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--cache", type=Path, default=Path("features"))
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    {"spiral": run_spiral, "text": run_text, "large": run_large}[args.what](args)


if __name__ == "__main__":
    main()
