"""Heads on frozen features: ours beside what practitioners use, on the same samples, with the same budget to choose in.

    python eval/convex/heads.py --data FOLDER [--model NAME=FOLDER ...] [--embedder FOLDER] [--sets agnews/dense ...]
        [--train 1000] [--seeds 5] [--only logistic ours ...] [--cache FOLDER]

FOLDER of --data holds agnews/, sst2/, imdb/, mnist_t10k/ and uci/ as in the project's data folder.  --model: language models,
dense or compressed, whose mean-pooled last hidden states (at most 128 tokens a text) are the features; --embedder: a sentence
encoder.  mnist: pixels, ten classes; uci: raw columns.

Every seed draws `train` training samples (UCI: half of the rows, at most) of the training part; a fifth of them is set apart to
choose settings by its NLL, then the chosen setting is fitted to all of them, but for early-stopped networks, which keep the fifth
as their stopping rule.  The test part is the same for all seeds (UCI: the other half) and is read once, by `measure`.
Scores of methods without probabilities become some by a softmax whose temperature is fitted on the fifth.
seconds: from samples to the fitted model, all choosing included, on one thread.  parameters: numbers that prediction needs.
nll: nats; ece: expected calibration error in 15 bins.  The table tells mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import METHODS, SLOW, Fitted, Sample
from samples import draw, load_set

from lplr.evaluate.classification import accuracy, calibration_error, nll

TARGET = Path(__file__).parents[1] / "results" / "convex_heads.json"


def measure(fitted: Fitted, X: np.ndarray, y: np.ndarray) -> dict[str, float]:
    p, truth = torch.from_numpy(np.asarray(fitted.predict(X), float)), torch.from_numpy(y)
    return {"accuracy": accuracy(p, truth), "nll": nll(p, truth), "ece": calibration_error(p, truth)}


def run_set(name: str, args: argparse.Namespace) -> dict[str, Any]:
    X, y, Xt, yt = load_set(name, args)
    size = min(args.train, len(y) // 2) if Xt is None else args.train
    rows: dict[str, Any] = {}
    for seed in range(args.seeds):
        fit, apart, rest = draw(X, y, size, seed)
        sample = Sample(X[fit].astype(float), y[fit], X[apart].astype(float), y[apart], len(set(y)), seed)
        test = (X[rest], y[rest]) if Xt is None or yt is None else (Xt, yt)
        for method in args.only or [m for m in METHODS if m not in SLOW]:
            start = time.perf_counter()
            fitted = METHODS[method](sample)
            seconds = time.perf_counter() - start
            found = measure(fitted, test[0].astype(float), test[1])
            found |= {"seconds": seconds, "parameters": fitted.parameters, "chosen": fitted.chosen}
            rows.setdefault(method, []).append(found)
            print(f"{name:22} seed {seed} {method:22} " + " ".join(f"{k} {found[k]:.4g}" for k in list(found)[:5]), flush=True)
    return {"train": size, "features": X.shape[1], "classes": len(set(y)), "test": len(test[1]), "methods": rows}


def table(name: str, found: dict[str, Any]) -> None:
    facts = f"{found['features']} features, {found['classes']} classes, {found['test']} to test"
    print(f"\n{name}: {found['train']} training samples, {facts}")
    print(f"{'':22} {'accuracy':>16} {'nll':>8} {'ece':>8} {'seconds':>9} {'parameters':>11}")
    for method, rows in found["methods"].items():
        mean = {k: statistics.fmean(row[k] for row in rows) for k in ("accuracy", "nll", "ece", "seconds", "parameters")}
        spread = statistics.stdev(row["accuracy"] for row in rows) if len(rows) > 1 else 0.0
        print(
            f"{method:22} {mean['accuracy']:8.4f} +-{spread:.4f} {mean['nll']:8.4f} {mean['ece']:8.4f} {mean['seconds']:9.2f} "
            f"{mean['parameters']:11,.0f}"
        )
    methods = found["methods"]
    if "ours" in methods:
        at = {m: statistics.fmean(row["accuracy"] for row in rows) for m, rows in methods.items()}
        winner = max(at, key=lambda m: at[m])
        error = (at[winner] * (1 - at[winner]) / found["test"]) ** 0.5
        print(f"highest accuracy: {winner}; ours is {at[winner] - at['ours']:.4f} behind, one standard error is {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--embedder")
    parser.add_argument("--sets", nargs="+", required=True, help="agnews/NAME sst2/NAME imdb/minilm mnist uci/ionosphere ...")
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=2000, help="training texts that features are made of")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(METHODS))
    parser.add_argument("--cache", type=Path, default=Path("features"))
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.filterwarnings("ignore", module="sklearn")
    args.cache.mkdir(parents=True, exist_ok=True)
    held = json.loads(TARGET.read_text()) if TARGET.is_file() else {"sets": {}}
    for name in args.sets:
        found = run_set(name, args)
        table(name, found)
        held["sets"].setdefault(name, found)["methods"] |= found["methods"]
        held |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
        held["versions"] = {p: metadata.version(p) for p in ("torch", "scikit-learn", "lightgbm", "transformers")}
        TARGET.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
