"""CALDERA's rank sweep (NeurIPS 2024, Table 1), with the row that it lacks: the same bits without low-rank factors.

    python eval/papers/caldera_rank.py --model FOLDER --calibration c4_en_600.jsonl --heldout wiki.test.raw
        [--blocks 0 10 20] [--smoke] [--output FILE]

The paper: Llama-2-7b, Q of 2 bits, L R of 4 bits and rank 0, 64, 128, 256, which is 2.0, 2.1, 2.2, 2.4 bits a weight; perplexity
8.23, 7.37, 6.76, 6.19.  More rank is more bits, so the sweep does not tell whether the factors are worth theirs.  Here, of each
matrix, for ranks that cost the same bits a weight:

    caldera     Q on the 2-bit trellis with feedback rounding, L R with 4 bits of that rank
    equal bits  Q alone (`ldlq`) on the trellis at the width, fractional if need be, that takes the stored bits of the row above

H = E[x x^T] of the original model's inputs: of 32 rows of 512 tokens of the calibration text to fit, of 8 rows of the held-out
text, of another domain, to judge by tr(E H E^T) / tr(W H W^T).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from four_methods import RESULTS, write
from torch import Tensor

from lplr import FactorSpec, QuantSpec, factorize, load, load_tokenizer
from lplr.hf.text import calibration_tokens, evaluation_tokens, read_text
from lplr.linalg.hessian import damped
from lplr.nn import linears
from lplr.stream.moments import InputMoments

Q_BITS, LR_BITS = 2, 4
EXTRA = (0.0, 0.1, 0.2, 0.4)  # bits a weight that go to L R, as in the paper at ranks 0, 64, 128, 256
PAPER = {"rank": (0, 64, 128, 256), "bits": (2.0, 2.1, 2.2, 2.4), "perplexity": (8.23, 7.37, 6.76, 6.19), "full_precision": 5.12}
ROWS, HELD_ROWS, LENGTH = 32, 8, 512


def moments(model: Any, layers: dict[str, Any], rows: Tensor) -> dict[str, Tensor]:
    """H of each layer's inputs."""
    with torch.inference_mode(), InputMoments(layers) as collected:
        for row in rows:
            model(input_ids=row[None], use_cache=False)
            collected.end_pass()
    return {name: h.mean() for name, h in collected.hessians.items()}


def weighted(W: Tensor, made: Tensor, H: Tensor) -> float:
    W, E, H = W.double(), W.double() - made.double(), H.double()
    return float((E @ H * E).sum() / (W @ H * W).sum())


def row_of(name: str, W: Tensor, H: Tensor, held: Tensor) -> list[dict[str, Any]]:
    """CALDERA and Q alone at each share of bits."""
    (n, d), fit, out = W.shape, damped(H), []
    for extra in EXTRA:
        rank = round(extra * n * d / (LR_BITS * (n + d)))
        width = QuantSpec(bits=LR_BITS)
        q = QuantSpec(bits=Q_BITS, grid="trellis", ranges="tensor")
        spec = FactorSpec(method="caldera", rank=rank, l=width, r=width, q=q)
        f = factorize(W, spec, H=fit, generator=torch.Generator().manual_seed(0))
        bits = f.format.bits_per_weight
        alone = FactorSpec(method="ldlq", bits_per_weight=bits, grid="trellis")
        g = factorize(W, alone, H=fit, generator=torch.Generator().manual_seed(0))
        if g.format.bits_per_weight > bits:
            raise SystemExit(f"{name}: {g.format.bits_per_weight} bits, {bits} allowed: nothing is written")
        row: dict[str, Any] = {"matrix": name, "extra": extra, "rank": rank}
        for way, made in (("caldera", f), ("equal bits", g)):
            values = made.dequantize(torch.float64)
            row[way] = {"bits": made.format.bits_per_weight, "fit": weighted(W, values, H), "held": weighted(W, values, held)}
        out.append(row)
    return out


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for extra in EXTRA:
        chosen = [row for row in rows if row["extra"] == extra]
        line: dict[str, Any] = {"extra": extra, "matrices": len(chosen), "mean_rank": statistics.fmean(r["rank"] for r in chosen)}
        for way in ("caldera", "equal bits"):
            line[way] = {key: statistics.fmean(row[way][key] for row in chosen) for key in ("bits", "fit", "held")}
        line["caldera_better"] = sum(row["caldera"]["held"] < row["equal bits"]["held"] for row in chosen)
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--calibration", required=True, help="text to fit to")
    parser.add_argument("--heldout", required=True, help="text of another domain, which judges")
    parser.add_argument("--blocks", type=int, nargs="+", help="some of the blocks")
    parser.add_argument("--smoke", action="store_true", help="two matrices, few tokens")
    parser.add_argument("--output", type=Path, default=RESULTS / "papers_caldera_rank.json")
    args = parser.parse_args()
    model, tokenizer = load(args.model), load_tokenizer(args.model)
    layers = {n: m for n, m in linears(model, ("lm_head",)).items() if args.blocks is None or int(n.split(".")[2]) in args.blocks}
    layers = dict(list(layers.items())[: 2 if args.smoke else None])
    rows, held_rows, length = (4, 2, 64) if args.smoke else (ROWS, HELD_ROWS, LENGTH)
    texts = read_text(args.calibration), read_text(args.heldout)
    fit = calibration_tokens(tokenizer, texts[0], rows, length, torch.Generator().manual_seed(0))
    judge = evaluation_tokens(tokenizer, texts[1])[: held_rows * length].view(held_rows, length)
    train, held = (moments(model.model, layers, tokens) for tokens in (fit, judge))
    found = []
    for name, layer in layers.items():
        found += row_of(name, layer.weight.detach(), train[name], held[name])
        told = ", ".join(f"{r['caldera']['held']:.4f} / {r['equal bits']['held']:.4f}" for r in found[-len(EXTRA) :])
        print(f"{name}: caldera / equal bits: {told}", flush=True)
    lines = summary(found)
    print(f"{'rank':>6} {'bits':>8} {'caldera':>9} {'bits':>8} {'equal':>9}  caldera better   paper: rank, bits, perplexity")
    for i, line in enumerate(lines):
        c, e = line["caldera"], line["equal bits"]
        paper = f"{PAPER['rank'][i]}, {PAPER['bits'][i]}, {PAPER['perplexity'][i]}"
        better = f"{line['caldera_better']} of {line['matrices']}"
        print(
            f"{line['mean_rank']:6.1f} {c['bits']:8.4f} {c['held']:9.5f} {e['bits']:8.4f} {e['held']:9.5f}  {better:15}  {paper}"
        )
    facts = [{"name": t.name, "sha256": t.sha256, "rows": list(r.shape)} for t, r in zip(texts, (fit, judge), strict=True)]
    header = {"model": Path(args.model).resolve().name, "q_bits": Q_BITS, "lr_bits": LR_BITS, "paper": PAPER}
    header |= {"calibration": facts[0], "heldout": facts[1]}
    write(args.output, {**header, "summary": lines, "rows": found})


if __name__ == "__main__":
    main()
