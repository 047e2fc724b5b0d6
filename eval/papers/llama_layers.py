"""LPLR on the matrices of a language model (NeurIPS 2023, section 4): relative Frobenius errors at B_nq = 1, 2, 4; B = B' = 8.

    python eval/papers/llama_layers.py --model FOLDER [--blocks 0 10 20] [--smoke] [--output FILE]

The paper has LLaMA-7b, every two-dimensional weight, at 4 bits; here the linear layers of a Llama-like model.  As published,
LPLR is run on W and on its transpose, and the better of both is taken.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from four_methods import OURS, PUBLISHED, RESULTS, compare, error, published, write

WIDTH = 8
PAPER = {"lplr": (0.672, 0.080), "lsvd": (0.537, 0.079), "naive": (0.836, 0.470)}  # mean and standard deviation at B_nq = 4


def row_of(name: str, W: torch.Tensor, bits: int) -> dict[str, Any]:
    found = {method: facts for method, (_, facts) in compare(W, bits, WIDTH, WIDTH).items()}
    turned, _ = published(W.T.contiguous(), "lplr", bits, WIDTH, WIDTH, fitted=False, seed=0)
    found["lplr"]["error"] = min(found["lplr"]["error"], error(W, turned.T))
    return {"matrix": name, "bits": bits, "methods": found}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for bits in sorted({row["bits"] for row in rows}):
        chosen = [row["methods"] for row in rows if row["bits"] == bits]
        line: dict[str, Any] = {"bits": bits, "matrices": len(chosen)}
        for method in (*PUBLISHED, *OURS):
            errors = [methods[method]["error"] for methods in chosen]
            stored = [methods[method]["bits"] for methods in chosen]
            spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
            line[method] = {"mean": statistics.fmean(errors), "std": spread, "bits": statistics.fmean(stored)}
        out.append(line)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--blocks", type=int, nargs="+", help="some of the blocks")
    parser.add_argument("--smoke", action="store_true", help="two matrices")
    parser.add_argument("--output", type=Path, default=RESULTS / "papers_llama_layers.json")
    args = parser.parse_args()
    from lplr import load
    from lplr.nn import linears

    layers = linears(load(args.model), ("lm_head",))
    layers = {n: m for n, m in layers.items() if args.blocks is None or int(n.split(".")[2]) in args.blocks}
    rows = []
    for name, layer in list(layers.items())[: 2 if args.smoke else None]:
        for bits in (1, 2, 4):
            rows.append(row_of(name, layer.weight.detach().double(), bits))
        print(name, " ".join(f"{m} {f['error']:.3f}" for m, f in rows[-1]["methods"].items()), flush=True)
    lines = summary(rows)
    for line in lines:
        told = ", ".join(f"{m} {line[m]['mean']:.3f} +- {line[m]['std']:.3f}" for m in (*PUBLISHED, *OURS))
        print(f"{line['bits']} bits, {line['matrices']} matrices: {told}")
    print("paper, LLaMA-7b, 4 bits: " + ", ".join(f"{m} {mean} +- {std}" for m, (mean, std) in PAPER.items()))
    model = Path(args.model).resolve().name
    write(args.output, {"model": model, "b": WIDTH, "b_prime": WIDTH, "paper": PAPER, "summary": lines, "rows": rows})


if __name__ == "__main__":
    main()
