"""Which method at which budget: calibrated output errors of matrices of SmolLM2-135M, without training.

    python eval/quality/methods.py [--bits 0.5 0.75 1 1.5 2 3 4] [--blocks 2 12 24]

Prints, for every budget and method, the mean over matrices of sqrt(tr(E H E^T) / tr(W H W^T)), on held-out second moments
(other text than the calibration's) and in sample, and the seconds.  `factor.rank.BACKBONE_FROM` and `default_factor_bits`
follow this table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from lplr import FactorSpec, QuantSpec, load, load_tokenizer
from lplr.demo import fetch_model
from lplr.factor import factorize, weighted_error
from lplr.hf.text import calibration_tokens, read_text
from lplr.nn import linears
from lplr.stream.moments import InputMoments

METHODS = {
    "ldlq": {"method": "ldlq"},
    "caldera": {"method": "caldera"},
    "lplr 2 bit": {"method": "lplr", "l": QuantSpec(bits=2), "r": QuantSpec(bits=2)},
    "lplr 3 bit": {"method": "lplr", "l": QuantSpec(bits=3), "r": QuantSpec(bits=3)},
    "lplr 4 bit": {"method": "lplr", "l": QuantSpec(bits=4), "r": QuantSpec(bits=4)},
    "lplr_svd 3 bit": {"method": "lplr_svd", "l": QuantSpec(bits=3), "r": QuantSpec(bits=3)},
    "direct_svd 3 bit": {"method": "direct_svd", "l": QuantSpec(bits=3), "r": QuantSpec(bits=3)},
}


@torch.inference_mode()
def moments(model: torch.nn.Module, layers: dict[str, torch.nn.Module], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moments of the inputs of the layers over token rows."""
    with InputMoments(layers) as collected:
        for row in rows:
            model(input_ids=row[None])
            collected.end_pass()
    return {name: h.mean() for name, h in collected.hessians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 12, 24])
    args = parser.parse_args()
    path = fetch_model(print)
    model, tokenizer = load(path), load_tokenizer(path)
    wanted = {name: module for name, module in linears(model, ("lm_head",)).items() if int(name.split(".")[2]) in args.blocks}
    train, held = (
        moments(model, wanted, calibration_tokens(tokenizer, read_text(text), 24, 512, torch.Generator().manual_seed(0)))
        for text in ("builtin:train", "builtin:heldout")
    )
    results = []
    print(f"{'bits':>5}  {'method':18} {'held-out error':>14} {'in-sample':>10} {'bits/weight':>12} {'seconds':>8}")
    for bits in args.bits:
        for label, settings in METHODS.items():
            spec = FactorSpec(bits_per_weight=bits, power_iterations=2, alternations=4, **settings)
            out, inside, stored, started = [], [], [], time.perf_counter()
            for name, module in wanted.items():
                W = module.weight.detach()
                try:
                    f = factorize(W, spec, H=train[name], generator=torch.Generator().manual_seed(0))
                except ValueError:
                    break
                out.append(weighted_error(W, f, held[name]))
                inside.append(weighted_error(W, f, train[name]))
                stored.append(f.format.bits_per_weight)
            if len(out) < len(wanted):
                continue
            took = time.perf_counter() - started
            row = [sum(v) / len(v) for v in (out, inside, stored)]
            print(f"{bits:5g}  {label:18} {row[0]:14.4f} {row[1]:10.4f} {row[2]:12.4f} {took:8.1f}", flush=True)
            results.append({"bits": bits, "method": label, "held_out": row[0], "in_sample": row[1], "bits_per_weight": row[2]})
    target = Path(__file__).parents[1] / "results" / "methods.json"
    target.write_text(json.dumps({"model": "SmolLM2-135M-Instruct", "blocks": args.blocks, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
